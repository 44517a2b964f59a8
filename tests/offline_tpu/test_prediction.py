"""What a prediction says of its bottleneck."""

import pytest

from offline_tpu.machine import residuals
from offline_tpu.prediction import OpCost, Prediction


def op(name: str, time_s: float, **more) -> OpCost:
    return OpCost(name, "jit(f)/blocks/dot_general", "matmul", time_s, 0.0, 1, **more)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"utilization": {"MATMUL": 0.9, "VALU": 0.5}}, "MXU"),
        ({"utilization": {"MXU": 0.9, "VALU": 0.5}}, "MXU"),
        ({"utilization": {"MATMUL": 0.2, "EUP": 0.8}}, "vector units"),
        ({"utilization": {"VLOAD:FILL": 0.7, "VALU": 0.5}}, "VMEM"),
        ({"utilization": {"SALU": 0.1}}, "scalar unit"),
        ({"utilization": {}}, "scalar unit"),
        ({"utilization": {"MATMUL": 0.9}, "bound": "hbm"}, "HBM"),
        ({"bound": "link"}, "links"),
    ],
)
def test_the_bottleneck_of_an_op(fields, expected):
    assert op("a", 1.0, **fields).bottleneck == expected


@pytest.fixture
def prediction() -> Prediction:
    ops = (
        op("dot.1", 3e-3, utilization={"MATMUL": 0.9}, hbm_bytes=2**20, code_bytes=3 * 2**9),
        op("copy.1", 1e-3, bound="hbm", hbm_bytes=2**21),
        op("wait.1", 0.0, bound="hbm", unresolved=("trips of a loop",)),
    )
    return Prediction("v6e", 4e-3, 7, ops, 2**20, 0, 0, 3 * 2**20, 5 * 2**20, 1.0, 1.0, code_bytes=2**19)


def test_a_prediction_in_one_line(prediction, monkeypatch):
    monkeypatch.setattr(residuals, "factors", lambda device, times_s: (0.9, 1.25))
    assert str(prediction) == (
        "4.000 ms on one v6e (predicted; 3.6 to 5), bound by MXU 75%, HBM 25%; HBM: 3.0 MiB moved, 5.0 MiB held at "
        "most; VMEM: 1.0 MiB; code: 0.50 MiB"
    )
    assert prediction.bottleneck == "MXU"


def test_a_table_has_the_longest_ops_and_what_was_assumed(prediction):
    _, head, first, *rest = prediction.table(limit=1).splitlines()
    assert head.split("  ")[0] == "ms"
    assert first.split() == ["3.000", "75.0%", "1", "MXU", "MATMUL", "90%", "1.0", "1.5", "dot.1", "blocks"]
    assert rest == ["... and 1 shorter ops", "assumed: wait.1: trips of a loop"]
