"""The schema of configs/quality.yaml. Imports no JAX: options are read before it."""

import dataclasses
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
        for name in ("psnr_db", "ssim", "lpips"):
            if not isinstance(value := getattr(self, name), int | float) or isinstance(value, bool):
                raise RequestError(f"budget.{name}={value!r}: expected a number.")
        if not isinstance(self.read_back, bool):
            raise RequestError(f"budget.read_back={self.read_back!r}: expected true or false.")
        if not self.psnr_db >= 0:
            raise RequestError(f"budget.psnr_db={self.psnr_db}: expected 0 or more.")
        if not 0 <= self.ssim <= 1:
            raise RequestError(f"budget.ssim={self.ssim}: expected 0 to 1.")
        if not 0 <= self.lpips <= 1:
            raise RequestError(f"budget.lpips={self.lpips}: expected 0 to 1.")


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
