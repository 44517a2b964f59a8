import getpass
import socket
from pathlib import Path

import pytest

from tuning.selfcheck.chip import random_like
from tuning.selfcheck.records import Predicted, TimedRow, anonymous, anonymous_tree, file_name
from tuning.selfcheck.tasks import choose_rows, numerics_tasks
from tuning.validate import rows


def row(predicted: Predicted, *notes: str) -> TimedRow:
    return TimedRow(
        id="kernels: k",
        source="s",
        device_kind="TPU7x",
        op="splash_attn",
        arguments={},
        config={},
        times_ms=(9.0, 10.0, 12.0),
        notes=notes,
        predicted=predicted,
    )


@pytest.mark.parametrize(
    ("predicted", "verdict", "inside"),
    [
        (Predicted(time_ms=9.0, interval_ms=(8.0, 10.0)), "within the interval", True),
        (Predicted(time_ms=9.0, interval_ms=(7.0, 8.0)), "outside by 25.0%, over it", False),
        (Predicted(time_ms=30.0, interval_ms=(20.0, 40.0)), "outside by 50.0%, under it", False),
        (Predicted(time_ms=11.0), "predicted +10.0%; no interval is stated", None),
        (Predicted(says="no libtpu"), "no prediction (no libtpu)", None),
    ],
)
def test_verdicts(predicted: Predicted, verdict: str, inside: bool | None) -> None:
    assert (row(predicted).verdict, row(predicted).inside) == (verdict, inside)
    assert row(predicted, "wall time, dispatch included: so").inside is None


def test_texts_name_no_machine() -> None:
    text = f"{Path.home()}/a and /opt/x/y.py on {socket.gethostname()} by {getpass.getuser()} at 10.0.0.3"
    assert anonymous(text) == "HOME/a and PATH on NAME by NAME at ADDRESS"
    kept = "see https://cloud.google.com/tpu/docs/v6e, tokamax/data/x.json, 1/2"
    assert anonymous_tree({"a": [kept, 1, None]}) == {"a": [kept, 1, None]}


def test_the_files_name_is_the_chips() -> None:
    assert file_name("TPU v6 lite", "2026-11-26") == "selfcheck-tpu-v6-lite-2026-11-26.json"


@pytest.mark.parametrize("kind", ["TPU v6 lite", "TPU7x", "TPU v5 lite", "TPU v5"])
def test_rows_are_of_the_chip_and_of_every_program(kind: str) -> None:
    shipped = rows.read_shipped()
    chosen = choose_rows(shipped, kind, 15)
    assert 12 <= len(chosen) == len({row.id for row in chosen}) <= 15
    assert {row.device_kind for row in chosen} == {kind}
    assert not {row.op for row in chosen} & {"psum", "all_gather"}
    assert choose_rows(shipped, "TPU v9", 15) == []


def test_every_softmax_is_checked_on_a_tpu() -> None:
    names = {task.name.partition(",")[0] for task in numerics_tasks({"platform": "tpu"})}
    assert names == {"online", "fixed_bound", "int8"}


def test_random_data_is_spread_as_asked() -> None:
    import jax
    import numpy as np

    def make(shape: tuple[int, ...], dtype: str, seed: int = 1) -> np.ndarray:
        return np.asarray(random_like(jax.ShapeDtypeStruct(shape, dtype), 0.5, seed))

    x, y = make((301, 401), "float32"), make((301, 401), "float32", 2)
    assert x.std() == pytest.approx(0.5, rel=0.02) and abs(x.mean()) < 0.01
    for a, b in ((x, y), (x[1:], x[:-1]), (x[:, 1:], x[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02
    assert set(make((501,), "int32")) == {0, 1} and make((7,), "bool").all()
    given = np.arange(3)
    assert random_like(given, 1.0, 0) is given
