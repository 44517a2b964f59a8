"""Wall time of a compiled function on the device that is here."""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
from scipy.stats import binom

_CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """When enough has been measured.

    Attributes:
      warm_up_count: runs that are not kept.
      min_samples, max_samples: bounds of the number of runs kept.
      target_ci_fraction: stop once the half width of the median's 95% confidence interval is this part of the median.

    Raises:
      ValueError: a number is out of range.
    """

    warm_up_count: int = 2
    min_samples: int = 7
    max_samples: int = 100
    target_ci_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.warm_up_count < 1:
            raise ValueError(f"warm_up_count={self.warm_up_count}: expected at least 1.")
        if not 6 <= self.min_samples <= self.max_samples:
            raise ValueError(
                f"min_samples={self.min_samples}, max_samples={self.max_samples}: expected 6 <= min <= max "
                "(fewer than 6 samples do not bound a median with 95% confidence)."
            )
        if not 0 < self.target_ci_fraction < 1:
            raise ValueError(f"target_ci_fraction={self.target_ci_fraction}: expected between 0 and 1.")


def median_ci_fraction(samples: list[float]) -> float:
    """Half width of the median's 95% confidence interval as a part of the median; no distribution is assumed.

    The interval is between order statistics (binomial with p = 1/2).
    """
    ordered = sorted(samples)
    below = int(binom.ppf((1 - _CONFIDENCE) / 2, len(ordered), 0.5))
    low, high = ordered[max(below - 1, 0)], ordered[min(len(ordered) - below, len(ordered) - 1)]
    return (high - low) / 2 / statistics.median(ordered)


def sample_times_ms(
    run: Callable[[], object], settings: MeasureSettings, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Times of single runs, each waited for, until the median is known well enough or max_samples are taken."""
    for _ in range(settings.warm_up_count):
        jax.block_until_ready(run())
    samples: list[float] = []
    while len(samples) < settings.max_samples:
        start = clock()
        jax.block_until_ready(run())
        samples.append((clock() - start) * 1e3)
        if len(samples) >= settings.min_samples and median_ci_fraction(samples) <= settings.target_ci_fraction:
            break
    return samples
