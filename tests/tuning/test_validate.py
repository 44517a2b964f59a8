import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splash_attn.types import Variant
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Label, Status
from tuning.trials import records
from tuning.trials.figures import save_png
from tuning.trials.records import Trial
from tuning.trials.reported import DEFAULT_PATH, Reported
from tuning.validate import __main__ as validate
from tuning.validate import agreement
from tuning.validate.agreement import Pair, pairs_of, spearman, summarize

ROW = {
    "batch_size": 1,
    "seq_len": 512,
    "num_heads": 2,
    "head_dim": 64,
    "block_q": 256,
    "block_kv": 256,
    "block_kv_compute": 256,
    "q_layout": "HEAD_DIM_MINOR",
    "k_layout": "HEAD_DIM_MINOR",
    "v_layout": "SEQ_MINOR",
    "lp_llo_scheduler": False,
    "median_time_ms": 0.05,
}


def _file(path: Path, *rows: Any, **changes: Any) -> Path:
    content = {"source": "made up for a test", "device_kind": "TPU v6 lite", "rows": list(rows)} | changes
    path.write_text(json.dumps(content))
    return path


def test_the_shipped_rows_are_of_the_form() -> None:
    assert len(Reported.read(DEFAULT_PATH).rows) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 0}, "Expected `int` >= 1 - at `$.rows[1].head_dim`"),
        ({"batch_size": "4"}, "Expected `int`, got `str` - at `$.rows[1].batch_size`"),
        ({"block_q": True}, "Expected `int`, got `bool` - at `$.rows[1].block_q`"),
        ({"block_kv_compute": 96}, "block_kv_compute=96: expected a divisor of self.block_kv=256. - at `$.rows[1]`"),
        ({"num_kv_heads": 3}, "num_kv_heads=3: expected a divisor of self.num_heads=2. - at `$.rows[1]`"),
        ({"k_layout": "minor"}, "Invalid enum value 'minor' - at `$.rows[1].k_layout`"),
        ({"is_causal": 1}, "Expected `bool`, got `int` - at `$.rows[1].is_causal`"),
        ({"dtype": "int8"}, "Invalid enum value 'int8' - at `$.rows[1].dtype`"),
        ({"median_time_ms": "fast"}, "Expected `float`, got `str` - at `$.rows[1].median_time_ms`"),
        ({"median_time_ms": 0}, "median_time_ms=0.0: expected a positive number of milliseconds. - at `$.rows[1]`"),
        ({"blok_q": 3}, "Object contains unknown field `blok_q` - at `$.rows[1]`"),
        ({"seq_len": None}, "Expected `int`, got `null` - at `$.rows[1].seq_len`"),
    ],
)
def test_a_bad_row_is_named_with_its_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Reported.read(_file(tmp_path / "mine.json", ROW, ROW | change))
    assert message in str(error.value)


def test_a_missing_key_and_a_row_that_is_none_are_named(tmp_path: Path) -> None:
    short = {name: value for name, value in ROW.items() if name not in ("block_q", "v_layout")}
    with pytest.raises(ValueError, match=r"missing required field `block_q` - at `\$\.rows\[0\]`"):
        Reported.read(_file(tmp_path / "mine.json", short))
    with pytest.raises(ValueError, match=r"Expected `object`, got `array` - at `\$\.rows\[0\]`"):
        Reported.read(_file(tmp_path / "mine.json", [1, 2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": []}, "Expected `array` of length >= 1 - at `$.rows`"),
        ({"device_kind": 6}, "Expected `str`, got `int` - at `$.device_kind`"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Reported.read(_file(tmp_path / "mine.json", ROW, **changes))
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"measured=.*mine\.json: .*; expected the form of"):
        Reported.read(path)


def _pairs(*times: tuple[float, float]) -> list[Pair]:
    return [Pair("g", "n", Label.REPORTED, actual, predicted) for actual, predicted in times]


def test_figures_of_pairs_are_those_of_their_ratios() -> None:
    summary = summarize(_pairs((1.0, 1.1), (2.0, 1.9), (4.0, 4.0)), failed_count=2)
    assert summary.median_abs_error == pytest.approx(0.05)
    assert summary.max_abs_error == pytest.approx(0.1)
    assert summary.spearman == pytest.approx(1)
    assert summary.line == "3 rows: median error 5.0%, worst 10.0%, Spearman 1.000"
    assert summarize([]).line == "nothing to compare"


def test_rank_correlation() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 1], [1, 2, 3]) is None


MakeTrial = Callable[..., Trial]


def test_records_are_joined_by_call_device_and_candidate(make_trial: MakeTrial) -> None:
    measured = {"label": Label.MEASURED, "backend": "measure", "device": "local", "context": "c2"}
    other = Variant(softmax="online").to_dict()
    trials = [
        make_trial(time_samples_ms=(10.0,), created_at="2026-01-01"),
        make_trial(time_samples_ms=(11.0,), created_at="2026-01-02", notes=("assumes",)),
        make_trial(**measured, time_samples_ms=(9.0, 10.0, 30.0), notes=("drift",)),
        make_trial(**measured, time_samples_ms=(5.0,), variant=other),  # not predicted
        make_trial(**measured, time_samples_ms=(5.0,), device_kind="TPU v5 lite"),  # another chip
        make_trial(**measured, time_samples_ms=(5.0,), dtype="float32"),
        make_trial(**measured | {"label": None}, status=Status.TIMEOUT, numerics=None),
    ]
    (pair,) = pairs_of(trials)
    assert (pair.actual_ms, pair.predicted_ms, pair.label) == (10.0, 11.0, Label.MEASURED)  # the median, the newest
    assert pair.notes == ("drift", "assumes")
    assert pair.group == "measured on TPU v6 lite"
    changed = dataclasses.replace(trials[2].environment, kernel_hash="another kernel")
    assert pairs_of([trials[1], dataclasses.replace(trials[2], environment=changed)]) == []


def test_the_picture_is_drawn_for_one_pair_and_for_many(tmp_path: Path) -> None:
    for number, pairs in enumerate((_pairs((1.0, 1.3)), _pairs(*((10.0**i, 10.0**i) for i in range(-2, 4))))):
        path = tmp_path / f"{number}.png"
        save_png(agreement.parity(pairs), path)
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.compile
def test_the_command_on_a_file_of_ones_own(
    tmp_path: Path, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One row that compiles, one that tokamax refuses, and a measured candidate on record."""
    pytest.importorskip("tokamax")
    trials_path = tmp_path / "results" / "sweeps" / "x" / records.TRIALS_FILE
    jsonl.append(trials_path, make_trial(time_samples_ms=(11.0,)))
    jsonl.append(trials_path, make_trial(label=Label.MEASURED, backend="measure", time_samples_ms=(10.0,)))
    _file(tmp_path / "mine.json", ROW | {"head_dim": 72}, ROW | {"seq_len": 500})
    monkeypatch.chdir(tmp_path)

    def run() -> tuple[dict[str, Any], str]:
        arguments = ["measured=mine.json", "json=out.json", "progress=false", "workers=1"]
        monkeypatch.setattr(sys, "argv", ["validate", *arguments])
        assert validate.main() == 1  # one row could not be predicted
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    content, out = run()
    assert (content["row_count"], content["failed_count"]) == (1, 1)
    assert content["median_abs_error"] == content["max_abs_error"] == abs(content["rows"][0]["ratio"] - 1)
    assert content["spearman"] is None
    assert content["rows"][0]["predicted_ms"] > 0
    assert content["rows"][1]["error"].startswith("compile_error: ")
    assert "500" in content["rows"][1]["error"]
    assert content["measured"]["rows"][0]["ratio"] == pytest.approx(1.1)
    assert "measured on TPU v6 lite: 1 row: median error 10.0%" in out
    assert (tmp_path / content["picture"]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(validate.Runner, "run", lambda *_, **__: pytest.fail("the outcome is in the cache"))
    assert run()[0]["rows"] == content["rows"]
