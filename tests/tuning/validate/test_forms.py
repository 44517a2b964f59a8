"""Of one op's programs the one counts whose memory was reported."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest

from offline_tpu.collectives import Collective
from offline_tpu.machine.devices import DEVICES
from offline_tpu.prediction import OpCost, Prediction
from splash_workbench.trial_status import TrialError
from tuning.validate import job, plain, programs, table
from tuning.validate.programs import Program
from tuning.validate.record import Comparison, RowPrediction, Validation
from tuning.validate.rows import MeasuredRow, read_shipped

ROW = MeasuredRow(
    id="a", source="s", device_kind="TPU v5", op="copy", arguments={}, times_ms=(1.0,), peak_memory_mb=100.0
)


def _prediction(memory_mb: float, unresolved: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(ops=(), time_s=memory_mb, peak_live_bytes=memory_mb * 1e6, unresolved=unresolved)


@pytest.fixture
def predict_forms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A call that predicts a row of programs, each given by its memory or by why it does not compile."""

    def predict(*made: Any, reported: float | None = 100.0, op: str = "copy") -> dict[str, Any]:
        forms = [Program(lambda: None, (), form=str(number)) for number, _ in enumerate(made)]
        tried: list[int] = []

        def predicted(program: Program, *_: Any) -> Any:
            tried.append(int(program.form))
            outcome = made[int(program.form)]
            if isinstance(outcome, Exception):
                raise outcome
            return _prediction(outcome) if isinstance(outcome, float) else outcome

        monkeypatch.setattr(job.libtpu, "describe_topology", lambda name: None)
        monkeypatch.setattr(job, "forms", lambda row, device: forms)
        monkeypatch.setattr(job, "_predict", predicted)
        call = msgspec.structs.replace(ROW, op=op, peak_memory_mb=reported).call
        return job.predict_row({"call": call, "device": "v5p", "kept": None}) | {"tried": tried}

    return predict


def test_the_first_form_with_the_reported_memory_counts(predict_forms: Callable[..., dict[str, Any]]) -> None:
    found = predict_forms(150.0, 100.1, 100.0)
    assert (found["form"], found["compiled_memory_mb"], found["tried"]) == ("1", 100.1, [0, 1])


def test_where_no_form_has_it_the_nearest_counts(predict_forms: Callable[..., dict[str, Any]]) -> None:
    assert predict_forms(150.0, 60.0, 102.0)["form"] == "2"
    assert predict_forms(50.0, reported=None)["form"] == "0"


def test_a_form_that_does_not_compile_costs_only_itself(predict_forms: Callable[..., dict[str, Any]]) -> None:
    assert predict_forms(jax.errors.JaxRuntimeError("does not fit"), 50.0)["form"] == "1"
    with pytest.raises(TrialError, match="nor this"):
        predict_forms(ValueError("not this"), ValueError("nor this"))


def test_loops_that_are_not_known_count_in_the_chosen_form_only(predict_forms: Callable[..., dict[str, Any]]) -> None:
    unknown = _prediction(150.0, (f"fusion: {job.RUN_IN_PART}",))
    assert predict_forms(unknown, 100.0)["form"] == "1"
    assert predict_forms(unknown, 10.0)["unmade"] == f"fusion: {job.RUN_IN_PART}"


def test_of_a_collective_its_own_time_counts(predict_forms: Callable[..., dict[str, Any]]) -> None:
    """The benchmarks look for its event; the copy that the compiler puts behind it is another."""
    moved = Collective("all-gather", 2, 1, 100, 50, 100, 1.0)
    ops = (
        OpCost("gather", "", "collective", 2e-3, 0.0, 1, bound="link", collective=moved),
        OpCost("copy", "", "layout", 1e-3, 2e-3, 1, bound="hbm"),
    )
    whole = Prediction("v5p", 3e-3, 0, ops, 0, 0, 0, 0, 0, 0.0, 0.0)
    assert predict_forms(whole)["predicted_ms"] == pytest.approx(3)
    gathered = predict_forms(whole, op="all_gather")
    assert (gathered["predicted_ms"], len(gathered["ops"])) == (pytest.approx(2), 1)


def _compared(memory_mb: float, form: str = "", reported: float | None = 100.0) -> Comparison:
    prediction = RowPrediction(
        predicted_ms=1.5,
        bound="hbm",
        bottleneck="HBM",
        shares={"kernel": 1.0},
        ops=(),
        compiled_memory_mb=memory_mb,
        form=form,
    )
    return Comparison.predicted(msgspec.structs.replace(ROW, peak_memory_mb=reported), prediction, "0.0.52")


@pytest.mark.parametrize(("compiled", "same"), [(100.1, True), (104.8, True), (102.5, False), (107.0, False)])
def test_a_megabyte_may_be_of_either_kind(compiled: float, same: bool) -> None:
    assert _compared(compiled).same_memory is same


def test_rows_of_other_memory_are_counted_and_listed() -> None:
    rows = [_compared(100.1), _compared(120.0, "in two passes"), _compared(7.0, reported=None)]
    assert [row.same_memory for row in rows] == [True, False, None]
    validation = Validation.of("x", rows, sources=("s",))
    assert [group.other_memory_count for group in validation.groups] == [1]
    assert table.group_lines(validation)[-1].split() == ["all", "3", *["50.0%"] * 3, "-", "0%", "1"]
    listed = "\n".join(table.listed_lines(validation))
    assert listed.count("another compiler made") == 1
    assert "made what was timed: it held 100.0 MB, and this one's program holds 120.0" in listed
    assert "made in two passes, whose memory is nearest to the reported" in listed


def _shipped(op: str, *, contracted: Any = None) -> MeasuredRow:
    def fits(row: MeasuredRow) -> bool:
        dimensions = row.arguments.get("ragged_dot_dimension_numbers") or {}
        return row.op == op and (contracted is None or dimensions["dot_dimension_numbers"][0] == contracted)

    return next(row for row in read_shipped() if fits(row))


def _forms(row: MeasuredRow) -> list[Program]:
    return programs.forms(row, DEVICES["v5p"])


def test_every_op_has_its_own_form_and_only_some_have_others() -> None:
    pytest.importorskip("tokamax")
    kernel, made, masks = _forms(_shipped("ragged_dot", contracted=[[1], [2]]))
    flag = "xla_tpu_enable_ragged_dot_kernel"
    options = [program.compiler_options for program in (kernel, made, masks)]
    assert options == [{flag: "true"}, {}, {flag: "false"}]
    assert [bool(program.form) for program in (kernel, made, masks)] == [True, False, True]
    dense = next(row for row in read_shipped() if (row.op, row.device_kind) == ("ragged_dot", "TPU v5"))
    assert [program.compiler_options for program in _forms(dense)] == [{flag: "false"}, {flag: "true"}, {}]
    assert [bool(program.form) for program in _forms(_shipped("gated_linear_unit"))] == [False, True]
    assert [program.form for program in _forms(_shipped("dot_product_attention"))] == [""]


def test_a_gated_linear_unit_of_another_kind_has_one_form() -> None:
    pytest.importorskip("tokamax")
    row = _shipped("gated_linear_unit")
    for change in ({"precision": ["DEFAULT", "DEFAULT"]}, {"return_residuals": True}):
        other = msgspec.structs.replace(row, arguments=row.arguments | change)
        assert [program.form for program in _forms(other)] == [""]


def test_without_a_reported_memory_there_is_one_form() -> None:
    pytest.importorskip("tokamax")
    row = msgspec.structs.replace(_shipped("ragged_dot"), peak_memory_mb=None)
    assert [program.form for program in _forms(row)] == [""]


@pytest.mark.compile
def test_forms_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokamax")
    monkeypatch.setattr("sys.argv", ["worker"])  # tokamax reads its flags there
    dimensions = {
        "dot_dimension_numbers": [[[1], [2]], [[], []]],
        "lhs_ragged_dimensions": [0],
        "rhs_group_dimensions": [0],
    }
    ragged = _shipped("ragged_dot").arguments | {
        "lhs": "f32[24,8]",
        "rhs": "f32[3,16,8]",
        "group_sizes": [10, 0, 14],
        "ragged_dot_dimension_numbers": dimensions,
    }
    unit = _shipped("gated_linear_unit").arguments | {"x": "f32[4,6,8]", "weights": "f32[8,2,16]"}
    for op, arguments in {"ragged_dot": ragged, "gated_linear_unit": unit}.items():
        row = msgspec.structs.replace(ROW, op=op, arguments=arguments)
        first, *others = (_computed(program) for program in _forms(row))
        for other in others:
            np.testing.assert_allclose(first, other, rtol=2e-2, atol=1e-2, err_msg=op)
        assert np.abs(first).max() > 0.1


def _computed(program: Program) -> np.ndarray[Any, Any]:
    shapes, tree = jax.tree.flatten(program.args)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = [jax.random.normal(key, shape.shape, shape.dtype) for key, shape in zip(keys, shapes, strict=True)]
    return np.asarray(jax.tree.leaves(program.fn(*jax.tree.unflatten(tree, arrays)))[0], np.float32)


def test_a_gated_linear_unit_without_an_activation() -> None:
    x, weights = jnp.ones((2, 3)), jnp.full((3, 2, 4), 2.0)
    np.testing.assert_array_equal(plain.gated_linear_unit(None, None)(x, weights), np.full((2, 4), 36.0))
