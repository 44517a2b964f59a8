"""The record of `python -m pipeline.quality`: a line of quality.jsonl."""

from typing import Any

import msgspec

from splash_workbench.records.base import Devices, PipelineRecord, new_id


class QualityRecord(PipelineRecord, frozen=True, kw_only=True):
    """A candidate's videos beside the reference's, each prompt with each seed.

    Attributes:
      candidate: its name; "reference" for the reference beside itself.
      psnr_db, ssim: one a video; no PSNR where it is the reference's very own.
      readings, read_back: what was read from the frames of each video, and the share that shows what its prompt says.
      failures: why it is over budget; empty where it is not.
    """

    schema_version: int = 2
    record_id: str = msgspec.field(default_factory=new_id)
    device: Devices
    candidate: str
    parallel: dict[str, Any] = msgspec.field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    budget: dict[str, Any] = msgspec.field(default_factory=dict)
    psnr_db: tuple[float | None, ...]
    ssim: tuple[float, ...]
    readings: tuple[dict[str, Any], ...] = ()
    read_back: dict[str, float]
    failures: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.psnr_db or len(self.psnr_db) != len(self.ssim):
            raise ValueError(
                f"{len(self.psnr_db)} PSNR and {len(self.ssim)} SSIM figures: expected one of each a video"
            )
