"""HBM that keeps up its full bandwidth for a while only. Bandwidth 1 GB/s, of which 0.8 for ever; a burst of 10 ms."""

import pytest

from offline_tpu.machine.sustained import slowdowns
from offline_tpu.prediction import Loop, OpCost

BYTES_PER_S, SHARE, BURST_S = 1e9, 0.8, 10e-3


def op(name: str, time_s: float, load: float, *, loops: tuple[Loop, ...] = (), calls: int = 1) -> OpCost:
    """Return an op of `calls * time_s` seconds that moves `load` of what HBM moves at most."""
    hbm_bytes = round(load * time_s * BYTES_PER_S)
    bound = "hbm" if load > 0.5 else "compute"
    return OpCost(name, "", "layout", time_s * calls, 0.0, calls, hbm_bytes=hbm_bytes, bound=bound, loops=loops)


def slower(*ops: OpCost) -> dict[str, float]:
    """Return the slowdowns."""
    return dict(slowdowns(ops, BYTES_PER_S, SHARE, BURST_S))


def test_a_burst_costs_nothing():
    assert slower(op("copy", 9.9e-3, 1.0)) == {}


def test_what_follows_a_burst_is_at_the_sustained_rate():
    # 10 ms of 30 at full bandwidth, the bytes of the other 20 in 25.
    assert slower(op("copy", 30e-3, 1.0)) == pytest.approx({"copy": 35 / 30})
    assert slower(op("first", 10e-3, 1.0), op("second", 20e-3, 1.0)) == pytest.approx({"second": 1.25})


def test_work_for_the_core_gives_rest():
    assert slower(op("first", 10e-3, 1.0), op("matmul", 10e-3, 0.0), op("second", 10e-3, 1.0)) == {}
    # 5 ms of rest give back what 5 ms * 0.8 / 0.2 of full bandwidth take, but no more than a whole burst.
    rested = slower(op("first", 10e-3, 1.0), op("matmul", 1e-3, 0.0), op("second", 10e-3, 1.0))
    assert rested == pytest.approx({"second": 1 + 0.6 * 0.25})


def test_load_that_can_be_kept_up_is_never_slower():
    assert slower(op("matmul", 10.0, 0.79)) == {}


def test_a_loop_is_as_its_mean():
    loop = Loop(1000, 2e-3)
    half = [op("copy", 1e-3, 1.0, loops=(loop,), calls=1000), op("matmul", 1e-3, 0.0, loops=(loop,), calls=1000)]
    assert slower(*half) == {}
    busy = [op("copy", 1.8e-3, 1.0, loops=(loop,), calls=1000), op("matmul", 0.2e-3, 0.0, loops=(loop,), calls=1000)]
    # All but the first 20 ms of 2 s at a load of 0.9, which the loop's memory-bound op pays for.
    assert slower(*busy) == pytest.approx({"copy": 1 + 1.98 * (0.9 / 0.8 - 1) / 1.8})
