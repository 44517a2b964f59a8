import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from splash_attn.types import BlockSizes, Variant
from tuning.evaluate import CancelledError, Evaluator, Runner
from tuning.status import Status

BLOCKS = BlockSizes(block_q=256, block_kv=512, block_kv_compute=128)
MakeEvaluator = Callable[[str], Evaluator]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path / "work")


def test_result_of_a_job_comes_back(runner: Runner) -> None:
    outcome = runner.run(
        "fake_jobs:bowl", {"block_sizes": {"block_q": 384, "block_kv": 512, "block_kv_compute": 128}}, timeout_s=60
    )
    assert outcome.status is Status.OK
    assert outcome.result["time_samples_ms"] == [11.0]


@pytest.mark.parametrize(
    ("job", "status", "error"),
    [
        ("abort", Status.CRASHED, "the worker died of SIGABRT"),
        ("segfault", Status.CRASHED, "the worker died of SIGSEGV"),
        ("exits", Status.CRASHED, "the worker ended with exit code 3 and no result"),
        ("raises", Status.CRASHED, "RuntimeError: first line ... last line"),
        ("out_of_memory", Status.OUT_OF_MEMORY, "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."),
        ("wrong", Status.WRONG, "rms_error=0.5"),
    ],
)
def test_failure_is_an_outcome(runner: Runner, job: str, status: Status, error: str) -> None:
    outcome = runner.run(f"fake_jobs:{job}", {}, timeout_s=60)
    assert (outcome.status, outcome.error) == (status, error)


def test_log_of_a_crash_is_kept(runner: Runner) -> None:
    assert "as libtpu says before it aborts" in runner.run("fake_jobs:abort", {}, timeout_s=60).log_tail


def test_log_names_no_path_of_this_machine(runner: Runner, tmp_path: Path) -> None:
    log = runner.run("fake_jobs:raises", {}, timeout_s=60).log_tail
    assert "RuntimeError: first line" in log
    assert str(Path.home()) + os.sep not in log
    assert str(tmp_path) not in log


def test_timeout_kills_the_whole_process_group(runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "child"
    monkeypatch.setenv("FAKE_JOBS_CHILD", str(marker))
    outcome = runner.run("fake_jobs:hang", {}, timeout_s=3)
    assert outcome.status is Status.TIMEOUT
    assert outcome.error == "killed after the time limit of 3 s"
    assert outcome.result == {}
    assert not _alive(int(marker.read_text()))


def test_dump_of_a_crashed_job_is_deleted(runner: Runner, tmp_path: Path) -> None:
    outcome = runner.run(
        "fake_jobs:dumps_and_aborts",
        {},
        timeout_s=60,
        variables=lambda job_dir: {"FAKE_DUMP_DIR": str(job_dir / "dump")},
    )
    assert "SIGABRT" in str(outcome.error)
    assert list((tmp_path / "work").iterdir()) == []


def test_cancel_ends_what_runs_and_what_would_run(runner: Runner) -> None:
    raised = []

    def run() -> None:
        try:
            runner.run("fake_jobs:hang", {}, timeout_s=600)
        except CancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while not runner._running:
        time.sleep(0.01)
    runner.cancel()
    thread.join(60)
    assert len(raised) == 1
    with pytest.raises(CancelledError):
        runner.run("fake_jobs:bowl", {}, timeout_s=60)


def test_a_wrong_kernel_cannot_pass_for_ok(make_evaluator: MakeEvaluator) -> None:
    with pytest.raises(ValueError, match="expected 'wrong'"):
        make_evaluator("fake_jobs:wrong_that_claims_to_be_ok").evaluate(BLOCKS, {})


def test_the_real_check_finds_one_wrong_row(make_evaluator: MakeEvaluator) -> None:
    options = Variant(softmax="online").to_dict()
    right = make_evaluator("tuning.jobs:interpret").evaluate(BLOCKS, options)
    assert (right.status, right.error) == (Status.OK, None)
    assert right.numerics is not None and right.numerics.q_seq_len > BLOCKS.block_q
    wrong = make_evaluator("fake_jobs:wrong_kernel").evaluate(BLOCKS, options)
    assert wrong.status is Status.WRONG
    assert wrong.numerics is not None and wrong.numerics.max_row_error > 0.4
    assert wrong.time_ms is None


def _alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
