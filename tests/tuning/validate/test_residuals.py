import msgspec
import pytest

from tuning.validate import residuals
from tuning.validate.record import Comparison, Validation


def row(op: str, category: str, ratio: float) -> Comparison:
    return Comparison(
        id=op,
        device_kind="TPU v6 lite",
        op=op,
        shape="",
        config="",
        reported_ms=ratio,
        predicted_ms=1.0,
        status="predicted",
        shares={category: 1.0},
    )


def test_every_program_weighs_the_same() -> None:
    rows = (*(row("many", "kernel", 1.0) for _ in range(96)), row("few", "kernel", 2.0), row("few", "layout", 3.0))
    found = residuals.residuals_of(rows)
    assert found["kernel"]["v6e"].rows == 97
    assert (found["kernel"]["v6e"].low, found["kernel"]["v6e"].high) == pytest.approx((1.0, 2.0))
    assert found["memory"]["all"].low == 3.0


def test_rows_without_a_prediction_are_left_out() -> None:
    assert residuals.residuals_of((msgspec.structs.replace(row("op", "kernel", 1.0), predicted_ms=None),)) == {}


def test_a_chip_has_a_line_of_all_its_programs() -> None:
    rows = [row("one", "kernel", 1.0), row("two", "kernel", 1.25), row("three", "matmul", 9.0)]
    rows[2] = msgspec.structs.replace(rows[2], device_kind="TPU v5")
    first, second = Validation.of("x", rows, sources=("s",)).chips
    assert (first.device_kind, first.row_count, second.op, second.row_count) == ("TPU v5", 1, "all", 2)
    assert second.max_abs_error == pytest.approx(0.2)
