"""Trials as frozen values, as JSON lines on disk and as a pandas table."""

import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from offline_tpu.prediction import OpCost
from splash_attn.types import AttentionShape, BlockSizes
from splash_workbench.provenance import Environment
from splash_workbench.records import jsonl
from splash_workbench.records.base import new_id, utc_now
from splash_workbench.trial_status import Label, Status
from tuning.trials.workloads import sizes_text

SCHEMA_VERSION = 1
TRIALS_FILE = "trials.jsonl"
#: Before the fields of a variant, in tables and in the parameters of a space.
VARIANT_PREFIX = "variant."
OUR_KERNEL = "splash_attn"
#: What stands behind a prediction, the most exact first; see Trial.
Compiled = Literal["whole", "kernel", "shorter"]


@dataclasses.dataclass(frozen=True)
class Numerics:
    """A candidate against the reference, on a small odd shape.

    implementation: what ran, "pallas_interpret", or "pallas_tpu" on a TPU; rms_error: ||actual - expected|| /
    ||expected||; max_row_error: the same for the worst row; tolerance, row_tolerance: their limits; block_sizes,
    q_seq_len, kv_seq_len, num_heads: what ran, of an attention; config, sizes: of another kernel. The blocks need not
    be the candidate's: those of a first pass are checked with smaller ones of the same structure.
    """

    implementation: str
    rms_error: float
    max_row_error: float
    max_abs_error: float
    tolerance: float
    row_tolerance: float
    block_sizes: str = ""
    q_seq_len: int | None = None
    kv_seq_len: int | None = None
    num_heads: int | None = None
    config: str = ""
    sizes: str = ""

    @property
    def passed(self) -> bool:
        # Written so that a NaN error fails.
        return self.rms_error <= self.tolerance and self.max_row_error <= self.row_tolerance


@dataclasses.dataclass(frozen=True)
class Trial:
    """One candidate and what became of it.

    Attributes:
      context: hash of what makes times comparable: workload, device, backend, sources, versions.
      kernel: "splash_attn", a peer's name, or the class of a user's kernel.
      shape, block_sizes: of an attention; sizes: the fields of another kernel's workload; its tunables are in variant.
      compiled: what stands behind a prediction: the "whole" op; the "kernel" alone, beside which the rest of the op is
        that of another candidate; or a "shorter" kernel, from which this one is extrapolated.
      estimate_ms: of a whole op, what was predicted of the same candidate before by less.
      bound_ms: the least time that FLOPs and bytes allow, as the kernel says them; for attention see `trials.bound`.
      compiler_options: flags of libtpu that were given for this program; empty: its defaults.
      label: how the times were got; None for backends that give none.
      time_samples_ms: raw times of the whole op; one sample for a prediction.
      slow_time_ms: of a whole op that is predicted, the time where data make it slowest, as where no head may take the
        fixed-bound softmax; None where nothing depends on data, or it was not compiled whole.
      kernel_time_ms, cycles, vmem_bytes, spill_count, fill_count, code_bytes: of the Pallas kernel alone.
      peak_hbm_bytes, compile_time_s: of the whole op.
      wall_time_s: of the job that made it, imports included where its worker was new; 0 if it came from the cache.
      ops: parts of a prediction, one for each HLO op.
      numerics: the check, None where the trial did not get that far.
      error: one line; log_tail: the end of the worker's output. Only for trials that are not ok.
      conclusive: whether the same candidate would end so again; if not, it is tried again. None stands for what its
        status says, as in older records.
    """

    context: str
    kernel: str
    workload: str
    shape: AttentionShape | None
    dtype: str
    device: str
    device_kind: str
    backend: str
    block_sizes: BlockSizes | None
    variant: dict[str, Any]
    status: Status
    environment: Environment
    label: Label | None = None
    time_samples_ms: tuple[float, ...] = ()
    slow_time_ms: float | None = None
    kernel_time_ms: float | None = None
    cycles: int | None = None
    vmem_bytes: int | None = None
    spill_count: int | None = None
    fill_count: int | None = None
    code_bytes: int | None = None
    peak_hbm_bytes: int | None = None
    compile_time_s: float | None = None
    wall_time_s: float | None = None
    ops: tuple[OpCost, ...] = ()
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    numerics: Numerics | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
    log_tail: str | None = None
    conclusive: bool | None = None
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiled: Compiled = "whole"
    estimate_ms: float | None = None
    bound_ms: float | None = None
    record_id: str = dataclasses.field(default_factory=new_id)
    created_at: str = dataclasses.field(default_factory=utc_now)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version={self.schema_version!r}: expected {SCHEMA_VERSION}.")
        has_time = bool(self.time_samples_ms) or self.kernel_time_ms is not None or self.cycles is not None
        if has_time and self.status is not Status.OK:
            raise ValueError(f"status={self.status}: expected no time; only an ok trial has one.")
        if has_time and self.label is None:
            raise ValueError("label=None: expected how the time was got.")
        if self.numerics is not None and not self.numerics.passed and self.status is Status.OK:
            raise ValueError(f"status={self.status}: expected 'wrong', the numerics check failed ({self.numerics}).")
        from tuning.trials.bound import contradiction  # here: it stands on this module

        if has_time and (reason := contradiction(self)):
            raise ValueError(reason)
        if self.conclusive is None:
            object.__setattr__(self, "conclusive", self.status.conclusive)

    @property
    def time_ms(self) -> float | None:
        """Median of the raw samples, None where there are none."""
        return statistics.median(self.time_samples_ms) if self.time_samples_ms else None

    @property
    def key(self) -> str:
        """A text that is equal for trials of the same block sizes and variant."""
        return config_key(self.block_sizes, self.variant)

    @property
    def call(self) -> str:
        """What is called, in one word: the attention's shape, or the sizes of another kernel's workload."""
        return str(self.shape) if self.shape is not None else sizes_text(self.sizes)

    @property
    def tunables(self) -> dict[str, Any]:
        """Block sizes and variant by name, as one mapping."""
        return (dataclasses.asdict(self.block_sizes) if self.block_sizes else {}) | self.variant

    @property
    def config(self) -> str:
        """Block sizes, variant and compiler options in one short string."""
        variant = [f"{name}={value}" for name, value in (self.variant | self.compiler_options).items()]
        return " ".join([*([str(self.block_sizes)] if self.block_sizes else []), *variant])


def objective(trial: Trial) -> float:
    """Return what the search minimises: the time, or the error where a backend gives no time."""
    if trial.time_ms is not None:
        return trial.time_ms
    return trial.numerics.rms_error if trial.numerics is not None else float("inf")


def best_of(trials: Iterable[Trial]) -> Trial | None:
    """Return the fastest ok trial of a whole op, the first of several; None where no time is known."""
    timed = [t for t in trials if t.status is Status.OK and t.time_ms is not None and t.compiled == "whole"]
    return min(timed, key=objective, default=None)


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Return them with the best first, then the others that are ok by time, then the rest by status.

    Estimates of a first pass may say less than the best, which is known by a whole compile, and stand below it.
    """
    trials = list(trials)
    best = best_of(trials)
    return sorted(trials, key=lambda t: (t is not best, t.status is not Status.OK, t.status.value, objective(t), t.key))


def config_key(block_sizes: BlockSizes | None, variant: Mapping[str, Any]) -> str:
    """Return the same string for the same block sizes and variant, in every process."""
    fields = dataclasses.asdict(block_sizes) if block_sizes else {}
    return json.dumps(fields | {"variant": dict(variant)}, sort_keys=True)


def read(path: Path) -> list[Trial]:
    """Return every trial of a file; see `jsonl.read`."""
    return jsonl.read(path, Trial)


def is_exact(variant: Mapping[str, Any]) -> bool:
    """Return whether a variant computes the same attention as the others."""
    return variant.get("qk_dtype") != "int8"


def reusable(trials: Iterable[Trial], timeout_s: float) -> list[Trial]:
    """Return those that need not be made again: the conclusive, and those that ran out of `timeout_s` or more."""
    return [t for t in trials if t.conclusive or (t.status is Status.TIMEOUT and (t.wall_time_s or 0.0) >= timeout_s)]


def read_all(results_dir: Path) -> list[Trial]:
    """Return every trial under a results folder, once each: the folders of several machines may hold the same."""
    return once(trial for path in sorted(results_dir.rglob(TRIALS_FILE)) for trial in read(path))


def once(found: Iterable[Trial]) -> list[Trial]:
    """Return the first of trials that are the same record."""
    return list({trial.record_id: trial for trial in reversed(list(found))}.values())[::-1]
