"""Several sweeps on one study: each candidate is one's, what a dead one had is taken over, all get all records."""

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S, environment_with_repo, wait_until
from splash_attn.types import AttentionShape
from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from sweeps import quiet, with_job
from tuning.search import shared
from tuning.search.settings import SweepSettings
from tuning.search.space import Candidate, Space
from tuning.search.study import Search, SearchSettings
from tuning.sweep import sweep
from tuning.trials import records
from tuning.trials.records import Trial
from tuning.trials.workloads import Workload

SHAPE = AttentionShape(batch_size=1, num_heads=3, q_seq_len=1021, kv_seq_len=1013, head_dim=64)
CHOICES = {"block_q": (128, 256, 384), "block_kv": (256, 512), "block_kv_compute": (128, 256)}
CHOICES_24 = {"block_q": (128, 256, 384, 512), "block_kv": (256, 512, 768), "block_kv_compute": (128, 256)}
CANDIDATES = Space("test", CHOICES).candidates(Workload("test", SHAPE, "bfloat16"))


@pytest.fixture
def open_search(tmp_path: Path) -> Iterator[Callable[..., Search]]:
    """Open the shared study; each call is a sweep of its own."""
    opened: list[Search] = []

    def open_search(sampler: str = "grid", max_trials: int | None = None) -> Search:
        settings = SearchSettings(sampler, max_trials, storage=str(tmp_path / "shared" / "journal.log"))
        opened.append(Search(tmp_path / "unused", "study", Space("test", CHOICES), CANDIDATES, settings, {}))
        return opened[-1]

    yield open_search
    for search in opened:
        search.close()


@pytest.fixture
def trial_of(make_trial: Callable[..., Trial]) -> Callable[..., Trial]:
    def trial_of(candidate: Candidate, **changes: object) -> Trial:
        blocks = {"block_sizes": candidate.block_sizes, "variant": candidate.variant.to_dict()}
        return make_trial(**blocks, **changes)

    return trial_of


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_sweeps_at_once_ask_each_candidate_once(sampler, open_search, trial_of):
    searches, asked = [open_search(sampler) for _ in range(3)], []

    def work(search: Search) -> None:
        while (candidate := search.ask()) is not None:
            asked.append(candidate.key)
            search.tell(candidate, trial_of(candidate))

    threads = [threading.Thread(target=work, args=(search,)) for search in searches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PLENTY_S)
    assert Counter(asked) == Counter(candidate.key for candidate in CANDIDATES.valid)
    ids = [{trial.record_id for trial in search.told.values()} for search in searches]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) == 12


def test_what_a_dead_sweep_had_is_taken_over(open_search, trial_of, monkeypatch):
    dead = open_search()
    lost = dead.ask()
    dead._shared._stop.set()  # it says no more that it lives
    monkeypatch.setattr(shared, "LOST_S", 0.3)
    other, asked = open_search(), []
    while (candidate := other.ask()) is not None:  # waits for the last one, then takes it over
        asked.append(candidate.key)
        other.tell(candidate, trial_of(candidate))
    assert lost.key in asked and len(asked) == len(set(asked)) == 12
    dead.tell(lost, trial_of(lost))  # it lived after all: no harm


def test_what_a_sweep_leaves_is_free_at_once(open_search, trial_of):
    left = open_search(max_trials=1)
    candidate = left.ask()
    left.close()  # as where SIGTERM ends it
    other = open_search(max_trials=1)
    assert other.ask().key == candidate.key


@pytest.mark.parametrize("torn", [b'{"op_code": 5, "worker', b"x" * 200_000])
def test_a_torn_line_of_the_journal_is_removed(torn, open_search, trial_of, tmp_path):
    first = open_search()
    first.tell(candidate := first.ask(), trial_of(candidate))
    with (tmp_path / "shared" / "journal.log").open("ab") as file:
        file.write(torn)  # of a sweep that was killed
    first.tell(candidate := first.ask(), trial_of(candidate))
    assert open_search().told.keys() == first.told.keys() and len(first.told) == 2


def test_the_budget_is_that_of_all(open_search, trial_of):
    first, second = open_search(max_trials=3), open_search(max_trials=3)
    one, two, three = first.ask(), second.ask(), first.ask()
    for search, candidate in ((first, one), (second, two), (first, three)):
        search.tell(candidate, trial_of(candidate))
    assert first.ask() is second.ask() is None
    assert len({one.key, two.key, three.key}) == 3 and first.told.keys() == second.told.keys()


def test_a_crashed_candidate_is_tried_by_another_sweep(open_search, trial_of):
    first, second = open_search(max_trials=1), open_search(max_trials=1)
    candidate = first.ask()
    first.tell(candidate, trial_of(candidate, status=Status.CRASHED, error="killed"))
    assert second.ask() is not None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+nothing://me:secret@host/db", r"search.storage=postgresql\+nothing://me:\*\*\*@host/db: "),
        ("redis://localhost:1/0", "search.storage=redis://localhost:1/0: (Redis does not answer|its driver)"),
        (
            "postgresql+psycopg://me:secret@localhost:1/x",
            r"me:\*\*\*@localhost:1/x: (the database does not|its driver)",
        ),
        ("/proc/1/none/journal.log", r"search.storage=/proc/1/none/journal.log: cannot write"),
        ("/tmp", "search.storage=/tmp: expected a file, got a folder"),
    ],
)
def test_a_storage_that_is_not_there_is_refused_without_its_password(url, message):
    with pytest.raises(UserError, match=message):
        shared.open_storage(url)


@pytest.mark.parametrize("name", ["promote", "quick"])
def test_what_is_of_one_sweep_alone_is_refused(name, make_settings):
    settings = make_settings(search=SearchSettings("grid", storage="x"), quick=False)
    backend = dataclasses.replace(settings.backend, quick=True)
    with pytest.raises(ValueError, match=f"search.storage: expected {name}=false"):
        dataclasses.replace(settings, backend=backend, **{name: True})


_SWEEP = """
import pickle, sys
from tuning.search import shared
from tuning.sweep import sweep
if __name__ == "__main__":
    shared.BEAT_S, shared.LOST_S = 0.5, 20.0
    sweep(pickle.load(open(sys.argv[1], "rb")), report=lambda line: None)
"""


def _sweeps_one_killed(
    storage: str,
    make_settings: Callable[..., SweepSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    others: int = 1,
    **changes: Any,
) -> None:
    """Start sweeps as processes, kill one of them in the middle, and merge. changes: of the settings."""
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_JOBS_LOG", str(log))
    search = SearchSettings("grid", storage=storage)

    def settings_of(name: str) -> SweepSettings:
        made = make_settings(search=search, quick=False, workers=1, results_dir=tmp_path / name, **changes)
        return with_job("bowl_of_uneven_speed", made)

    processes = []
    alone = sweep(with_job("bowl", make_settings(results_dir=tmp_path / "alone", **changes)), report=quiet)
    count = len(alone.trials)
    log.unlink()
    for name, more in (("killed", {"FAKE_JOBS_HANG_AFTER": "3"}), *((f"other{n}", {}) for n in range(others))):
        path = tmp_path / f"{name}.pickle"
        path.write_bytes(pickle.dumps(settings_of(name)))
        command = [sys.executable, "-c", _SWEEP, str(path)]
        processes.append(subprocess.Popen(command, env=environment_with_repo() | more))
        if name == "killed":
            wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 4, "a candidate that hangs")
            assert processes[0].poll() is None
    processes[0].send_signal(signal.SIGKILL)
    assert [process.wait(PLENTY_S) for process in processes[1:]] == [0] * others
    result = sweep(settings_of("merged"), report=quiet)
    assert result.evaluated_count == 0
    merged = records.read(result.directory / records.TRIALS_FILE)
    assert len({trial.key for trial in merged}) == len(merged) == count
    times = Counter(log.read_text().splitlines())
    # Twice: the one that was lost, and maybe the one before it, which was on record there and not told yet.
    assert len(times) == count and count < sum(times.values()) <= count + 2
    assert result.winner is not None and alone.winner is not None and result.winner.key == alone.winner.key
    blocks = [json.loads(line) for line in times]
    assert all(dataclasses.asdict(trial.block_sizes) in blocks for trial in merged)


@pytest.mark.compile
@pytest.mark.slow("30 s")
def test_two_sweeps_on_a_journal_one_killed(make_settings, tmp_path, monkeypatch):
    _sweeps_one_killed(str(tmp_path / "journal.log"), make_settings, tmp_path, monkeypatch)


@contextlib.contextmanager
def _postgresql() -> Iterator[str]:
    """Start a PostgreSQL server of the test's own; yield the URL of its database."""
    user: dict[str, Any] = {"user": "postgres"} if os.getuid() == 0 else {}  # it refuses to run as root
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, user["user"])
        yield from _server(Path(folder), user)


def _server(folder: Path, user: dict[str, Any]) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data = folder / "postgresql"
    subprocess.run(["initdb", "-D", data, "-U", "me", "--auth=trust"], check=True, capture_output=True, **user)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1"
    subprocess.run(["pg_ctl", "-D", data, "-o", options, "-l", folder / "pg.log", "-w", "start"], check=True, **user)
    try:
        yield f"postgresql+psycopg://me@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run(["pg_ctl", "-D", data, "-m", "immediate", "stop"], check=True, **user)


@pytest.mark.slow("2 min")
def test_three_sweeps_of_24_candidates_on_postgresql_one_killed(make_settings, tmp_path, monkeypatch):
    pytest.importorskip("psycopg")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("no PostgreSQL here")
    with _postgresql() as url:
        _sweeps_one_killed(url, make_settings, tmp_path, monkeypatch, others=2, space=Space("24", CHOICES_24))
