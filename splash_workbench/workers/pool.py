"""Run jobs in worker processes that stay warm from one job to the next. A bad job ends its worker, and no other."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from splash_workbench.files import user_path
from splash_workbench.provenance import REPO_ROOT
from splash_workbench.trial_status import Status

#: Folder of a worker -> environment variables to add to this process's own.
Variables = Callable[[Path], Mapping[str, str]]
#: Jobs that share the start of a process, imports included, where there are many of one kind.
JOBS_PER_WORKER = 100

_LOG_TAIL_CHARACTERS = 4000
_LAST_WORDS_CHARACTERS = 300
#: Lines that glog and abseil end a process with; and lines that are not frames of a stack.
_FATAL = re.compile(r"F\d{4}\s|ERROR: |terminate called|Fatal Python error")
_SAYS_SOMETHING = re.compile(r"^(?!\s*(@\s+0x|\*\*\*|File \")).*\w")
#: Seconds that a killed process group has to disappear.
_REAP_S = 30
#: Seconds between two looks at what a running job takes.
_SAMPLE_S = 0.5
#: A worker that holds more than this after a job is replaced.
_RETIRE_RSS_BYTES = 5 * 2**29
#: Of what it held after its first job: CUDA's libraries alone take more than that.
_RETIRE_GROWTH = 1.25


class CancelledError(Exception):
    """The runner is stopping: the job was killed and has no outcome."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a job ended, its result (empty if there is none), and the end of what it printed."""

    status: Status
    result: dict[str, Any]
    error: str | None
    log_tail: str = ""
    wall_time_s: float = 0.0


@dataclasses.dataclass
class Usage:
    """The resources that the jobs of a runner took. Memory and disk are looked at twice a second.

    Attributes:
      job_count, worker_count: jobs run, and processes started for them.
      peak_memory_bytes: most that all workers held at once (resident, shared pages counted in each); 0 where /proc does
        not say.
      peak_disk_bytes: most that the jobs' scratch folders held at once.
    """

    job_count: int = 0
    worker_count: int = 0
    peak_memory_bytes: int = 0
    peak_disk_bytes: int = 0


class Runner:
    """A pool of worker processes that any number of threads give jobs, until it is cancelled.

    A worker that crashes, is killed for its time limit, raises what its job did not foresee, or has grown past 2.5 GiB
    and a quarter over what it held after its first job, is replaced. It serves only jobs that ask for the environment
    that it was started with. Its folder in `work_dir` is gone with it.

    jobs_per_worker: jobs after which a worker is replaced. 1: each job has a process of its own, and none is left.
    More: call `cancel` in the end.
    """

    def __init__(self, work_dir: Path, *, jobs_per_worker: int = 1) -> None:
        self._work_dir = work_dir
        self._jobs_per_worker = jobs_per_worker
        self._lock = threading.Lock()
        self._running: set[_Worker] = set()
        self._idle: list[_Worker] = []
        self._cancelled = False
        self.usage = Usage()

    def run(
        self,
        target: str,
        payload: Mapping[str, Any],
        *,
        timeout_s: float,
        variables: Variables = lambda worker_dir: {},
    ) -> Outcome:
        """Run "package.module:function" on a JSON payload, again in a fresh process if it crashes in a used one.

        After `timeout_s` its whole process group is killed. Raises CancelledError once `cancel` was called.
        """
        with self._lock:
            self.usage.job_count += 1
        for fresh in (False, True):
            worker = self._take(variables, fresh=fresh)
            reusable = False
            try:
                outcome, reusable = worker.run(target, payload, timeout_s, self._sample)
            finally:
                self._give_back(worker, reusable)
            if self._cancelled:
                raise CancelledError
            # An earlier job may have done the damage: only a process of its own says what this one is like.
            if outcome.status is not Status.CRASHED or worker.job_count == 1:
                break
        return outcome

    def stages(self) -> list[tuple[str, float]]:
        """Return what each job that runs is at, and for how many seconds."""
        with self._lock:
            found = [worker.stage for worker in self._running]
        return [(stage, time.monotonic() - since) for stage, since in found]

    def cancel(self) -> None:
        """End all workers; every `run`, present and future, raises CancelledError."""
        with self._lock:
            self._cancelled = True
            for worker in self._running:
                worker.kill()
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()

    def _take(self, variables: Variables, *, fresh: bool) -> "_Worker":
        """Return an idle worker with the environment that the job wants, or a new one in place of an idle one."""
        search_path = [str(REPO_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        common = os.environ | {"PYTHONPATH": os.pathsep.join(search_path)}
        kind = frozenset((common | dict(variables(Path("worker")))).items())
        with contextlib.ExitStack() as after, self._lock:
            if self._cancelled:
                raise CancelledError
            for worker in self._idle if not fresh else ():
                if worker.kind == kind:
                    self._idle.remove(worker)
                    self._running.add(worker)
                    return worker
            if self._idle:
                after.callback(self._idle.pop(0).end)  # once the lock is free
            self._work_dir.mkdir(parents=True, exist_ok=True)
            directory = Path(tempfile.mkdtemp(dir=self._work_dir))
            worker = _Worker(directory, kind, common | dict(variables(directory)))
            self.usage.worker_count += 1
            self._running.add(worker)
            return worker

    def _give_back(self, worker: "_Worker", reusable: bool) -> None:
        with self._lock:
            self._running.discard(worker)
            if reusable and worker.job_count < self._jobs_per_worker and not self._cancelled:
                self._idle.append(worker)
                return
        worker.end()

    def _sample(self) -> None:
        with self._lock:
            workers = [*self._running, *self._idle]
        memory, disk = sum(worker.rss_bytes() for worker in workers), _size_bytes(self._work_dir)
        with self._lock:
            self.usage.peak_memory_bytes = max(self.usage.peak_memory_bytes, memory)
            self.usage.peak_disk_bytes = max(self.usage.peak_disk_bytes, disk)


class _Worker:
    """One process of `worker` and its folder. `kill` may come from any thread, the rest from one at a time."""

    def __init__(self, directory: Path, kind: frozenset[tuple[str, str]], environment: Mapping[str, str]) -> None:
        self.kind = kind
        self.job_count = 0
        #: What the job that runs is at, and since when on the monotonic clock.
        self.stage = ("start", time.monotonic())
        self._directory, self._log_path = directory, directory / "log"
        self._limit_bytes = _RETIRE_RSS_BYTES
        # The worker ends when the other end of this closes: when this process does, however this process ends.
        self._connection, theirs = multiprocessing.Pipe()
        command = [sys.executable, "-m", "splash_workbench.workers.worker", str(directory), str(theirs.fileno())]
        with theirs, self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                pass_fds=(theirs.fileno(),),
            )

    def run(
        self, target: str, payload: Mapping[str, Any], timeout_s: float, sample: Callable[[], None]
    ) -> tuple[Outcome, bool]:
        """Return the outcome of a job, and whether the worker can take another one."""
        self.job_count += 1
        self.stage = ("start" if self.job_count == 1 else "begin", time.monotonic())
        os.truncate(self._log_path, 0)  # it is open for appending: what comes next stands at the start
        start = time.monotonic()
        result: dict[str, Any] = {}
        try:
            request = {"number": self.job_count, "target": target, "payload": payload, "timeout_s": timeout_s}
            self._connection.send_bytes(json.dumps(request).encode())
            while True:
                if self._connection.poll(max(0.0, min(_SAMPLE_S, start + timeout_s - time.monotonic()))):
                    result = json.loads(self._connection.recv_bytes())
                    if set(result) != {"stage"}:
                        if result.pop("number") != self.job_count:
                            status, error, result = Status.CRASHED, "the worker answered another job", {}
                            break
                        status, error = Status(result.pop("status")), result.pop("error", None)
                        break
                    self.stage, result = (result["stage"], time.monotonic()), {}
                sample()
                if time.monotonic() >= start + timeout_s:
                    status = Status.TIMEOUT
                    error = f"killed after the time limit of {timeout_s:g} s, at: {self.stage[0]}"
                    break
        except (EOFError, OSError):  # it closed its end: it is dead, or about to be
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_REAP_S)
            log = self._log_path.read_text(errors="replace")
            status, error = Status.CRASHED, _describe_exit(self._process.returncode) + _last_words(log)
        sample()
        held = self.rss_bytes()
        if self.job_count == 1:
            self._limit_bytes = max(_RETIRE_RSS_BYTES, int(_RETIRE_GROWTH * held))
        reusable = status not in (Status.TIMEOUT, Status.CRASHED) and held <= self._limit_bytes
        if not reusable:
            self.kill()
        cause = _scrub(error, self._directory) if error else None
        log_tail = _scrub(self._log_path.read_text(errors="replace")[-_LOG_TAIL_CHARACTERS:], self._directory)
        return Outcome(status, result, cause, log_tail, time.monotonic() - start), reusable

    def rss_bytes(self) -> int:
        """Return the resident memory of the process; 0 if it is dead, or the system does not say."""
        try:
            pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return pages * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        """Kill the process group: what the job has started ends too."""
        if self._process.returncode is None:  # not waited for yet: its process id is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process group and remove the folder."""
        self.kill()
        self._process.wait(_REAP_S)
        self._connection.close()
        shutil.rmtree(self._directory, ignore_errors=True)


def _size_bytes(directory: Path) -> int:
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # a job clears up meanwhile
                total += os.stat(os.path.join(folder, name)).st_size
    return total


def _describe_exit(return_code: int | None) -> str:
    if return_code is None:
        return "the worker stopped answering"
    if return_code < 0:
        hint = " (out of host memory?)" if -return_code == signal.SIGKILL else ""
        return f"the worker died of {signal.Signals(-return_code).name}{hint}"
    return f"the worker ended with exit code {return_code} and no result"


def _last_words(log: str) -> str:
    """Return ": " and the line of a log that says why the process ended; "" where it said nothing."""
    lines = [line.strip() for line in log.splitlines() if _SAYS_SOMETHING.search(line)]
    fatal = [line for line in lines if _FATAL.match(line)]
    return f": {(fatal or lines)[-1][:_LAST_WORDS_CHARACTERS]}" if lines else ""


def _scrub(text: str, directory: Path) -> str:
    """Return a text that can be written anywhere, without the paths of this machine: results are shared."""
    stdlib = sysconfig.get_path("stdlib")  # which is not below the prefix of a virtual environment
    names = {directory: "JOB", sys.prefix: "PREFIX", stdlib: "STDLIB", REPO_ROOT: "REPO", user_path("~"): "HOME"}
    for path, name in names.items():
        text = text.replace(str(path), name)
    return text.encode(errors="backslashreplace").decode()
