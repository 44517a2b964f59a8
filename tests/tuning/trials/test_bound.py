"""The matrix units' bound, and what is said of a prediction that is under it."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from offline_tpu.machine import devices
from splash_attn.types import AttentionShape
from tuning.trials.bound import OVER_BOUND, mxu_bound_ms
from tuning.trials.records import Trial
from tuning.trials.tables import note_lines

SHAPE = AttentionShape(1, 12, 39826, 39826, 64)


def test_bound_by_hand() -> None:
    scores = 12 * 39826**2
    for name, cycles_of_a_score in (("v6e", 1 / 1024 + 64 * 2 / 524288), ("v7x", 1 / 1024 + 64 * 2 / 524288)):
        device = devices.by_name(name)
        expected = scores * cycles_of_a_score / device.clock_hz * 1e3
        assert mxu_bound_ms(SHAPE, device) == pytest.approx(expected, rel=2e-3), name
    v5e = devices.by_name("v5e")  # four arrays of 128 rows: a score takes twice the time of its 64 products
    assert mxu_bound_ms(SHAPE, v5e) == pytest.approx(scores * (128 + 64) * 2 / 197e12 * 1e3)


def test_every_device_has_a_bound() -> None:
    assert all(mxu_bound_ms(SHAPE, device) for device in devices.DEVICES.values())


def test_a_time_under_the_bound_is_said_to_be_none(make_trial) -> None:
    bound_ms = mxu_bound_ms(make_trial().shape, devices.by_name("v6e"))
    assert bound_ms
    for time_ms, said in ((1.01 * bound_ms, False), (0.99 * bound_ms, True)):
        lines = note_lines([make_trial(time_samples_ms=(time_ms,), kernel_time_ms=time_ms)])
        assert any(OVER_BOUND in line for line in lines) == said


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"time_samples_ms": (0.0001,), "kernel_time_ms": 0.005}, "contradicts the kernel in it, which takes 0.005 ms"),
        ({"time_samples_ms": (0.002,), "cycles": 17_500}, "contradicts the kernel in it, which takes 0.01 ms"),
        ({"time_samples_ms": (0.0001,)}, "half of what the matrix units need"),
        ({"time_samples_ms": (0.0001,), "kernel_time_ms": 0.0001}, "half of what the matrix units need"),
        ({"time_samples_ms": (0.0001,), "dtype": "float32"}, "half of what the matrix units need"),
        ({"time_samples_ms": (-1.0,)}, "time_samples_ms=-1.0: expected a positive"),
        ({"time_samples_ms": (0.0,)}, "time_samples_ms=0.0: expected a positive"),
        ({"time_samples_ms": (5.0, math.nan, 5.0)}, "time_samples_ms=nan: expected a positive"),
        ({"time_samples_ms": (math.inf,)}, "time_samples_ms=inf: expected a positive"),
        ({"kernel_time_ms": -0.1}, "kernel_time_ms=-0.1: expected a positive"),
        ({"kernel_time_ms": 1e-6}, "half of what the matrix units need"),
    ],
)
def test_a_time_that_cannot_be_is_refused(
    make_trial: Callable[..., Trial], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trial(**fields)


def test_a_time_that_can_be_is_kept(make_trial: Callable[..., Trial]) -> None:
    assert make_trial(time_samples_ms=(0.005,), kernel_time_ms=0.005, cycles=8_000).time_ms == 0.005
    assert make_trial(time_samples_ms=(1e-6,), device_kind="cpu").time_ms == 1e-6  # no bound is known
