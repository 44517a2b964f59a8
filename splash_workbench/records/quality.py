"""The records of `python -m pipeline.quality`: a line of quality.jsonl, and one of a page's pairs.jsonl."""

from typing import Any

import msgspec

from splash_workbench.records.base import Devices, PipelineRecord, new_id


class QualityRecord(PipelineRecord, frozen=True, kw_only=True):
    """A candidate's videos beside the reference's, each prompt with each seed.

    Attributes:
      candidate: its name; "reference" for the reference beside itself.
      chosen: what the request, or its quality, chose: types, the cache's method and threshold ...
      psnr_db, ssim: one a video; no PSNR where it is the reference's very own.
      lpips: likewise; empty where it was not computed. denoise_times_s, steps_computed: likewise, see PairRecord.
      readings, read_back: what was read from the frames of each video, and the share that shows what its prompt says.
      failures: why it is over budget; empty where it is not.
    """

    schema_version: int = 3
    record_id: str = msgspec.field(default_factory=new_id)
    device: Devices
    candidate: str
    parallel: dict[str, Any] = msgspec.field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    budget: dict[str, Any] = msgspec.field(default_factory=dict)
    chosen: dict[str, Any] = msgspec.field(default_factory=dict)
    psnr_db: tuple[float | None, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...] = ()
    denoise_times_s: tuple[float, ...] = ()
    steps_computed: tuple[int, ...] = ()
    readings: tuple[dict[str, Any], ...] = ()
    read_back: dict[str, float]
    failures: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.psnr_db or len(self.psnr_db) != len(self.ssim):
            raise ValueError(
                f"{len(self.psnr_db)} PSNR and {len(self.ssim)} SSIM figures: expected one of each a video"
            )


class PairRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A video beside the reference's of the same prompt and seed.

    Attributes:
      key: a digest of all that the two videos depend on.
      psnr_db: None where they are the same. lpips: None where it was not computed.
      reading, reference_reading: what was read from the frames; None where the prompt is no caption.
      denoise_time_s: of the denoising steps, without compiling; steps_computed: how many ran the transformer's blocks.
      first_frame_db: of the reference with the image that it was given; None where none was drawn.
    """

    key: str
    candidate: str
    prompt: str
    seed: int
    psnr_db: float | None
    ssim: float
    lpips: float | None = None
    reading: dict[str, Any] | None = None
    reference_reading: dict[str, Any] | None = None
    denoise_time_s: float
    steps_computed: int
    first_frame_db: float | None = None
