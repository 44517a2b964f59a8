import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from offline_tpu.machine import residuals
from offline_tpu.machine.errors import UnsupportedVersionError
from splash_attn.types import Variant
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Label, Status
from splash_workbench.workers.pool import Outcome
from tuning.trials import records
from tuning.trials.figures import save_png
from tuning.trials.records import Trial
from tuning.trials.reported import DEFAULT_PATH, Reported
from tuning.validate import __main__ as validate
from tuning.validate import agreement, run, table
from tuning.validate.agreement import Pair, pairs_of, spearman, summarize
from tuning.validate.record import Comparison, Validation
from tuning.validate.rows import MeasuredRow

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


class _FakeRunner:
    """Predicts 1.1 times 10 ms for what can be predicted."""

    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def cancel(self) -> None: ...

    def run(self, job: str, payload: dict[str, Any], **_: Any) -> Outcome:
        self.calls.append(payload)
        op = payload["call"]["op"]
        if op == "broken":
            return Outcome(Status.COMPILE_ERROR, {}, "does not fit", "", 1.0)
        result: dict[str, Any] = {"unmade": "no such op"} if op == "unknown" else PREDICTED
        return Outcome(Status.OK, result, None, "", 1.0)


PREDICTED = {
    "predicted_ms": 12.5,
    "bound": "hbm",
    "bottleneck": "HBM",
    "shares": {"kernel": 0.75, "layout": 0.25},
    "ops": [{"name": "fusion", "time_s": 0.009, "cycles": 7, "bound": "hbm"}],
    "compiled_memory_mb": 100.0,
}


@pytest.fixture
def validated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the command with a runner that compiles nothing: (exit code, what json= has)."""
    _FakeRunner.calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(validate, "Runner", _FakeRunner)
    monkeypatch.setattr(validate.offline_tpu, "check_setup", lambda: None)
    monkeypatch.setattr(run.libtpu, "fetch_beside", _no_pip)
    monkeypatch.setattr(residuals, "factors", lambda device, shares: (0.72, 0.88))  # of 12.5 ms: 9 to 11

    def command(*arguments: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["validate", "json=out.json", "progress=false", "workers=1", *arguments])
        code = validate.main()
        return code, json.loads((tmp_path / "out.json").read_text())

    return command


def _no_pip(compiler: str) -> None:
    raise UnsupportedVersionError(f"libtpu {compiler} cannot be fetched (no network)")


def _ops_file(path: Path, *ops: str, device_kind: str = "TPU v6 lite") -> Path:
    rows = [{"op": op, "arguments": {"n": n}, "times_ms": [10.0]} for n, op in enumerate(ops)]
    return _file(path, *rows, device_kind=device_kind)


Validated = Callable[..., tuple[int, dict[str, Any]]]


def test_every_row_is_listed_and_counted(
    validated: Validated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ops_file(tmp_path / "mine.json", "copy", "copy", "unknown", "broken")
    code, content = validated("measured=mine.json")
    assert code == 1  # one that should have been predicted was not
    assert [row["status"] for row in content["rows"]] == ["predicted", "predicted", "unmade", "failed"]
    row = content["rows"][0]
    assert (row["id"], row["device_kind"], row["op"]) == ("mine-0000", "TPU v6 lite", "copy")
    assert (row["reported_ms"], row["predicted_ms"], row["ratio"]) == (10.0, 12.5, 1.25)
    assert (row["error"], row["abs_error"], row["bound"], row["interval_ms"]) == (None, 0.25, "hbm", [9.0, 11.0])
    assert content["rows"][2]["error"] == "no such op"
    assert content["rows"][3]["error"] == "compile_error: does not fit"
    figures = [content[name] for name in ("row_count", "failed_count", "unmade_count", "within_interval")]
    assert figures == [2, 1, 1, 1.0]
    assert {"libtpu", "jax", "tokamax"} <= content["versions"].keys()
    out = capsys.readouterr().out
    assert "10 -> 12.5, ratio 1.250; bound by HBM: fusion 9 (hbm); kernel 75%, layout 25%" in out
    assert "mine-0002 on TPU v6 lite cannot be made: no such op" in out
    assert "mine-0003 on TPU v6 lite failed: compile_error: does not fit" in out
    assert (tmp_path / "results" / "validate" / content["picture"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results" / "validate" / "mine.json").read_text())["name"] == "mine"


def test_what_cannot_be_made_again_is_no_failure(validated: Validated, tmp_path: Path) -> None:
    _ops_file(tmp_path / "mine.json", "copy", device_kind="TPU v1")
    code, content = validated("measured=mine.json")
    assert (code, content["unmade_count"]) == (0, 1)
    assert "expected one of v6e" in content["rows"][0]["error"]
    assert _FakeRunner.calls == []


def test_the_default_is_the_quick_set_and_the_job_sees_no_times(validated: Validated, tmp_path: Path) -> None:
    code, content = validated("results_dir=kept")
    assert (code, content["name"], len(content["rows"])) == (0, "quick", 60)
    assert json.loads((tmp_path / "kept" / "validate" / "quick.json").read_text()) == content
    assert all("times_ms" not in json.dumps(call) and "source" not in call["call"] for call in _FakeRunner.calls)


def test_what_is_finished_is_not_predicted_again(validated: Validated, tmp_path: Path) -> None:
    _ops_file(tmp_path / "mine.json", "copy", "broken", "unknown")
    first = validated("measured=mine.json")
    count = len(_FakeRunner.calls)
    _file(tmp_path / "mine.json", {"op": "copy", "arguments": {"n": 0}, "times_ms": [25.0]})  # a new time, no new call
    _, content = validated("measured=mine.json")
    assert (count, len(_FakeRunner.calls)) == (3, 3)
    assert content["rows"][0]["ratio"] == 0.5
    assert first[1]["rows"][0]["ratio"] == 1.25


def test_a_set_of_ones_own_rows_and_an_unknown_set(
    validated: Validated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ops_file(tmp_path / "mine.json", *["copy"] * 90)
    assert len(validated("measured=mine.json", "set=quick")[1]["rows"]) == 60
    assert len(validated("measured=mine.json")[1]["rows"]) == 90
    with pytest.raises(FileNotFoundError):
        (tmp_path / "out.json").unlink()
        validated("set=most")
    assert "error: set=most: expected one of splash, quick, wide, all." in capsys.readouterr().err


def test_the_picture_has_a_panel_for_each_chip() -> None:
    pairs = [Pair("copy", "n", Label.REPORTED, 1.0, 1.1, device_kind=kind) for kind in ("TPU7x", "TPU v5", "TPU7x")]
    assert [axes.get_title() for axes in agreement.parity(pairs).axes] == ["TPU7x", "TPU v5"]


def test_rows_of_one_reason_are_one_line() -> None:
    row = MeasuredRow(id="a", source="s", device_kind="TPU v5", op="copy", arguments={}, times_ms=(1.0,))
    other = msgspec.structs.replace(row, id="b")
    validation = Validation.of(
        "x", [Comparison.without(each, "unmade", "why") for each in (row, other)], sources=("s",)
    )
    assert table.missing_lines(validation) == ["2 rows, a to b, on TPU v5 cannot be made: why"]
    assert table.group_lines(validation)[-1].split() == ["all", "0", "-", "-", "-", "-", "-", "2"]


@pytest.mark.compile
def test_the_command_on_a_folder_of_ones_own(
    tmp_path: Path, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two rows that compile, one that tokamax refuses, and a measured candidate on record."""
    pytest.importorskip("tokamax")
    trials_path = tmp_path / "results" / "sweeps" / "x" / records.TRIALS_FILE
    jsonl.append(trials_path, make_trial(time_samples_ms=(11.0,)))
    jsonl.append(trials_path, make_trial(label=Label.MEASURED, backend="measure", time_samples_ms=(10.0,)))
    (tmp_path / "mine").mkdir()
    _file(tmp_path / "mine" / "a.json", ROW | {"head_dim": 72}, ROW | {"seq_len": 500})
    arguments = {"x": "bf16[384,64]", "scale": "f32[64]", "offset": "f32[64]", "axis": -1, "epsilon": 1e-6}
    options = {"xla_tpu_scoped_vmem_limit_kib": "32768"}
    row = {"op": "normalization", "arguments": arguments, "times_ms": [0.01], "compiler_options": options}
    _file(tmp_path / "mine" / "b.json", row)
    monkeypatch.chdir(tmp_path)

    def run() -> tuple[dict[str, Any], str]:
        arguments = ["measured=mine", "json=out.json", "progress=false", "workers=1"]
        monkeypatch.setattr(sys, "argv", ["validate", *arguments])
        assert validate.main() == 1  # one row could not be predicted
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    content, out = run()
    assert (content["row_count"], content["failed_count"]) == (2, 1)
    assert [row["id"] for row in content["rows"]] == ["a-0000", "a-0001", "b-0000"]
    assert content["rows"][0]["predicted_ms"] > 0
    assert content["rows"][1]["error"].startswith("compile_error: ")
    assert "500" in content["rows"][1]["error"]
    assert content["rows"][2]["predicted_ms"] > 0
    assert content["rows"][2]["compiler_options"] == options
    assert content["measured"]["rows"][0]["ratio"] == pytest.approx(1.1)
    assert "measured on TPU v6 lite: 1 row: median error 10.0%" in out
    assert (tmp_path / "results" / "validate" / content["picture"]).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(validate.Runner, "run", lambda *_, **__: pytest.fail("the outcome is in the cache"))
    assert run()[0]["rows"] == content["rows"]


def test_rows_that_the_time_limit_leaves_are_listed_as_not_tried(
    validated: Validated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ops_file(tmp_path / "mine.json", "copy", "copy")
    code, content = validated("measured=mine.json", "limit_s=0")
    assert code == 0
    assert [row["status"] for row in content["rows"]] == ["reported"] * 2
    assert "not predicted: not tried within limit_s=0" in capsys.readouterr().out


def test_a_time_limit_takes_no_rows_from_the_record(
    validated: Validated, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _ops_file(tmp_path / "mine.json", "copy", "copy")
    validated("measured=mine.json")
    (record,) = (tmp_path / "results" / "validate").glob("*.json")
    before = record.read_bytes()
    validated("measured=mine.json", "limit_s=0", "reuse=false")
    assert record.read_bytes() == before
    assert "has 2 predicted rows, more than these, and stays as it is" in capsys.readouterr().out
