"""The whole self-check on a chip that is played, healthy and with planted faults."""

import dataclasses
import getpass
import json
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import played_chip
from helpers import PLENTY_S
from splash_attn import tuned
from splash_attn.types import AttentionShape, BlockSizes, Variant
from splash_workbench import files
from splash_workbench.errors import UserError
from splash_workbench.provenance import REPO_ROOT
from tuning.selfcheck import __main__ as command
from tuning.selfcheck import session as module
from tuning.selfcheck import tasks
from tuning.selfcheck.records import Predicted, SelfCheck
from tuning.selfcheck.session import Session
from tuning.selfcheck.table import lines
from tuning.validate import rows

pytestmark = pytest.mark.compile
PREDICTED = {
    "kernels": Predicted(time_ms=13.9, interval_ms=(13.0, 15.0), says="planted"),
    "text": Predicted(time_ms=10.0, interval_ms=(9.0, 11.0), says="planted"),
    "vae": Predicted(time_ms=15.0, says="planted"),
}
SMALL = AttentionShape(1, 1, 67, 131, 64)


class PlantedPredictions:
    """In place of those that compile for an hour."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __enter__(self) -> "PlantedPredictions":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def start(self, task: tasks.Task) -> None:
        pass

    def of(self, task: tasks.Task, deadline: float) -> Predicted:
        return PREDICTED.get(task.part, Predicted(says="none planted"))


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> None:
    """One small tuned kernel, two rows, one check."""
    provenance = tuned.Provenance("predicted", 13.9, "small", "r", "k", None, {}, "2026-11-26T00:00:00+00:00")
    entry = tuned.TunedEntry(SMALL, "bfloat16", BlockSizes(128, 256, 128), Variant(), provenance)
    monkeypatch.setattr(tuned, "load", lambda kind, directory=None: (entry,))
    monkeypatch.setattr(tasks, "ROW_COUNT", 2)
    monkeypatch.setattr(tasks, "_CHECK_BLOCKS", BlockSizes(128, 128, 128))
    monkeypatch.setattr(tasks, "_VARIANTS", ())
    monkeypatch.setattr(tasks, "_MAKE_STAGE", "played_chip:stage_program")
    monkeypatch.setattr(module, "Predictions", PlantedPredictions)


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., SelfCheck]:
    """Runs a session and returns what it found, which is also what its file has."""

    def run(chip: str, *parts: str, resume: bool = True) -> SelfCheck:
        said: list[str] = []
        session = Session(parts, PLENTY_S, tmp_path, resume, f"played_chip:{chip}", said.append)
        found = session.run()
        assert json.loads(session.path.read_text()) == json.loads(json.dumps(module.jsonl.encode(found)))
        run.said, run.path = said, session.path  # type: ignore[attr-defined]
        return found

    return run


def test_a_damaged_file_of_today_is_found_before_the_chips_are_looked_for(check: Any, tmp_path: Path) -> None:
    path = tmp_path / module.file_name("TPU v6 lite", module._today())
    path.write_text('{"rows": [')
    with pytest.raises(UserError, match=r"selfcheck-tpu-v6-lite-.*move it away, or start anew with resume=false"):
        Session((), PLENTY_S, tmp_path, True, "played_chip:healthy", lambda text: pytest.fail(text))
    assert check("healthy", resume=False).device_kind == "TPU v6 lite"


def test_a_healthy_chip(check: Any) -> None:
    found = check("healthy", *(part.name for part in tasks.PARTS))
    assert (found.device_kind, found.failures, found.left_out) == ("TPU v6 lite", (), {})
    assert found.environment["hbm_free_bytes"] == played_chip.HBM_BYTES - 2**30
    verdicts = {row.part: row.verdict for row in found.rows}
    assert verdicts == {
        "kernels": "within the interval",
        "programs": "no prediction (none planted)",
        "text": "outside by 27.3%, over it",
        "vae": "predicted +7.1%; no interval is stated",
        "denoise": "no prediction (none planted)",
    }
    assert {row.kernel_time_ms for row in found.rows if row.part == "kernels"} == {played_chip.KERNEL_MS}
    assert [row.time_ms for row in found.rows] == [played_chip.TIME_MS] * len(found.rows)
    text = "\n".join(lines(found))
    assert "1 of 2 within their predicted intervals" in text and "free: HBM of a chip 31.0 GiB" in text
    (step,) = (row for row in found.rows if row.part == "denoise")
    assert (step.arguments, step.config) == ({"checkpoint": "cogvideox1.5-5b"}, {"num_devices": 1})
    assert check.path.name.startswith("selfcheck-tpu-v6-lite-20")
    # The file is one that validate reads, with all that was timed.
    measured = rows.read(check.path)
    assert [(row.op, row.times_ms) for row in measured] == [(row.op, row.times_ms) for row in found.rows]
    # The same again: nothing is left to do but to look.
    again = check("healthy", *(part.name for part in tasks.PARTS))
    assert again.rows == found.rows and [text.partition(" (")[0] for text in check.said] == [
        "environment: chips and versions",
        "waiting for predictions",
    ]


def test_what_fails_costs_only_itself(check: Any) -> None:
    found = check("crashing", "numerics", "text")
    assert [failure.part for failure in found.failures] == ["text"]
    assert {failure.status for failure in found.failures} == {"crashed"}
    assert "SIGABRT" in found.failures[0].error
    assert len(found.checks) == 1 and not found.rows
    assert {"kernels": "not asked for"}.items() <= found.left_out.items()
    # Put right, the rest is done.
    found = check("healthy", "numerics", "text")
    assert not found.failures and len(found.rows) == 1
    assert not any(text.startswith("numerics") for text in check.said)


def test_failures_of_parts_not_asked_for_are_kept(check: Any) -> None:
    check("crashing", "text")
    found = check("healthy", "numerics")
    assert [failure.part for failure in found.failures] == ["text"] and len(found.checks) == 1


def test_what_other_versions_found_is_left_as_it_is(check: Any) -> None:
    check("healthy", "numerics")
    first = check.path
    content = json.loads(first.read_text())
    content["environment"]["versions"]["jax"] = "0.0.1"
    first.write_text(json.dumps(content))
    for _ in range(2):  # the second goes on with the second file
        found = check("healthy", "environment")
        assert check.path.name == f"{first.stem}-2.json" and not found.checks
    assert json.loads(first.read_text()) == content


def test_two_self_checks_do_not_write_one_file(check: Any, tmp_path: Path) -> None:
    with files.locked(tmp_path / ".selfcheck.lock", None), pytest.raises(UserError, match="another self-check writes"):
        check("healthy", "numerics")


def test_a_part_that_hangs_is_ended(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = {"environment": 1.0, "text": 1e-3, "numerics": 1.0}
    order = [dataclasses.replace(part, share=shares.get(part.name, 1.0)) for part in tasks.PARTS]
    order.sort(key=lambda part: ["environment", "text", "numerics"].index(part.name) if part.name in shares else 9)
    monkeypatch.setattr(module, "PARTS", order)
    found = check("hanging", "text", "numerics")
    (failure,) = found.failures
    assert (failure.part, failure.status) == ("text", "timeout") and "time limit" in failure.error
    assert len(found.checks) == 1


def test_a_full_chip_says_so_and_names_no_path(check: Any) -> None:
    (failure,) = check("full", "text").failures
    assert failure.status == "out_of_memory"
    assert failure.error == "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm, REPO/dump/buffers.txt"


def test_a_profile_without_runs_is_no_measurement(check: Any) -> None:
    (row,) = check("without_events", "text").rows
    assert row.notes[0].startswith("wall time, dispatch included: the profile has no runs of programs")
    assert row.verdict == "not judged: wall time, dispatch included" and row.inside is None


def test_a_wrong_kernel_is_found_and_not_timed(check: Any) -> None:
    found = check("wrong", "numerics", "kernels")
    assert {failure.status for failure in found.failures} == {"wrong"} and not found.rows and not found.checks
    assert [failure.part for failure in found.failures] == ["numerics", "kernels"]


def test_without_a_chip_the_cause_is_told(check: Any) -> None:
    found = check("absent", "numerics")
    (failure,) = found.failures
    assert "the chips are in use by another process" in failure.error
    assert found.left_out["numerics"] == "the chips were not found"
    assert check.path.name.startswith("selfcheck-unknown-")


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, Sequence[str]], int]:
    def run(chip: str, arguments: Sequence[str]) -> int:
        monkeypatch.setattr(command, "CHIP", f"played_chip:{chip}")
        monkeypatch.setattr(sys, "argv", ["selfcheck", f"output_dir={tmp_path}", *arguments])
        return command.main()

    return run


def test_the_command_says_it_all_and_the_file_nothing_of_the_machine(
    run_command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={Path.home()}/dump/{getpass.getuser()}")
    monkeypatch.setattr(module.Session, "_run_others", lambda self, parts: None)
    assert run_command("healthy", ["parts=numerics"]) == 0
    out = capsys.readouterr().out
    assert "1 x TPU v6 lite" in out
    (path,) = tmp_path.glob("selfcheck-tpu-v6-lite-*.json")
    assert str(path) in out
    for secret in secrets():
        assert secret not in path.read_text(), secret


def secrets() -> Iterator[str]:
    yield from (str(Path.home()), str(Path.cwd()), str(REPO_ROOT), socket.gethostname(), sys.prefix)
    yield getpass.getuser()


def test_exit_codes(run_command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("absent", ["parts=numerics"]) == 1
    assert "failed:" in capsys.readouterr().out
    assert run_command("healthy", ["parts=numbers"]) == 2
    assert capsys.readouterr().err == (
        "error: parts=numbers: expected some of environment,numerics,kernels,programs,text,vae,denoise.\n"
    )
