"""Rows are compiled with the libtpu that they were timed with, where it is known and here."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from offline_tpu import libtpu
from offline_tpu.machine.errors import UnsupportedVersionError
from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Outcome
from tuning.validate import __main__ as validate
from tuning.validate import run
from tuning.validate.record import Validation
from tuning.validate.rows import MeasuredRow, read, read_shipped

NEW, OLD = libtpu.SUPPORTED_LIBTPU, libtpu.EARLIER_LIBTPUS[0]
ROW = MeasuredRow(id="a", source="mine", device_kind="TPU v6 lite", op="copy", arguments={"n": 1}, times_ms=(10.0,))
PREDICTED = {
    "predicted_ms": 12.5,
    "bound": "hbm",
    "bottleneck": "HBM",
    "shares": {"layout": 1.0},
    "ops": [],
    "compiled_memory_mb": 1.0,
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Versions of libtpu that lie beside the one installed; may be changed."""
    found: set[str] = set()
    monkeypatch.setattr(libtpu, "is_beside", lambda compiler: compiler in found)
    run._made_by.cache_clear()
    yield found
    run._made_by.cache_clear()


def test_what_a_row_or_its_file_says_counts_before_what_is_inferred(tmp_path: Path) -> None:
    rows = [{"arguments": {}, "times_ms": [1]}, {"arguments": {}, "times_ms": [1], "libtpu": "0.0.45"}]
    content = {"source": "openxla/tokamax, a file", "device_kind": "TPU v5", "op": "copy", "rows": rows}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(content))
    assert [row.timed_with for row in read(path)] == [OLD, "0.0.45"]
    path.write_text(json.dumps(content | {"libtpu": NEW}))
    assert [row.timed_with for row in read(path)] == [NEW, "0.0.45"]
    assert ROW.timed_with is None
    shipped = read_shipped()
    assert {row.timed_with for row in shipped} == {*libtpu.EARLIER_LIBTPUS, None}
    oldest = {row.op for row in shipped if row.timed_with == libtpu.EARLIER_LIBTPUS[-1]}
    assert oldest == {"triangle_multiplication", "normalization", "normalization_vjp"}  # published from January 2026


def test_a_compiler_that_is_not_here_or_whose_dumps_are_not_known_is_not_taken(here: set[str]) -> None:
    old = msgspec.structs.replace(ROW, libtpu=OLD)
    assert [run.compiler_of(row) for row in (ROW, old)] == [NEW, NEW]
    here |= {OLD, "0.0.47"}
    assert [run.compiler_of(row) for row in (ROW, old)] == [NEW, OLD]
    assert run.compiler_of(msgspec.structs.replace(ROW, libtpu="0.0.47")) == NEW


@pytest.mark.parametrize(
    ("device_kind", "op", "expected"),
    [
        ("TPU7x", "pallas_mosaic_tpu_flash_attention_vjp", NEW),
        ("TPU7x", "xla_chunked_dot_product_attention", OLD),
        ("TPU v5", "pallas_mosaic_tpu_flash_attention", OLD),
    ],
)
def test_what_takes_a_compiler_minutes_is_left_to_another(
    device_kind: str, op: str, expected: str, here: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here.add(OLD)
    row = msgspec.structs.replace(ROW, device_kind=device_kind, op=op, libtpu=OLD)
    assert run.compiler_of(row) == expected
    here.clear()
    monkeypatch.setattr(libtpu, "fetch_beside", here.add)
    run.fetch_compilers([row], print)
    assert here == {expected} - {NEW}


def test_each_compiler_has_workers_and_predictions_of_its_own(here: set[str], tmp_path: Path) -> None:
    here.add(OLD)
    rows = [msgspec.structs.replace(ROW, id=name, libtpu=name) for name in (NEW, OLD)]
    libraries = []

    def run_job(job, payload, *, variables, timeout_s):
        libraries.append(variables(tmp_path).get("TPU_LIBRARY_PATH"))
        return Outcome(Status.OK, PREDICTED, None, "", 1.0)

    runner = SimpleNamespace(run=run_job, cancel=lambda: None)
    compared = run.compare(rows, runner=runner, cache=None, workers=1, timeout_s=1.0)
    assert [(row.id, row.libtpu, row.timed_with) for row in compared] == [(NEW, NEW, NEW), (OLD, OLD, OLD)]
    assert set(libraries) == {None, str(libtpu.folder_beside(OLD) / "libtpu" / "libtpu.so")}
    assert run.dump_path(tmp_path, ROW, NEW) != run.dump_path(tmp_path, ROW, OLD)
    assert Validation.of("mine", compared, sources=()).compilers == {NEW: 1, OLD: 1}


def test_what_is_missing_is_fetched_once_or_said_to_be_missing(
    here: set[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetched: list[str] = []

    def fetch(compiler: str) -> None:
        fetched.append(compiler)
        if len(fetched) == 1:
            raise UnsupportedVersionError(f"libtpu {compiler} cannot be fetched (no network)")
        here.add(compiler)

    monkeypatch.setattr(libtpu, "fetch_beside", fetch)
    rows = [msgspec.structs.replace(ROW, libtpu=OLD)] * 2
    for _ in range(3):
        run.fetch_compilers([ROW, *rows], print)
    run.fetch_compilers([ROW], print)
    assert fetched == [OLD, OLD]
    said = capsys.readouterr().out.splitlines()
    assert said[1] == f"libtpu {OLD} cannot be fetched (no network); until then libtpu {NEW} compiles these rows"
    assert [line.partition(", ")[0] for line in said[::2]] == [f"fetching libtpu {OLD}"] * 2


def test_a_folder_that_holds_something_else_is_named(here: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libtpu, "fetch_beside", lambda compiler: None)
    with pytest.raises(UnsupportedVersionError, match=f"libtpu-{OLD}: expected libtpu {OLD}, .*; delete the folder"):
        run.fetch_compiler(OLD, print)


def test_one_may_be_chosen_for_all_rows(here: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libtpu, "fetch_beside", here.add)
    assert validate._checked_compiler(None) is None
    assert [validate._checked_compiler(name) for name in (NEW, OLD)] == [NEW, OLD] and here == {OLD}
    known = ", ".join((NEW, *libtpu.EARLIER_LIBTPUS))
    with pytest.raises(UserError, match=f"libtpu=0.0.1: expected one of {known}, whose dumps are known, or null"):
        validate._checked_compiler("0.0.1")


def test_pip_that_fails_leaves_nothing_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COGVIDEOX_SPLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(
        UnsupportedVersionError, match=rf"^libtpu {OLD} cannot be fetched \(.*\); by hand: pip install "
    ):
        libtpu.fetch_beside(OLD)
    assert list((tmp_path / "cache").iterdir()) == []
