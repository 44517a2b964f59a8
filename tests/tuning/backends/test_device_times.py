import itertools
import random
from typing import Any

import pytest

from splash_workbench.profiles.xla_pb2 import XSpace
from tuning.backends import device_times as module
from tuning.backends.device_times import MeasureSettings, Run, measure, median_ci_fraction, quality_notes, runs_of


def test_interval_of_equal_samples_is_nothing() -> None:
    assert median_ci_fraction([3.0] * 9) == 0


def test_interval_holds_the_true_median_about_as_often_as_it_says() -> None:
    rng = random.Random(0)
    held = 0
    for _ in range(500):
        samples = [rng.lognormvariate(0, 0.5) for _ in range(15)]
        # The true median is 1. The interval is asymmetric: ask whether its full width around the sample's median does.
        median = sorted(samples)[7]
        held += abs(median - 1) <= 2 * median_ci_fraction(samples) * median
    assert held >= 0.95 * 500


def test_six_samples_span_their_whole_range() -> None:
    assert median_ci_fraction([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx(2.5 / 3.5)


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Makes single runs take the given seconds, over and over."""

    def set_durations(*durations_s: float) -> None:
        times = itertools.accumulate(itertools.chain.from_iterable((1.0, d) for d in itertools.cycle(durations_s)))
        real = module.by_wall_clock
        monkeypatch.setattr(module, "by_wall_clock", lambda run, count: real(run, count, lambda: next(times)))

    return set_durations


def test_quiet_device_needs_the_least_samples(wall_clock: Any) -> None:
    wall_clock(0.002)
    runs: list[int] = []
    settings = MeasureSettings(warm_up_count=3, min_samples=7, max_samples=50)
    found = measure(lambda: runs.append(1), settings, platform="cpu", kernel="k")
    assert found.times_ms == pytest.approx([2.0] * 7)
    assert len(runs) == 3 + 7
    assert found.notes == ("wall time of the host: a CPU has no device plane in the profile",)
    assert found.kernel_time_ms is None


def test_noisy_device_is_sampled_until_the_cap(wall_clock: Any) -> None:
    wall_clock(0.001, 0.009, 0.004)
    settings = MeasureSettings(min_samples=7, max_samples=20)
    found = measure(lambda: None, settings, platform="cpu", kernel="k")
    assert len(found.times_ms) == 20
    assert any(note.startswith("noisy: median known to") for note in found.notes)


def test_a_slow_device_is_sampled_no_longer_than_its_time(wall_clock: Any) -> None:
    wall_clock(1.0, 9.0, 4.0)
    settings = MeasureSettings(min_samples=7, max_samples=100, max_time_s=1e-9)
    found = measure(lambda: None, settings, platform="cpu", kernel="k")
    assert len(found.times_ms) == 7
    assert any(note.startswith("noisy: median known to") for note in found.notes)


def test_a_profile_without_the_devices_runs_gives_way_to_the_wall_clock_and_says_so() -> None:
    """This machine's own profiler, asked for an accelerator's times."""
    import jax.numpy as jnp

    settings = MeasureSettings(warm_up_count=1, min_samples=6, max_samples=6)
    found = measure(lambda: jnp.arange(8.0) + 1, settings, platform="newchip", kernel="k")
    assert len(found.times_ms) == 6
    assert found.notes[0] == (
        "wall time, dispatch included: the profile has no runs of programs, and 0 kernels for 6 runs"
    )


@pytest.mark.parametrize(
    "bad",
    [
        {"warm_up_count": 0},
        {"min_samples": 5},
        {"min_samples": 9, "max_samples": 8},
        {"target_ci_fraction": 0},
        {"max_time_s": 0},
    ],
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        MeasureSettings(**bad)


def _noise(count: int, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [10 * (1 + rng.gauss(0, 0.002)) for _ in range(count)]


def test_steady_samples_leave_nothing_to_say() -> None:
    assert [notes for seed in range(200) if (notes := quality_notes(_noise(20, seed), 0.01))] == []


def test_throttling_is_noticed() -> None:
    samples = [x * (1 + 0.1 * i / 30) for i, x in enumerate(_noise(30))]
    assert any("drift: +6" in note and "throttles" in note for note in quality_notes(samples, 0.05))


def test_too_little_warm_up_is_noticed() -> None:
    samples = [x * (1 + 0.2 * 0.8**i) for i, x in enumerate(_noise(30))]
    assert any("drift: -" in note and "too little warm-up" in note for note in quality_notes(samples, 0.05))


def test_two_modes_are_told_apart_from_outliers() -> None:
    modes = [x * (1.3 if i % 3 == 0 else 1) for i, x in enumerate(_noise(30))]
    (note,) = [note for note in quality_notes(modes, 0.5) if "two modes" in note]
    assert note.startswith("two modes: 20 samples at 9.987 ms")
    assert "10 at 13.0" in note
    outliers = [x * (2 + i / 10 if i % 7 == 3 else 1) for i, x in enumerate(_noise(30))]
    (note,) = quality_notes(outliers, 0.5)
    assert note.startswith("outliers: 4 of 30 samples")


def _space(plane_name: str, lines: dict[str, list[tuple[str, int, int]]]) -> Any:
    """An XSpace: line -> events (name, start in us, duration in us)."""
    space = XSpace()
    plane = space.planes.add(name=plane_name)
    names = list(dict.fromkeys(name for events in lines.values() for name, _, _ in events))
    for index, name in enumerate(names, start=1):
        plane.event_metadata[index].id = index
        plane.event_metadata[index].name = name
    for line_name, events in lines.items():
        line = plane.lines.add(name=line_name, timestamp_ns=5000)
        for name, start_us, duration_us in events:
            line.events.add(
                metadata_id=1 + names.index(name), offset_ps=start_us * 10**6, duration_ps=duration_us * 10**6
            )
    return space


def test_device_times_are_those_of_the_programs_runs() -> None:
    space = _space(
        "/device:TPU:0",
        {
            "XLA Modules": [("jit_attention(1)", 0, 900), ("jit_attention(1)", 2000, 1000)],
            "XLA Ops": [
                ("copy.1", 0, 200),
                ("splash_attention.1", 200, 700),
                ("copy.1", 2000, 200),
                ("splash_attention.1", 2200, 500),
                ("splash_attention.2", 2700, 300),
            ],
        },
    )
    assert runs_of(space, 2, "splash_attention") == [Run(0.9, 0.7), Run(1.0, 0.8)]
    with pytest.raises(module.NoDeviceTimesError, match="2 runs of programs, expected 3"):
        runs_of(space, 3, "splash_attention")


def test_a_gpus_kernels_are_dealt_out_to_the_runs() -> None:
    streams = {
        "Stream #14(Compute)": [("a", 0, 100), ("b", 150, 50), ("a", 1000, 100), ("b", 1150, 90)],
        "Stream #15(Compute)": [("c", 50, 250), ("c", 1050, 20)],
    }
    assert runs_of(_space("/device:GPU:0", streams), 2, "k") == [Run(0.3), Run(0.24)]
    streams["Stream #15(Compute)"].append(("stray", 1100, 10))
    with pytest.raises(module.NoDeviceTimesError, match="7 kernels for 2 runs"):
        runs_of(_space("/device:GPU:0", streams), 2, "k")
