"""Run jobs on the nodes of a Ray cluster, each there in a worker process of `splash_workbench.workers.pool`."""

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splash_workbench.engines.cluster import Cluster
from splash_workbench.errors import UserError
from splash_workbench.provenance import CACHE_VARIABLE, FLAG_VARIABLES
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import JOBS_PER_WORKER, CancelledError, Outcome, Runner, Variables
from splash_workbench.workers.room import WORKER_BYTES

#: The payload as the driver has it -> as this node needs it. Raises UserError where the node is not fit for the job.
OnNode = Callable[[dict[str, Any]], dict[str, Any]]

#: What decides a figure, and is of the driver on every node. Ray sets the last one to what a task asks for.
_OF_THE_DRIVER = (*FLAG_VARIABLES, "OMP_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class _Answer:
    """What a node made of a job. refusals: why it cannot run any; process: in which it ran."""

    outcome: Outcome | None
    refusals: tuple[str, ...]
    process: tuple[str, int]


class ClusterRunner(Runner):
    """A Runner whose jobs run on the nodes of a cluster; one that is lost with its node is run again elsewhere.

    The nodes keep their worker processes warm, and end them when this process ends, however it does.
    """

    def __init__(self, cluster: Cluster, on_node: OnNode) -> None:
        super().__init__(scratch_dir())
        self._cluster, self._ray = cluster, cluster.ray
        environment = {name: os.environ.get(name) for name in _OF_THE_DRIVER}
        if CACHE_VARIABLE in os.environ:
            environment[CACHE_VARIABLE] = os.environ[CACHE_VARIABLE]
        self._common = self._ray.put((on_node, environment))
        options = cluster.options(WORKER_BYTES)
        retries = cluster.settings.retries
        self._task = self._ray.remote(_run_job).options(max_retries=retries, scheduling_strategy="SPREAD", **options)
        self._refs: dict[Any, float] = {}  # of the jobs that are asked for, and since when
        self._processes: set[tuple[str, int]] = set()

    def run(
        self,
        target: str,
        payload: Mapping[str, Any],
        *,
        timeout_s: float,
        variables: Variables = lambda worker_dir: {},
    ) -> Outcome:
        """Run a job on some node, as `Runner.run`. Raises UserError where a node is not fit for it."""
        with self._lock:
            if self._cancelled:
                raise CancelledError
            self.usage.job_count += 1
            ref = self._task.remote(self._common, target, dict(payload), timeout_s, variables)
            self._refs[ref] = time.monotonic()
        errors = self._ray.exceptions
        try:
            answer: _Answer = self._ray.get(ref)
        except errors.RayTaskError as error:
            if self._cancelled:
                raise CancelledError from error
            cause = str(error.cause or error).strip().splitlines()[-1]
            raise UserError(
                f"engine=ray: a node cannot run jobs ({cause}); expected this package, installed alike, on every node."
            ) from error
        except errors.RayError as error:
            if self._cancelled:
                raise CancelledError from error
            tries = self._cluster.settings.retries + 1
            reason = str(error).strip().splitlines()[0]
            return Outcome(Status.CRASHED, {}, f"lost with its node {tries} time{'s' * (tries > 1)}: {reason}")
        finally:
            with self._lock:
                self._refs.pop(ref, None)
        if answer.outcome is None:
            raise UserError(*answer.refusals)
        with self._lock:
            self._processes.add(answer.process)
            self.usage.worker_count = len(self._processes)
        return answer.outcome

    def stages(self) -> list[tuple[str, float]]:
        """Return how many jobs are asked for, as one stage, and for how long the oldest is."""
        with self._lock:
            asked = list(self._refs.values())
        return [(f"{len(asked)} on the cluster, the oldest", time.monotonic() - min(asked))] if asked else []

    def cancel(self) -> None:
        """End all jobs; every `run`, present and future, raises CancelledError."""
        with self._lock:
            self._cancelled = True
            refs = list(self._refs)
        for ref in refs:
            with contextlib.suppress(Exception):  # it has just ended, or the cluster is gone
                self._ray.cancel(ref, force=True)


def scratch_dir() -> Path:
    """Return the folder of a node in which jobs of all sweeps work; what is in it can be made again."""
    return Path(tempfile.gettempdir()) / f"cogvideox-splash-{os.getuid()}"


_runner: Runner | None = None


def _run_job(
    common: tuple[OnNode, Mapping[str, str | None]],
    target: str,
    payload: dict[str, Any],
    timeout_s: float,
    variables: Variables,
) -> _Answer:
    """Run a job in a worker process of this node: what Ray calls there."""
    global _runner
    import ray

    on_node, environment = common
    process = (ray.get_runtime_context().get_node_id(), os.getpid())
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        payload = on_node(payload)
    except UserError as error:
        return _Answer(None, error.messages, process)
    if _runner is None:  # this process, and so its worker, serves many jobs, one at a time
        _runner = Runner(scratch_dir() / "work", jobs_per_worker=JOBS_PER_WORKER)
    return _Answer(_runner.run(target, payload, timeout_s=timeout_s, variables=variables), (), process)
