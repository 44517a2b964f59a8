"""One study that several sweeps work on, each started by itself: who lives, who has which candidate, all their records.

A candidate is claimed before it is evaluated. Optuna numbers trials, but two sweeps may propose the same candidate at
once; so a claim is first wanted, then held: of two that are wanted the higher number withdraws, and the lower waits
until it has (Lamport's bakery). Optuna's own heartbeats are no help: they are of databases, and of `study.optimize`.
"""

import contextlib
import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, OperationalError

from splash_workbench.errors import UserError
from splash_workbench.files import require_writable_file
from splash_workbench.records import jsonl
from splash_workbench.records.base import new_id
from tuning.trials.records import Trial

#: How often a sweep says that it lives, and after which silence another takes it for dead. By the other's own clock.
BEAT_S, LOST_S = 10.0, 60.0
_POLL_S = 0.2
_BLOCK_BYTES = 2**16
_KEY, _SWEEP, _HELD, _RECORD = "key", "sweep", "held", "record"
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def open_storage(url: str) -> BaseStorage:
    """Open the storage of a shared study.

    url: redis://..., of a database as SQLAlchemy has it (postgresql+psycopg://user@host/name), or a file on a file
    system that all sweeps share, which is Optuna's journal. Raises UserError where it, or its driver, is not there.
    """
    option = f"search.storage={shown(url)}"
    try:
        if url.startswith(("redis://", "rediss://")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return _open_redis(url, option)
        if "://" in url:
            return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})
        require_writable_file(option, Path(url))
        Path(url).parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(_Journal(Path(url)))
    except ImportError as error:
        raise UserError(f"{option}: its driver is not installed ({error}); install the extra cluster.") from error
    except ArgumentError as error:
        raise UserError(f"{option}: expected a file, redis://... or the URL of a database ({error}).") from error
    except OperationalError as error:
        # Of PostgreSQL several lines, with host, port and what to check.
        reason = str(error.orig).strip().splitlines()[0]
        raise UserError(
            f"{option}: the database does not answer ({reason}); start it, or check host and port."
        ) from error


def _open_redis(url: str, option: str) -> BaseStorage:
    from redis.exceptions import RedisError  # after Optuna's own import, which says what is missing

    try:
        return JournalStorage(JournalRedisBackend(url))
    except RedisError as error:
        raise UserError(f"{option}: Redis does not answer ({error}); start it, or check host and port.") from error


class _Journal(JournalFileBackend):
    """Optuna's journal, which a line that a killed sweep tore does not end: the next to write removes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._writers = path, JournalFileSymlinkLock(str(path))
        super().__init__(str(path), self._writers)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._writers.acquire()
        try:
            with self._path.open("rb+") as file:
                _remove_torn_line(file)
        finally:
            self._writers.release()
        super().append_logs(logs)


def _remove_torn_line(file: BinaryIO) -> None:
    """Cut a file behind its last newline."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        if found := file.read(end - start).rfind(b"\n") + 1:
            end = start + found
            break
        end = start
    if end < size:
        file.truncate(end)


def shown(url: str) -> str:
    """Return a URL as it may be printed: without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True) if "://" in url else url
    except ArgumentError:
        return url.rpartition("@")[2]


class SharedStudy:
    """A sweep's share in a study that others work on, too; call `close` at the end."""

    def __init__(self, study: optuna.Study) -> None:
        self._study, self._name = study, new_id()
        self._attribute = f"beat:{self._name}"
        self._changed: dict[str, tuple[int, float]] = {}  # sweep -> its last beat, and when it was seen to change
        self._decoded: dict[int, Trial] = {}
        self._stop = threading.Event()
        study.set_user_attr(self._attribute, 0)
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop saying that this sweep lives, and leave to others what it was at."""
        self._stop.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # else they wait until it is taken for dead
            for trial in self._claims():
                if trial.state is TrialState.RUNNING and trial.user_attrs[_SWEEP] == self._name:
                    self._study.tell(trial.number, state=TrialState.FAIL)

    def claim(self, trial: optuna.trial.Trial, key: str) -> bool:
        """Return whether a trial's candidate is this sweep's to evaluate: no sweep has it, had it, or will have it."""
        trial.set_user_attr(_SWEEP, self._name)
        trial.set_user_attr(_KEY, key)
        while True:
            others = [t for t in self._claims() if t.number != trial.number and t.user_attrs[_KEY] == key]
            if any(t.number < trial.number or t.user_attrs.get(_HELD) or t.state in _FINISHED for t in others):
                return False
            if not others:
                trial.set_user_attr(_HELD, True)
                return True
            self._release_the_dead()
            time.sleep(_POLL_S)

    def publish(self, trial: optuna.trial.Trial, record: Trial) -> None:
        """Give a record to the other sweeps."""
        trial.set_user_attr(_RECORD, jsonl.encode(record))

    def look(self) -> tuple[dict[str, Trial], set[str]]:
        """Return all sweeps' records by candidate's key, and the keys that others are at; frees what the dead had."""
        self._release_the_dead()
        records: dict[str, Trial] = {}
        taken: set[str] = set()
        for trial in self._claims():
            key = trial.user_attrs[_KEY]
            if trial.state in _FINISHED:
                records[key] = self._record_of(trial)
            elif trial.user_attrs[_SWEEP] != self._name:
                taken.add(key)
        return records, taken - records.keys()

    def _record_of(self, trial: FrozenTrial) -> Trial:
        if trial.number not in self._decoded:
            self._decoded[trial.number] = jsonl.decode(trial.user_attrs[_RECORD], Trial)
        return self._decoded[trial.number]

    def _claims(self) -> Iterator[FrozenTrial]:
        """Yield the trials with a claim that was not given up."""
        for trial in self._study.get_trials(deepcopy=False):
            if trial.state is not TrialState.FAIL and _KEY in trial.user_attrs:
                yield trial

    def _release_the_dead(self) -> None:
        beats: dict[str, Any] = self._study.user_attrs
        now = time.monotonic()
        for trial in self._claims():
            sweep = trial.user_attrs[_SWEEP]
            if trial.state is not TrialState.RUNNING or sweep == self._name:
                continue
            beat = beats.get(f"beat:{sweep}", 0)
            before = self._changed.get(sweep)
            if before is None or before[0] != beat:
                self._changed[sweep] = beat, now
            elif now - before[1] > LOST_S:
                with contextlib.suppress(ValueError, RuntimeError):  # another sweep did it
                    self._study.tell(trial.number, state=TrialState.FAIL)

    def _beat(self) -> None:
        beat = 0
        while not self._stop.wait(BEAT_S):
            beat += 1
            with contextlib.suppress(Exception):  # a network that fails for a while: the sweep itself will say so
                self._study.set_user_attr(self._attribute, beat)
