"""A slice: a process on a node that makes lines of a batch, one at a time, with what it has loaded. Imports no Ray.

`pipeline.runs.fleet` starts slices, and hands the lines out. All of them see the folder of the batch's outputs.
"""

import hashlib
import json
import os
import socket
import threading

from pipeline.model.step_options import entry_hashes
from pipeline.requests.request import Stage
from pipeline.runs.batch import Batch, prepare
from pipeline.runs.messages import Done, Job, Ready
from pipeline.runs.records import PACKAGES, devices
from pipeline.stages.progress import Interrupted, StageEvent
from splash_workbench.compile_cache import use_compilation_cache
from splash_workbench.errors import UserError
from splash_workbench.provenance import package_versions


class Slice:
    """The slice in its own process. `where` and `stop` may come from another thread while `work` runs."""

    def __init__(self, job: Job) -> None:
        self._job, self._where = job, "starting"
        self._stop: int | None = None
        self._working = threading.Lock()
        if job.omp_threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        if job.folder.is_dir():
            os.chdir(job.folder)

    def prepare(self) -> Ready:
        """Check all lines, before any work."""
        job, host = self._job, socket.gethostname()
        if not (job.output_dir / job.marker).exists():
            return Ready(
                host, (f"output_dir={job.output_dir}: node {host} does not see it; expected storage that all share",)
            )
        if job.compilation_cache:
            use_compilation_cache()
        try:
            items = prepare(job.entries, job.path, job.stages, job.output_dir, job.run_options, job.cache_dir)
        except UserError as error:
            return Ready(host, error.messages)
        self._batch = Batch(items, None, self._note)
        finished = tuple(item.run.finished() for item in items)
        last = job.stages[-1] if "denoise" not in job.stages else "denoise"
        keys = [item.run.loaded_keys[last] for item in items]
        here = str(devices())
        described = [item.run.described for item in items]
        text = json.dumps([described, here, package_versions(PACKAGES), entry_hashes()], sort_keys=True)
        groups = tuple(keys.index(key) for key in keys)
        return Ready(host, (), finished, groups, here, hashlib.sha256(text.encode()).hexdigest())

    def work(self, index: int, stages: tuple[Stage, ...]) -> Done:
        """Run stages of a line that are not done. One that fails leaves an error.json, as in any batch."""
        item = self._batch.items[index]
        before, self._where = item.time_s, "beginning"
        try:
            with self._working, item.run.locked():
                self._batch.run_one(item, stages)
        except Interrupted:
            return Done("interrupted", None, None, item.time_s - before)
        except UserError as error:  # another process is at work on this line
            return Done("failed", str(error), None, item.time_s - before)
        finally:
            self._where = "idle"
        return Done(item.status, item.error, item.result, item.time_s - before)

    def where(self) -> str:
        """Return what it is at, in words."""
        return self._where

    def stop(self, signal_number: int) -> None:
        """End `work` after the step that runs, whose state is saved; return when it has ended."""
        self._stop = signal_number
        with self._working:
            pass

    def _note(self, event: StageEvent) -> None:
        steps = f" {event.step}/{event.total_steps}" if event.total_steps > 1 else ""
        self._where = f"{event.stage}{steps}" if event.phase == "run" else f"{event.stage} {event.phase}"
        if self._stop is not None and event.phase == "run":
            raise Interrupted(self._stop, between_steps=True, everywhere=True)
