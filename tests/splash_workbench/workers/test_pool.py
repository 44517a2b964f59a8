import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fake_jobs import EXITS_AT, RAISES_AT
from helpers import PLENTY_S, environment_with_repo, is_alive, wait_until, wait_until_dead
from splash_workbench.trial_status import Status
from splash_workbench.workers import pool as module
from splash_workbench.workers.pool import CancelledError, Runner

FATAL = "F0000 check failed: as libtpu says before it aborts"
UNKNOWN_FLAG = "ERROR: Unknown command line flag 'xla_nonsense'"


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "work")


def test_result_of_a_job_comes_back(runner: Runner) -> None:
    outcome = runner.run(
        "fake_jobs:bowl",
        {"block_sizes": {"block_q": 384, "block_kv": 512, "block_kv_compute": 128}},
        timeout_s=PLENTY_S,
    )
    assert outcome.status is Status.OK
    assert outcome.result["time_samples_ms"] == [11.0]


@pytest.mark.parametrize(
    ("job", "status", "error"),
    [
        ("abort", Status.CRASHED, f"the worker died of SIGABRT: {FATAL}"),
        ("refuses_a_flag", Status.CRASHED, f"the worker ended with exit code 1 and no result: {UNKNOWN_FLAG}"),
        ("segfault", Status.CRASHED, "the worker died of SIGSEGV"),
        ("exits", Status.CRASHED, f"SystemExit at {EXITS_AT}: 3"),
        ("raises", Status.CRASHED, f"RuntimeError at {RAISES_AT}: first line ... last line"),
        ("out_of_memory", Status.OUT_OF_MEMORY, "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."),
        ("wrong", Status.WRONG, "rms_error=0.5"),
    ],
)
def test_failure_is_an_outcome(runner: Runner, job: str, status: Status, error: str) -> None:
    outcome = runner.run(f"fake_jobs:{job}", {}, timeout_s=PLENTY_S)
    assert (outcome.status, outcome.error) == (status, error)


def test_log_of_a_crash_is_kept(runner: Runner) -> None:
    assert "as libtpu says before it aborts" in runner.run("fake_jobs:abort", {}, timeout_s=PLENTY_S).log_tail


def test_log_names_no_path_of_this_machine(runner: Runner, tmp_path: Path) -> None:
    log = runner.run("fake_jobs:raises", {}, timeout_s=PLENTY_S).log_tail
    assert "RuntimeError: first line" in log
    assert str(Path.home()) + os.sep not in log
    assert str(tmp_path) not in log


@pytest.mark.compile
def test_timeout_kills_the_whole_process_group(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "child"
    monkeypatch.setenv("FAKE_JOBS_CHILD", str(marker))
    for timeout_s in (1, 10, 100):  # as long as the job needs to have a child
        outcome = runner.run("fake_jobs:hang", {}, timeout_s=timeout_s)
        assert outcome.status is Status.TIMEOUT
        assert outcome.error == f"killed after the time limit of {timeout_s} s, at: start"
        assert outcome.result == {}
        if marker.exists():
            break
    wait_until_dead(int(marker.read_text()))


def test_dump_of_a_crashed_job_is_deleted(runner: Runner, tmp_path: Path) -> None:
    outcome = runner.run(
        "fake_jobs:dumps_and_aborts",
        {},
        timeout_s=PLENTY_S,
        variables=lambda job_dir: {"FAKE_DUMP_DIR": str(job_dir / "dump")},
    )
    assert "SIGABRT" in str(outcome.error)
    assert list((tmp_path / "work").iterdir()) == []


def test_cancel_ends_what_runs_and_what_would_run(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_JOBS_CHILD", str(tmp_path / "child"))
    raised = []

    def run() -> None:
        try:
            runner.run("fake_jobs:hang", {}, timeout_s=PLENTY_S)
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until((tmp_path / "child").exists, "the job to begin")
    runner.cancel()
    thread.join(PLENTY_S)
    assert len(raised) == 1
    with pytest.raises(CancelledError):
        runner.run("fake_jobs:bowl", {}, timeout_s=PLENTY_S)


@pytest.fixture
def warm(tmp_path: Path):  # type: ignore[no-untyped-def]
    runner = Runner(tmp_path / "work", jobs_per_worker=3)
    yield runner
    runner.cancel()
    assert list((tmp_path / "work").iterdir()) == []


def _pid(runner: Runner, **variables: str) -> int:
    outcome = runner.run("fake_jobs:pid", {}, timeout_s=PLENTY_S, variables=lambda worker_dir: variables)
    assert outcome.status is Status.OK, outcome
    return int(outcome.result["pid"])


def test_a_warm_worker_takes_job_after_job_and_is_then_replaced(warm: Runner) -> None:
    pids = [_pid(warm) for _ in range(7)]
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    assert not is_alive(pids[0])
    usage = warm.usage
    assert (usage.job_count, usage.worker_count) == (7, 3)


@pytest.mark.parametrize("job", ["abort", "segfault", "exits", "raises", "hang"])
def test_a_job_that_goes_wrong_takes_only_its_worker_with_it(warm: Runner, job: str) -> None:
    before = _pid(warm)
    expected, timeout_s = (Status.TIMEOUT, 1) if job == "hang" else (Status.CRASHED, PLENTY_S)
    assert warm.run(f"fake_jobs:{job}", {}, timeout_s=timeout_s).status is expected
    assert not is_alive(before)
    assert _pid(warm) != before


@pytest.mark.parametrize("job", ["wrong", "out_of_memory"])
def test_a_foreseen_failure_keeps_its_worker(warm: Runner, job: str) -> None:
    before = _pid(warm)
    warm.run(f"fake_jobs:{job}", {}, timeout_s=PLENTY_S)
    assert _pid(warm) == before


def test_what_an_earlier_job_broke_is_not_blamed_on_a_later_one(warm: Runner) -> None:
    """A crash counts only if it happens in a process that ran nothing else."""
    before = _pid(warm)
    outcome = warm.run("fake_jobs:aborts_in_a_used_process", {}, timeout_s=PLENTY_S)
    assert outcome.status is Status.OK
    assert outcome.result["pid"] != before


def test_a_worker_that_died_idle_is_not_blamed_on_the_next_job(warm: Runner) -> None:
    os.kill(before := _pid(warm), signal.SIGKILL)
    assert _pid(warm) != before


def test_a_worker_that_has_grown_is_replaced(warm: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RETIRE_RSS_BYTES", 1000)
    assert _pid(warm) == _pid(warm)  # it holds more than that from its first job on, as every one after it would
    monkeypatch.setattr(module, "_RETIRE_GROWTH", 0)
    assert _pid(warm, LIBTPU_INIT_ARGS="--b") != _pid(warm, LIBTPU_INIT_ARGS="--b")
    assert (warm.usage.peak_memory_bytes or 0) > 1000


def test_a_forked_process_answers_nothing(warm: Runner) -> None:
    for _ in range(2):
        outcome = warm.run("fake_jobs:forks", {}, timeout_s=PLENTY_S)
        assert (outcome.status, outcome.result) == (Status.OK, {"from": "the job"})
    _pid(warm)  # and no answer of theirs is left for the next job


def test_another_jobs_answer_is_none(warm: Runner) -> None:
    outcome = warm.run("fake_jobs:answers_twice", {}, timeout_s=PLENTY_S)
    assert (outcome.status, outcome.result, outcome.error) == (Status.CRASHED, {}, "the worker answered another job")
    _pid(warm)


def test_an_error_can_be_written_to_a_file(runner: Runner) -> None:
    error = runner.run("fake_jobs:says_what_is_no_text", {}, timeout_s=PLENTY_S).error
    assert error == r"a file's name: \udcff"


def test_another_environment_is_another_worker(warm: Runner, tmp_path: Path) -> None:
    first = _pid(warm, LIBTPU_INIT_ARGS="--a")
    assert _pid(warm, LIBTPU_INIT_ARGS="--b") != first
    assert not is_alive(first)  # no more workers than jobs at once
    assert len(list((tmp_path / "work").iterdir())) == 1


def test_a_job_finds_nothing_of_the_one_before(warm: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SAMPLE_S", 0.02)

    def run(job: str):  # type: ignore[no-untyped-def]
        return warm.run(
            f"fake_jobs:{job}", {}, timeout_s=PLENTY_S, variables=lambda folder: {"FAKE_DUMP_DIR": str(folder / "dump")}
        )

    first = run("dumps")
    second = run("dumps")
    assert first.status is second.status is Status.OK
    assert first.result["pid"] == second.result["pid"]
    assert first.log_tail.count("dumped") == second.log_tail.count("dumped") == 1
    assert warm.usage.peak_disk_bytes >= 10_000


_IDLE = """
import sys, time
from pathlib import Path
from splash_workbench.workers.pool import Runner
runner = Runner(Path(sys.argv[1]), jobs_per_worker=9)  # its workers end with it, so it must have a name
print(runner.run("fake_jobs:pid", {}, timeout_s=600).result["pid"], flush=True)
time.sleep(600)
"""


def test_an_idle_worker_dies_with_a_killed_parent(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _IDLE, str(tmp_path / "work")],
        env=environment_with_repo(),
        stdout=subprocess.PIPE,
    ) as parent:
        try:
            assert parent.stdout is not None
            worker = int(parent.stdout.readline())
            assert is_alive(worker)
        finally:
            parent.kill()
    wait_until_dead(worker)
    assert list((tmp_path / "work").iterdir()) == []


def test_what_a_job_is_at_is_known_while_it_runs(runner: Runner, tmp_path: Path) -> None:
    outcomes: list[module.Outcome] = []
    payload = {"until": str(tmp_path / "go")}
    thread = threading.Thread(
        target=lambda: outcomes.append(runner.run("fake_jobs:staged", payload, timeout_s=PLENTY_S))
    )
    thread.start()
    wait_until(lambda: [stage for stage, _ in runner.stages()] == ["check"], "the second stage")
    (tmp_path / "go").touch()
    thread.join(PLENTY_S)
    assert (outcomes[0].status, outcomes[0].result) == (Status.OK, {"done": True})
    assert runner.stages() == []
