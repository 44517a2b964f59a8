"""Make a Trial of a candidate, in a worker process, with a time limit."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splash_attn.types import BlockSizes
from splash_workbench.errors import UserError
from splash_workbench.provenance import KERNEL_SOURCES, Environment, source_hash
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import Outcome, Runner
from tuning.backends.base import Backend, Target
from tuning.kernels import loading
from tuning.trials.records import Compiled, Trial
from tuning.trials.workloads import KernelCall, Workload

#: What the outcome of a job depends on besides the backend's own sources.
_JOB_SOURCES = ("splash_attn/*.py", "tuning/backends/*.py", "tuning/kernels/*.py")
_CACHE_NOTE = "not compiled again: from the cache of an earlier run with the same sources and versions"


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Make Trials of one workload on one device with one backend.

    Attributes:
      context: hash that all trials carry; see Trial.
      timeout_s: limit of one trial.
      measure: fields of tuning.backends.device_times.MeasureSettings.
      cache_dir: where numerics checks are shared between candidates.
      compiler_options: flags of libtpu for every candidate.
      cache: of whole outcomes, for backends that time nothing; None: compile anew.
      source: where the kernel is, see `loading.find`; None: it is one of `loading.KERNELS`.
      bound_ms: see Trial.
    """

    runner: Runner
    workload: Workload | KernelCall
    target: Target
    backend: Backend
    context: str
    environment: Environment
    timeout_s: float
    measure: Mapping[str, Any]
    cache_dir: Path
    cache: JobCache | None = None
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    source: str | None = None
    bound_ms: float | None = None

    def evaluate(
        self,
        block_sizes: BlockSizes | None,
        options: Mapping[str, Any],
        kernel: str = "splash_attn",
        *,
        compiled: Compiled = "whole",
        estimate_ms: float | None = None,
    ) -> Trial:
        """Return the Trial of a candidate, whatever becomes of it.

        options: fields of Variant, or another kernel's tunables; kernel: its name; compiled, estimate_ms: see Trial.

        Raises:
          CancelledError: the runner was cancelled.
          UserError: the kernel's source is no longer what `environment` says, so the trial is worth nothing.
        """
        payload = self.payload(block_sizes, options, kernel, compiled)
        trial = functools.partial(self._trial, block_sizes, options, kernel, estimate_ms)

        def run_job() -> Outcome:
            outcome = self.runner.run(
                self.backend.job,
                payload,
                timeout_s=self.timeout_s,
                variables=functools.partial(self.backend.worker_env, self.target),
            )
            if self._present_hash() != self.environment.kernel_hash:
                sources = loading.file_name(self.source) if self.source else ", ".join(KERNEL_SOURCES)
                raise UserError(f"{sources}: changed while this ran; run the same command again.")
            try:
                trial(outcome)
            except ValueError as error:
                return dataclasses.replace(outcome, status=Status.CRASHED, result={}, error=f"no trial: {error}")
            return outcome

        if self.cache is None or not self.backend.cacheable:
            return trial(run_job())
        key = JobCache.key(self.backend.job, payload | {"cache_dir": None, "kernel": kernel}, self._dependencies)
        outcome, was_there = self.cache.outcome(key, run_job, accept=trial)
        return trial(outcome, *([_CACHE_NOTE] if was_there else []))

    def payload(
        self, block_sizes: BlockSizes | None, options: Mapping[str, Any], kernel: str, compiled: Compiled
    ) -> dict[str, Any]:
        """Return the `jobs.Request` of a candidate, as JSON."""
        return {
            "kernel": self.source or kernel,
            "kernel_hash": self.environment.kernel_hash,
            "shape": dataclasses.asdict(self.workload.shape) if self.workload.shape else None,
            "sizes": dict(self.workload.sizes),
            "dtype": self.workload.dtype,
            "block_sizes": dataclasses.asdict(block_sizes) if block_sizes else None,
            "compiled": compiled,
            "options": dict(options),
            "device": self.target.name,
            "cache_dir": str(self.cache_dir.absolute()),
            "measure": dict(self.measure),
            "compiler_options": dict(self.compiler_options),
        }

    @functools.cached_property
    def _dependencies(self) -> dict[str, Any]:
        """Return what an outcome depends on besides the payload."""
        return {
            "versions": self.environment.versions,
            "flags": self.environment.flags,
            "backend": self.environment.backend_hash,
            "sources": source_hash(_JOB_SOURCES),
        }

    def _present_hash(self) -> str:
        return loading.hash_of(self.source) if self.source else source_hash(KERNEL_SOURCES)

    def _trial(
        self,
        block_sizes: BlockSizes | None,
        options: Mapping[str, Any],
        kernel: str,
        estimate_ms: float | None,
        outcome: Outcome,
        *notes: str,
    ) -> Trial:
        """Return the trial of an outcome. Raises ValueError for a result that makes no trial."""
        known = {
            "context": self.context,
            "kernel": kernel,
            "workload": self.workload.name,
            "shape": self.workload.shape,
            "sizes": dict(self.workload.sizes),
            "bound_ms": self.bound_ms,
            "dtype": self.workload.dtype,
            "device": self.target.name,
            "device_kind": self.target.device_kind,
            "backend": self.backend.name,
            "block_sizes": block_sizes,
            "variant": dict(options),
            "compiler_options": dict(self.compiler_options),
            "status": outcome.status,
            "environment": self.environment,
            "wall_time_s": outcome.wall_time_s,
            "estimate_ms": estimate_ms if outcome.status is Status.OK else None,
            "error": outcome.error,
            "log_tail": None if outcome.status is Status.OK else outcome.log_tail,
        }
        trial = decode(outcome.result | known, Trial)
        if trial.status is Status.OK and (trial.numerics is None or (self.backend.timed and trial.time_ms is None)):
            raise ValueError("an ok trial: expected a check of its numerics and a time, got less.")
        return dataclasses.replace(trial, notes=(*trial.notes, *notes))
