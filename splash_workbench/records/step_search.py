"""The record of `python -m pipeline.tune`: which compiler options of a denoising step were tried."""

from typing import Any

import msgspec

from splash_workbench.records.base import PipelineRecord


class TriedOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One set of compiler options.

    Attributes:
      options: flags of libtpu, all that the step is compiled with.
      time_s: predicted, of a step; None where it does not compile or fit: error says why.
      short_attention: the attention kernel computed few queries at a time, which compiles sooner: such times are only
        compared with one another.
      interval_s, breakdown_s, peak_hbm_bytes, compile_cpu_s: as of StagePrediction.
    """

    options: dict[str, str]
    short_attention: bool
    time_s: float | None = None
    error: str | None = None
    interval_s: tuple[float, float] | None = None
    breakdown_s: dict[str, float] = msgspec.field(default_factory=dict)
    peak_hbm_bytes: int = 0
    compile_cpu_s: float = 0.0


class StepSearchRecord(PipelineRecord, frozen=True, kw_only=True):
    """The search of one kind of step.

    Attributes:
      call: what the step is, fields of `pipeline.model.step_options.StepCall`.
      default, winner: whole compilations of the default options and of the best; the same where nothing beats it.
      tried: all, in the order in which they were asked for.
      kept: whether the winner was written as an entry, and why or why not.
    """

    schema_version: int = 1
    topology: str
    call: dict[str, Any]
    default: TriedOptions
    winner: TriedOptions
    tried: tuple[TriedOptions, ...]
    kept: str
