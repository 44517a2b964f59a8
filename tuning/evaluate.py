"""One candidate -> one Trial, in a worker process of its own, with a time limit."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splash_attn.device import DeviceSpec
from splash_attn.types import BlockSizes
from tuning import offline
from tuning.cli import UserError
from tuning.environment import KERNEL_SOURCES, REPO_ROOT, Environment, source_hash
from tuning.records import Numerics, Trial
from tuning.status import Label, Status
from tuning.workloads import Workload

_LOG_TAIL_CHARACTERS = 4000
#: Seconds that a killed process group has to disappear.
_REAP_S = 30

#: Backend -> the job that its workers run.
JOBS = {
    "offline": "tuning.jobs:offline",
    "measure": "tuning.jobs:measured",
    "interpret": "tuning.jobs:interpret",
}


class CancelledError(Exception):
    """The sweep is stopping: the job was killed and has no outcome."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a trial is about.

    Attributes:
      name: as on the command line, e.g. "v6e" or "local".
      device_kind: as JAX says it.
      spec: its figures; None for a device that is only measured.
    """

    name: str
    device_kind: str
    spec: DeviceSpec | None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a job left: its result (None if it ended without one), how it ended, and the end of what it printed."""

    status: Status
    result: dict[str, Any]
    error: str | None
    log_tail: str
    wall_time_s: float


class Runner:
    """Runs jobs in processes of their own, from any number of threads, until cancelled.

    Args:
      work_dir: scratch folder; each job has its own folder in it, gone when the job is over.
    """

    def __init__(self, work_dir: Path) -> None:
        self._work_dir = work_dir
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._cancelled = False

    def run(
        self,
        target: str,
        payload: Mapping[str, Any],
        *,
        timeout_s: float,
        variables: Callable[[Path], Mapping[str, str]] = lambda job_dir: {},
    ) -> Outcome:
        """Runs "package.module:function" on the payload.

        Args:
          target: the job.
          payload: its argument, JSON.
          timeout_s: its whole process group is killed after this.
          variables: folder of the job -> environment variables to add to this process's own.

        Raises:
          CancelledError: `cancel` was called.
        """
        self._work_dir.mkdir(parents=True, exist_ok=True)
        job_dir = Path(tempfile.mkdtemp(dir=self._work_dir))
        try:
            return self._run_in(job_dir, target, payload, timeout_s, variables(job_dir))
        finally:
            shutil.rmtree(job_dir)

    def cancel(self) -> None:
        """Kills what runs; every `run`, present and future, raises CancelledError."""
        with self._lock:
            self._cancelled = True
            for process in self._running:
                _kill_group(process)

    def _run_in(
        self,
        job_dir: Path,
        target: str,
        payload: Mapping[str, Any],
        timeout_s: float,
        variables: Mapping[str, str],
    ) -> Outcome:
        request_path, result_path, log_path = job_dir / "request.json", job_dir / "result.json", job_dir / "log"
        request_path.write_text(json.dumps({"target": target, "payload": payload, "timeout_s": timeout_s}))
        search_path = [str(REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(search_path), **variables}
        command = [sys.executable, "-m", "tuning.worker", str(request_path), str(result_path)]
        start = time.monotonic()
        timed_out = False
        with log_path.open("wb") as log:
            with self._lock:
                if self._cancelled:
                    raise CancelledError
                # The worker watches its stdin: it ends when this process does, however this process ends.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
                )
                self._running.add(process)
            try:
                process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                timed_out = True
            finally:
                _kill_group(process)
                process.wait(_REAP_S)
                assert process.stdin is not None
                process.stdin.close()
                with self._lock:
                    self._running.discard(process)
        if self._cancelled:
            raise CancelledError
        wall_time_s = time.monotonic() - start
        log_tail = _scrub(log_path.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:], job_dir)
        if timed_out:
            error = f"killed after the time limit of {timeout_s:g} s"
            return Outcome(Status.TIMEOUT, {}, error, log_tail, wall_time_s)
        if not result_path.exists():
            return Outcome(Status.CRASHED, {}, _describe_exit(process.returncode), log_tail, wall_time_s)
        result = json.loads(result_path.read_text())
        status, error = Status(result.pop("status")), result.pop("error", None)
        return Outcome(status, result, _scrub(error, job_dir) if error else None, log_tail, wall_time_s)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Makes Trials of one workload on one device with one backend.

    Attributes:
      runner: where the jobs run.
      job: what a worker runs; see JOBS.
      context: hash that all trials carry; see Trial.
      timeout_s: limit of one trial.
      measure: fields of tuning.measure.MeasureSettings.
      cache_dir: where numerics checks are shared between candidates.
    """

    runner: Runner
    workload: Workload
    target: Target
    backend: str
    job: str
    context: str
    environment: Environment
    timeout_s: float
    measure: Mapping[str, Any]
    cache_dir: Path

    def evaluate(self, block_sizes: BlockSizes, options: Mapping[str, Any], kernel: str = "splash_attn") -> Trial:
        """The Trial of a candidate, whatever becomes of it.

        Args:
          block_sizes: of the kernel.
          options: fields of Variant, or a peer's own.
          kernel: one of tuning.kernels.KERNELS.

        Raises:
          CancelledError: the runner was cancelled.
          cli.UserError: the kernel's source is no longer what `environment` says, so the trial is worth nothing.
        """
        payload = {
            "kernel": kernel,
            "kernel_hash": self.environment.kernel_hash,
            "shape": dataclasses.asdict(self.workload.shape),
            "dtype": self.workload.dtype,
            "block_sizes": dataclasses.asdict(block_sizes),
            "options": dict(options),
            "device": self.target.name,
            "cache_dir": str(self.cache_dir.absolute()),
            "measure": dict(self.measure),
        }
        outcome = self.runner.run(self.job, payload, timeout_s=self.timeout_s, variables=self._variables)
        if source_hash(KERNEL_SOURCES) != self.environment.kernel_hash:
            raise UserError(f"{', '.join(KERNEL_SOURCES)}: changed while this ran; run the same command again.")
        return self._trial(block_sizes, options, kernel, outcome)

    def _variables(self, job_dir: Path) -> Mapping[str, str]:
        if self.backend == "offline":
            assert self.target.spec is not None
            return offline.worker_environment(self.target.spec, job_dir / "dump")
        if self.backend == "interpret":
            return {"JAX_PLATFORMS": "cpu"}
        return {}

    def _trial(self, block_sizes: BlockSizes, options: Mapping[str, Any], kernel: str, outcome: Outcome) -> Trial:
        found = dict(outcome.result)
        numerics = found.pop("numerics", None)
        label = found.pop("label", None)
        failed = outcome.status is not Status.OK
        return Trial(
            context=self.context,
            kernel=kernel,
            workload=self.workload.name,
            shape=self.workload.shape,
            dtype=self.workload.dtype,
            device=self.target.name,
            device_kind=self.target.device_kind,
            backend=self.backend,
            block_sizes=block_sizes,
            variant=dict(options),
            status=outcome.status,
            environment=self.environment,
            label=Label(label) if label else None,
            time_samples_ms=tuple(found.pop("time_samples_ms", ())),
            ops=tuple(found.pop("ops", ())),
            notes=tuple(found.pop("notes", ())),
            numerics=Numerics(**numerics) if numerics else None,
            wall_time_s=outcome.wall_time_s,
            error=outcome.error,
            log_tail=outcome.log_tail if failed else None,
            **found,
        )


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    if process.returncode is None:  # not waited for yet: its process id is still its own
        os.killpg(process.pid, signal.SIGKILL)


def _describe_exit(return_code: int) -> str:
    if return_code < 0:
        hint = " (out of host memory?)" if -return_code == signal.SIGKILL else ""
        return f"the worker died of {signal.Signals(-return_code).name}{hint}"
    return f"the worker ended with exit code {return_code} and no result"


def _scrub(text: str, job_dir: Path) -> str:
    """Results are shared: they name no path of this machine."""
    for path, name in ((job_dir, "JOB"), (Path(sys.prefix), "PREFIX"), (REPO_ROOT, "REPO"), (Path.home(), "HOME")):
        text = text.replace(str(path), name)
    return text
