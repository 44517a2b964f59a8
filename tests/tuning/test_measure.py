import itertools
import random

import pytest

from tuning.measure import MeasureSettings, median_ci_fraction, sample_times_ms


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


def _clock(durations_s: list[float]):  # type: ignore[no-untyped-def]
    times = itertools.accumulate(itertools.chain.from_iterable((1.0, d) for d in itertools.cycle(durations_s)))
    return lambda: next(times)


def test_quiet_device_needs_the_least_samples() -> None:
    runs = []
    settings = MeasureSettings(warm_up_count=3, min_samples=7, max_samples=50)
    samples = sample_times_ms(lambda: runs.append(1), settings, clock=_clock([0.002]))
    assert samples == pytest.approx([2.0] * 7)
    assert len(runs) == 3 + 7


def test_noisy_device_is_sampled_until_the_cap() -> None:
    settings = MeasureSettings(min_samples=7, max_samples=20)
    assert len(sample_times_ms(lambda: None, settings, clock=_clock([0.001, 0.009]))) == 20


@pytest.mark.parametrize(
    "bad", [{"warm_up_count": 0}, {"min_samples": 5}, {"min_samples": 9, "max_samples": 8}, {"target_ci_fraction": 0}]
)
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        MeasureSettings(**bad)
