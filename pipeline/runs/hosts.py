"""Several hosts run one command: they meet, watch over one another, and end together.

Each process tells the others, through JAX's coordination service in process 0, that it is alive and where it is. One
that fails says why; one that is lost falls silent. Whoever notices ends itself, in whatever it waits for. Where process
0 itself is killed, JAX ends the others at once, with a message of its own.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from pipeline.model.placement import arrays_read, from_first_process
from pipeline.requests.errors import RequestError
from pipeline.requests.options import DistributedOptions
from splash_workbench.errors import UserError
from splash_workbench.startup import sigterm_ends

#: A process that was silent for so long is lost. Those that are left end within twice the time.
_LOST_S = 25.0
_BEAT_S = 1.0
#: How long process 0, which passes the messages on, stays until all have read why they end.
_LAST_WORDS_S = 10.0
_EXIT_FAILED = 1
_runs = itertools.count()
_joined = threading.Event()


def join(options: DistributedOptions) -> None:
    """Meet the other processes. Before JAX starts its backends, once; later calls do nothing.

    Raises RequestError, which names this process and its host, where they do not meet, or cannot be found.
    """
    if _joined.is_set():
        return
    here = f"distributed: {_name(options.process_id, socket.gethostname())}"
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, see pipeline.terminal
    try:
        with sigterm_ends():
            jax.distributed.initialize(
                options.coordinator,
                options.num_processes,
                options.process_id,
                initialization_timeout=round(options.timeout_s),
            )
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError is a RuntimeError
        reason = str(error).strip().splitlines()[0]
        if options.coordinator is None:
            raise RequestError(
                f"{here}: JAX finds no other hosts by itself ({reason}); give distributed.coordinator=HOST:PORT, "
                "distributed.num_processes and distributed.process_id"
            ) from error
        raise RequestError(
            f"{here} has not met the other {(options.num_processes or 1) - 1} at {options.coordinator} within "
            f"{options.timeout_s:g} s ({reason}); is the same command running on every host?"
        ) from error
    _joined.set()


@dataclasses.dataclass
class _State:
    """A process as the others see it.

    events: how many it has told of. arrays_read: see there. where: the last event, in words. failed: why it ends, and
    who is to blame.
    """

    host: str
    beat: int = 0
    events: int = 0
    arrays_read: int = 0
    where: str = "before the first stage"
    failed: str | None = None
    exit_code: int = 0

    @property
    def progress(self) -> tuple[int, int]:
        return self.events, self.arrays_read


class Hosts:
    """Watch over the processes that have met, in the block; each ends by itself where another fails.

    A process that ends so has printed one line that names the process and host that is to blame. What is saved by then
    can be resumed. timeout_s: how long it may stay in one phase or step.
    """

    def __init__(self, timeout_s: float):
        from jax._src import distributed  # its key-value store has no public name

        self._client: Any = distributed.global_state.client
        self._timeout_s, self._run = timeout_s, next(_runs)
        self._index, self._count = jax.process_index(), jax.process_count()
        self._mine = _State(socket.gethostname())
        self._stop, self._lock = threading.Event(), threading.Lock()
        self._seen: dict[int, tuple[_State, float]] = {}  # as last seen, and when it last changed
        self._since = time.monotonic()  # this process's last event
        self._thread = threading.Thread(target=self._watch, name="hosts", daemon=True)

    def introduction(self) -> str:
        """Return a line that says which process this is, and which one shows the rest. All processes must call it."""
        first = from_first_process(self._mine.host.encode()).decode()
        rest = "" if self.is_first else f"; {_name(0, first)} writes and shows the rest"
        return f"{_name(self._index, self._mine.host)}, of {self._count}{rest}"

    @property
    def is_first(self) -> bool:
        """Return whether this process writes and prints for all."""
        return self._index == 0

    def note(self, where: str) -> None:
        """Tell the others where this process is. Every process notes the same, in the same order."""
        self._mine.where, self._since = where, time.monotonic()
        self._mine.events += 1

    def agree_on_signal(self, pending: int | None) -> int | None:
        """Return the signal that this or another process has got, None without one. All processes must call it."""
        found = int(multihost_utils.process_allgather(np.int32(pending or 0)).max())
        return found or None

    def __enter__(self) -> "Hosts":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            # Perhaps a connection that another process has left: the watch soon knows which, and ends this process.
            self._thread.join(_LOST_S + 4 * _BEAT_S)
        elif error is None:
            self.note("at the end")
            self._client.wait_at_barrier(f"done-{self._run}", round(self._timeout_s * 1000))
        self._stop.set()
        if error is None or getattr(error, "everywhere", False):
            return
        lines = error.messages if isinstance(error, UserError) else (f"{type(error).__name__}: {error}".rstrip(": "),)
        self._mine.failed = f"{_name(self._index, self._mine.host)} failed: {'; '.join(lines).splitlines()[0]}"
        self._mine.exit_code = 128 + getattr(error, "signal_number", 0) if isinstance(error, KeyboardInterrupt) else 1
        self._say_last_words()

    def _watch(self) -> None:
        silent_since = time.monotonic()
        while not self._stop.wait(_BEAT_S):
            try:
                self._tell()
                states = self._states()
                silent_since = time.monotonic()
            except jax.errors.JaxRuntimeError as error:
                if time.monotonic() - silent_since > 3 * _BEAT_S and not self._stop.is_set():
                    first = self._seen.get(0)
                    who = _name(0, first[0].host if first else None)
                    self._end(f"{who} no longer answers ({str(error).splitlines()[0]})", _EXIT_FAILED)
                continue
            self._look_at(states)

    def _look_at(self, states: dict[int, _State]) -> None:
        now = time.monotonic()
        for index, state in states.items():
            before = self._seen.get(index)
            if before is None or before[0].beat != state.beat:
                self._seen[index] = state, now
        for index, (state, changed) in self._seen.items():
            who = _name(index, state.host)
            if index == self._index:
                continue
            if state.failed is not None:
                self._end(state.failed, state.exit_code)
            if now - changed > _LOST_S:
                self._end(f"{who} is lost: no sign of life for {_LOST_S:g} s, last {state.where}", _EXIT_FAILED)
        if now - self._since > self._timeout_s:
            behind = min(state.progress for state in states.values())
            late = [_name(i, state.host) for i, state in states.items() if state.progress == behind]
            who = "every process" if len(late) == self._count else ", ".join(late)
            where = next(state.where for state in states.values() if state.progress == behind)
            self._end(
                f"{who} has not gone on for {self._timeout_s:g} s (distributed.timeout_s) {where}; "
                f"noticed by {_name(self._index, self._mine.host)}",
                _EXIT_FAILED,
            )

    def _end(self, message: str, exit_code: int) -> NoReturn:
        """End this process, whose main thread may wait for a process that is gone and cannot be woken."""
        print(f"error: {message}; the same command on every host goes on from what is saved", file=sys.stderr)
        self._mine.failed, self._mine.exit_code = self._mine.failed or message, exit_code
        with contextlib.suppress(BaseException):
            self._say_last_words()
        _leave(exit_code or _EXIT_FAILED)

    def _say_last_words(self) -> None:
        """Tell the others that this process ends; the first one stays until they have read why."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._tell()
            deadline = time.monotonic() + _LAST_WORDS_S
            while self.is_first and time.monotonic() < deadline and not self._all_others_end():
                time.sleep(_BEAT_S / 4)

    def _all_others_end(self) -> bool:
        others = {index: state for index, state in self._states().items() if index != self._index}
        return all(state.failed is not None for state in others.values())

    def _tell(self) -> None:
        with self._lock:
            self._mine.beat += 1
            self._mine.arrays_read = arrays_read()
            text = json.dumps(dataclasses.asdict(self._mine))
            self._client.key_value_set(f"hosts/{self._run}/{self._index}", text, allow_overwrite=True)

    def _states(self) -> dict[int, _State]:
        found = self._client.key_value_dir_get(f"hosts/{self._run}/")
        return {int(key.rpartition("/")[2]): _State(**json.loads(text)) for key, text in found}


def check_same(described: Any) -> None:
    """Raise RequestError on every process unless all have described the same, as they must to work together.

    described: requests, weights and tuned entries; JSON-able. All processes must call it.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).digest()
    different = np.array(digest != from_first_process(digest))
    found = np.flatnonzero(multihost_utils.process_allgather(different))
    if len(found):
        raise RequestError(
            f"process {', '.join(map(str, found))} of {jax.process_count()} has another request, other weights or "
            "other tuned entries than process 0; expected the same command and the same files on every host"
        )


@contextlib.contextmanager
def _quiet() -> Any:
    """Print nothing to stdout in the block, and log errors only: the first process does for all."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def together(options: DistributedOptions | None) -> Any:
    """Meet the other processes, and yield the Hosts that are watched over in the block; None for one host.

    Processes other than the first print nothing in it but errors. Raises RequestError, see `join`.
    """
    if options is None:
        yield None
        return
    join(options)
    hosts = Hosts(options.timeout_s)
    print(hosts.introduction(), file=sys.stderr, flush=True)
    with hosts, contextlib.nullcontext() if hosts.is_first else _quiet():
        yield hosts


def end_with(main: Callable[[], int]) -> int:
    """Return the exit code of a command; one of several processes that failed ends here.

    JAX would wait at exit for the others, which may be gone.
    """
    try:
        code = main()
    except Exception:
        if not _joined.is_set():
            raise
        traceback.print_exc()
        code = _EXIT_FAILED
    if code and _joined.is_set():
        _leave(code)
    return code


def _leave(exit_code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)


def _name(index: int | None, host: str | None) -> str:
    which = "this process" if index is None else f"process {index}"
    return f"{which} on {host}" if host else which
