"""The schema of configs/quality.yaml. Imports no JAX: options are read before it."""

import dataclasses
import math
from typing import Any

from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError


@dataclasses.dataclass
class Budget:
    """Limits of a variant. psnr_db, ssim: the least of any video, lpips: the most. read_back: see `Comparison`."""

    psnr_db: float = 0.0
    ssim: float = 0.0
    lpips: float = 1.0
    read_back: bool = True

    def __post_init__(self) -> None:
        for name, most, expected in (("psnr_db", math.inf, "0 or more"), ("ssim", 1, "0 to 1"), ("lpips", 1, "0 to 1")):
            if not isinstance(value := getattr(self, name), int | float) or isinstance(value, bool):
                raise RequestError(f"budget.{name}={value!r}: expected a number.")
            if not 0 <= value <= most:
                raise RequestError(f"budget.{name}={value}: expected {expected}.")
        if not isinstance(self.read_back, bool):
            raise RequestError(f"budget.read_back={self.read_back!r}: expected true or false.")


@dataclasses.dataclass
class QualityConfig(GenerateConfig):
    """Keys of the command line: those of generate, for the reference, and these."""

    modes: str = "tiny"
    captions: list[str] = dataclasses.field(default_factory=list)
    seeds: list[int] = dataclasses.field(default_factory=list)
    kernel: str | None = "pallas_interpret"
    budget: Budget = dataclasses.field(default_factory=Budget)
    reuse: Budget = dataclasses.field(default_factory=Budget)
    follows: float = 0.0
    first_frame_db: float = 0.0
    candidates: list[Any] = dataclasses.field(default_factory=list)
    only: list[str] = dataclasses.field(default_factory=list)
    videos_dir: str | None = None
    lpips: bool = True
    page_dir: str | None = None
    predictions: str | None = None
    results_path: str | None = None
