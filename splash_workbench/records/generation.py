"""The record of a run of `python -m pipeline.generate`: a line of generate.jsonl, and the head of video.json."""

from typing import Any

import msgspec

from splash_workbench.records.base import Devices, PipelineRecord, new_id


class StageTimes(msgspec.Struct, frozen=True):
    """Seconds that a stage took.

    step_times_s: raw, one a step; without the time between steps. steps_computed: of the denoising steps, how many ran
    the transformer's blocks; None: all. read_bytes: of its weights, stored_bytes, those that the process which wrote
    this read from storage.
    """

    load_time_s: float
    compile_time_s: float
    run_time_s: float
    step_times_s: tuple[float, ...]
    steps_computed: int | None = None
    read_bytes: int | None = None
    stored_bytes: int | None = None


class GenerationRecord(PipelineRecord, frozen=True, kw_only=True):
    """One run: where it ran, what was asked for, and how long each stage took.

    Attributes:
      attention, parallel: of the denoise stage, None where there is no output of it.
      compiler_options: likewise, flags of libtpu by kind of step ("computed", "reused", ...); none but on TPUs.
      resumed_at_step: the denoising step after which this run resumed; its step times are those of all runs.
      stages: by name; without those that were reused.
    """

    schema_version: int = 2
    record_id: str = msgspec.field(default_factory=new_id)
    device: Devices
    attention: dict[str, Any] | None = None
    compiler_options: dict[str, dict[str, str]] | None = None
    parallel: dict[str, Any] | None = None
    resumed_at_step: int | None = None
    stages: dict[str, StageTimes]
    reused_stages: tuple[str, ...] = ()
