"""A winner beside the default configuration and the kernel's baselines."""

from pathlib import Path
from typing import Any

import pytest

from splash_workbench.provenance import capture
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Label
from sweeps import quiet, user_config
from tuning import sweep
from tuning.kernels import loading
from tuning.search.kernel_settings import kernel_settings
from tuning.trials.contenders import FILE_NAME, Contender, SideBySide

pytestmark = pytest.mark.compile  # two start worker processes


def _swept(name: str, folder: Path, **changes: Any) -> sweep.SweepResult:
    kernel = loading.find(f"{Path(__file__).with_name('scaled.py')}:{name}")
    space = {"block": (16,), "add_first": (True, False)}
    return sweep.sweep(
        kernel_settings(kernel, user_config(workload={"rows": 64}, space=space, results_dir=str(folder), **changes)),
        report=quiet,
    )


def test_baselines_are_predicted_beside_the_winner(tmp_path: Path) -> None:
    pytest.importorskip("libtpu")
    result = _swept("Beside", tmp_path, backend="offline")
    assert result.side_by_side is not None and result.winner is not None
    winner, xla, wrong, absent = result.side_by_side.contenders
    assert winner.time_samples_ms == result.winner.time_samples_ms
    assert xla.time_ms is not None and 0 < xla.time_ms < 1 and xla.label is Label.PREDICTED
    assert wrong.time_ms is None and str(wrong.error).startswith("wrong: rms_error=")
    assert absent.error == "not for this device"
    assert jsonl.read(result.directory / FILE_NAME, SideBySide) == [result.side_by_side]
    assert _swept("Beside", tmp_path, backend="offline").side_by_side == result.side_by_side  # from the file


def test_all_are_measured_in_turn(tmp_path: Path) -> None:
    measure = {"min_samples": 6, "max_samples": 6}
    result = _swept("Here", tmp_path, backend="measure", device="local", measure=measure)
    assert result.side_by_side is not None
    found = {contender.name: contender for contender in result.side_by_side.contenders}
    assert {"winner", "XLA", "wrong", "absent"} <= set(found)
    assert len(found["winner"].time_samples_ms) == len(found["XLA"].time_samples_ms) == 30
    assert found["XLA"].label is Label.MEASURED
    assert found["wrong"].error and found["absent"].error == "not for this device"


def test_it_is_printed_beside_the_winners_time() -> None:
    rivals = (
        Contender("winner", "block=2", Label.MEASURED, (2.0, 1.0, 3.0)),
        Contender("cuDNN", "", Label.MEASURED, (3.0, 3.0, 4.0), ("noisy",)),
        Contender("XLA", "", Label.MEASURED, error="no room"),
    )
    found = SideBySide("c", "w", "K", "chip", rivals, capture(()))
    assert list(found.lines()) == [
        "side by side, measured in turn, in one process, on chip:",
        "  winner: 2 ms (block=2)",
        "  cuDNN: 3 ms, 1.50 times the winner's; noisy",
        "  XLA: no time (no room)",
    ]
