"""The record of `python -m pipeline.predict`: a line of predict.jsonl."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

import msgspec

from splash_workbench.records.base import PipelineRecord

STAGES = ("text", "denoise", "vae")
GIB = 2**30
#: Of a chip's HBM, so much is left to the runtime and to fragmentation.
HBM_MARGIN_FRACTION = 0.1


class Plan(msgspec.Struct, frozen=True):
    """A parallel plan: dp * model * kv devices."""

    plan: str
    dp: int
    model: int
    weights: str
    kv: int = 1

    @property
    def title(self) -> str:
        """All of it in one line."""
        kv = f" x kv={self.kv}" if self.kv > 1 else ""
        return f"{self.plan}, dp={self.dp} x model={self.model}{kv}, weights {self.weights}"


class Attention(msgspec.Struct, frozen=True):
    """The attention call of a step, and what `attention()` resolved it to, in words."""

    shape: str
    resolution: str


class StagePrediction(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One stage, or one of its programs, on one chip. Times and bytes are predicted.

    Attributes:
      time_s: of a denoising step; of the other stages, of all of it. breakdown_s: seconds by kind of work.
      interval_s: between which four fifths of the measured times of such work lie; None in older records.
      slow_time_s: as `time_s`, where no head may take the kernel that it assumes; None where nothing depends on data.
      peak_hbm_bytes, hbm_bytes: the most that is in use, and what the chip has.
      hbm_traffic_bytes, link_bytes: moved through HBM, and over the busiest link.
      compile_time_s, compile_cpu_s, compile_peak_rss_bytes, wall_time_s: what compiling took here, and its worker.
      flops, mfu_fraction, num_layers, attention: of a denoising step. step_options: flags of libtpu that it has.
      calls: how often the stage runs this program.
      ops, collectives, timeline: parts of the prediction; not kept in predict.jsonl.
    """

    time_s: float
    interval_s: tuple[float, float] | None = None
    slow_time_s: float | None = None
    breakdown_s: dict[str, float]
    peak_hbm_bytes: int
    hbm_traffic_bytes: float = 0.0
    link_bytes: float = 0.0
    compile_time_s: float = 0.0
    compile_cpu_s: float = 0.0
    compile_peak_rss_bytes: int = 0
    hbm_bytes: int = 0
    wall_time_s: float = 0.0
    flops: int | None = None
    mfu_fraction: float | None = None
    num_layers: int | None = None
    attention: Attention | None = None
    step_options: dict[str, str] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calls: int | None = None
    programs: tuple["StagePrediction", ...] = ()
    ops: tuple[dict[str, Any], ...] = ()
    collectives: tuple[dict[str, Any], ...] = ()
    timeline: tuple[dict[str, Any], ...] = ()

    def without_ops(self) -> Self:
        """Return it without its lists of ops."""
        programs = tuple(program.without_ops() for program in self.programs)
        return msgspec.structs.replace(self, programs=programs, ops=(), collectives=(), timeline=())


class StepKind(msgspec.Struct, frozen=True, kw_only=True):
    """Denoising steps that do the same work.

    Attributes:
      work: in words, "computed" or "reused", and of which prompts. count: how many there are.
      time_s, interval_s, breakdown_s, peak_hbm_bytes, compile_cpu_s, step_options: as of StagePrediction, of one.
    """

    work: str
    count: int
    time_s: float
    interval_s: tuple[float, float] | None = None
    breakdown_s: dict[str, float]
    peak_hbm_bytes: int
    compile_cpu_s: float
    step_options: dict[str, str] = msgspec.field(default_factory=dict)


class PresetPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """A video with one of the presets of quality.

    Attributes:
      step_time_s: of a step that computes all. steps, steps_computed: how many there are, and run the blocks.
      kinds: of steps. stage_times_s, total_time_s, total_interval_s: as of PredictionRecord.
      compile_cpu_s: by stage, of all its programs. note: what was assumed of the steps.
    """

    plan: Plan
    steps: int
    steps_computed: int
    step_time_s: float
    kinds: tuple[StepKind, ...]
    stage_times_s: dict[str, float]
    total_time_s: float | None
    total_interval_s: tuple[float, float] | None = None
    peak_hbm_gib: float
    compile_cpu_s: dict[str, float]
    note: str | None = None


class ReportedVideo(msgspec.Struct, frozen=True):
    """Seconds that somebody else reported for the same video."""

    label: str
    source: str
    total_time_s: float
    step_time_s: float


class PredictionRecord(PipelineRecord, frozen=True, kw_only=True):
    """A video on chips that are not here, e.g. on the topology "v6e-8".

    Attributes:
      compiler_options: flags of libtpu that were given; empty: its defaults.
      step_time_s, step_time_own_kernel_s: of a denoising step, with the plan's attention kernel and with this
        project's.
      total_time_s: of all stages, None where one is not predicted; stage_times_s: seconds by stage, of all steps.
      total_interval_s: as StagePrediction.interval_s; the stages' errors are taken to go together.
      slow_total_time_s: as `total_time_s`, with StagePrediction.slow_time_s for the step.
      other_plans: of each plan not taken, its step time, or why it cannot be.
      failures: why a stage cannot be predicted.
      presets: by name, where they were asked for.
      reported: by others for the same video on the same chips.
    """

    schema_version: int = 3
    topology: str
    config_source: str = ""
    compiler_options: dict[str, str] = msgspec.field(default_factory=dict)
    plan: Plan
    step_time_s: float | None
    step_time_own_kernel_s: float | None = None
    total_time_s: float | None = None
    total_interval_s: tuple[float, float] | None = None
    slow_total_time_s: float | None = None
    stage_times_s: dict[str, float] = msgspec.field(default_factory=dict)
    compile_time_s: dict[str, float] = msgspec.field(default_factory=dict)
    mfu_fraction: float | None = None
    peak_hbm_gib: float | None = None
    hbm_gib: float | None = None
    hbm_has_margin: bool | None = None
    stages: dict[str, StagePrediction]
    other_plans: dict[str, float | str] = msgspec.field(default_factory=dict)
    failures: dict[str, str] = msgspec.field(default_factory=dict)
    reported: ReportedVideo | None
    presets: dict[str, PresetPrediction] = msgspec.field(default_factory=dict)
    notes: tuple[str, ...]

    def without_ops(self) -> Self:
        """Return the record as predict.jsonl keeps it."""
        return msgspec.structs.replace(self, stages={name: s.without_ops() for name, s in self.stages.items()})


def hbm_fields(stages: Iterable[StagePrediction]) -> Mapping[str, Any]:
    """Return the fields about a chip's memory: the peak over stages that run one after the other, and what it has."""
    stages = list(stages)
    peak, has = max(stage.peak_hbm_bytes for stage in stages), stages[0].hbm_bytes
    return {
        "peak_hbm_gib": peak / GIB,
        "hbm_gib": has / GIB,
        "hbm_has_margin": peak <= (1 - HBM_MARGIN_FRACTION) * has,
    }
