"""Time a compiled function on the device that is here, and say what the times are worth.

A device's own time is taken from the profiler (the runs of the program on the device's plane), so that neither Python
nor the dispatch is in it. Only where a profile has no such runs, as on a CPU, the wall clock is taken, and said so.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import scipy  # its stats, which workers wait a second for, only where they are used

from splash_workbench.profiles import profiler, reader
from splash_workbench.profiles.xla_pb2 import XSpace

_CONFIDENCE = 0.95
#: The smallest trend, or distance of a second mode, that is reported, as a part of the median.
_WORTH_SAYING = 0.03
#: Deviations (robust, from the median) past which a sample is an outlier, and the part of samples that are too many.
_OUTLIER_DEVIATIONS, _MANY_OUTLIERS = 6.0, 0.1
#: Chance to see a trend in samples that have none.
_TREND_P = 0.001
#: Each of two modes has this part of the samples at least, and lies as many deviations from the other.
_MODE_PART, _MODE_DEVIATIONS = 0.2, 6.0
_GPU_PLANE, _GPU_STREAM = "/device:GPU:", "Stream"


@dataclasses.dataclass(frozen=True)
class MeasureSettings:
    """When to stop measuring. Raises ValueError for a number out of range.

    Attributes:
      warm_up_count: runs that are not kept.
      min_samples, max_samples: bounds of the number of runs kept.
      target_ci_fraction: stop once the half width of the median's 95% confidence interval is this part of the median.
      max_time_s: take no more than min_samples after this; a slow or noisy device must not use up a trial's time limit.
    """

    warm_up_count: int = 2
    min_samples: int = 7
    max_samples: int = 100
    target_ci_fraction: float = 0.01
    max_time_s: float = 30.0

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
        if not self.max_time_s > 0:
            raise ValueError(f"max_time_s={self.max_time_s}: expected a positive number of seconds.")


class Run(NamedTuple):
    """One run: milliseconds of the whole program, and of the kernel in it (None where not known)."""

    time_ms: float
    kernel_time_ms: float | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Samples in the order in which they were taken, the median of the kernel in them, and notes for their reader."""

    times_ms: tuple[float, ...]
    kernel_time_ms: float | None
    notes: tuple[str, ...]


def measure(run: Callable[[], object], settings: MeasureSettings, *, platform: str, kernel: str) -> Measurement:
    """Time a function on the device until its median is known well enough, or samples or time are used up.

    Args:
      run: starts the compiled program once, and returns its arrays.
      platform: of the device, as JAX says it.
      kernel: text in the names of the ops whose time is told apart.
    """
    for _ in range(settings.warm_up_count):
        jax.block_until_ready(run())
    notes, runs = ["wall time of the host: a CPU has no device plane in the profile"], None
    if platform != "cpu":
        try:
            runs = _until_known(
                lambda count: runs_of(record_profile(run, count), count, kernel), settings, batch=settings.min_samples
            )
            notes = []
        except NoDeviceTimesError as error:
            notes = [f"wall time, dispatch included: {error}"]
    if runs is None:
        runs = _until_known(lambda count: by_wall_clock(run, count), settings, batch=1)
    return measurement_of(runs, [*notes, *quality_notes([run.time_ms for run in runs], settings.target_ci_fraction)])


def measurement_of(runs: Sequence[Run], notes: Sequence[str]) -> Measurement:
    """Return runs as a measurement."""
    of_kernel = [run.kernel_time_ms for run in runs if run.kernel_time_ms is not None]
    kernel_time_ms = statistics.median(of_kernel) if of_kernel else None
    return Measurement(tuple(run.time_ms for run in runs), kernel_time_ms, tuple(notes))


def median_ci_fraction(samples: Sequence[float]) -> float:
    """Return half the width of the median's 95% confidence interval as a part of the median.

    The interval is between order statistics (binomial with p = 1/2): no distribution is assumed.
    """
    ordered = sorted(samples)
    below = int(scipy.stats.binom.ppf((1 - _CONFIDENCE) / 2, len(ordered), 0.5))
    low, high = ordered[max(below - 1, 0)], ordered[min(len(ordered) - below, len(ordered) - 1)]
    return (high - low) / 2 / statistics.median(ordered)


def quality_notes(samples: Sequence[float], target_ci_fraction: float) -> list[str]:
    """Return what is wrong with samples in the order in which they were taken: noise, drift, two modes, outliers."""
    median = statistics.median(samples)
    notes = []
    if (known_to := median_ci_fraction(samples)) > target_ci_fraction:
        notes.append(f"noisy: median known to {known_to:.1%} after {len(samples)} samples")
    third = len(samples) // 3
    if third >= 2 and min(samples) != max(samples):
        drift = (statistics.median(samples[-third:]) - statistics.median(samples[:third])) / median
        if abs(drift) > _WORTH_SAYING and scipy.stats.kendalltau(range(len(samples)), samples).pvalue < _TREND_P:
            cause = "the device throttles, or something else came to run on it" if drift > 0 else "too little warm-up"
            notes.append(f"drift: {drift:+.1%} from the first to the last third of the samples ({cause}?)")
    if modes := _two_modes(samples):
        (fast, fast_count), (slow, slow_count) = modes
        notes.append(
            f"two modes: {fast_count} samples at {fast:.4g} ms, {slow_count} at {slow:.4g} ms "
            "(the device is shared, or changes its clock?)"
        )
    else:
        spread = scipy.stats.median_abs_deviation(samples, scale="normal")
        limit = max(_OUTLIER_DEVIATIONS * spread, _WORTH_SAYING * median)
        slow_count = sum(x - median > limit for x in samples)
        if slow_count > _MANY_OUTLIERS * len(samples):
            notes.append(
                f"outliers: {slow_count} of {len(samples)} samples are more than {limit / median:.0%} slower than the "
                "median (contention?)"
            )
    return notes


def _two_modes(samples: Sequence[float]) -> tuple[tuple[float, int], tuple[float, int]] | None:
    """Return (median, count) of the faster and the slower mode, split at the widest gap; None for one mode."""
    ordered = sorted(samples)
    fewest = max(2, round(_MODE_PART * len(ordered)))
    splits = range(fewest, len(ordered) - fewest + 1)
    split = max(splits, key=lambda i: ordered[i] - ordered[i - 1], default=None)
    if split is None:
        return None
    fast, slow = ordered[:split], ordered[split:]
    apart = statistics.median(slow) - statistics.median(fast)
    spread = max(scipy.stats.median_abs_deviation(part, scale="normal") for part in (fast, slow))
    if apart < _WORTH_SAYING * statistics.median(ordered) or apart < _MODE_DEVIATIONS * spread:
        return None
    return (statistics.median(fast), len(fast)), (statistics.median(slow), len(slow))


def _until_known(take: Callable[[int], list[Run]], settings: MeasureSettings, *, batch: int) -> list[Run]:
    start = time.monotonic()
    runs = take(settings.min_samples)
    while len(runs) < settings.max_samples and time.monotonic() - start < settings.max_time_s:
        if median_ci_fraction([run.time_ms for run in runs]) <= settings.target_ci_fraction:
            break
        runs += take(min(batch, settings.max_samples - len(runs)))
    return runs


def by_wall_clock(run: Callable[[], object], count: int, clock: Callable[[], float] = time.perf_counter) -> list[Run]:
    """Time each run by itself, and wait for it."""
    runs = []
    for _ in range(count):
        start = clock()
        jax.block_until_ready(run())
        runs.append(Run((clock() - start) * 1e3))
    return runs


class NoDeviceTimesError(Exception):
    """The profiler did not record each run on the device; the text says what it did."""


def record_profile(run: Callable[[], object], count: int) -> Any:
    """Return the XSpace of so many runs, each waited for.

    Raises:
      NoDeviceTimesError: the profiler wrote none, or would end this process.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    with tempfile.TemporaryDirectory() as folder:
        try:
            with profiler.trace(Path(folder), options):
                for _ in range(count):
                    jax.block_until_ready(run())
        except profiler.ProfilerError as error:
            raise NoDeviceTimesError(str(error)) from error
        paths = list(Path(folder).rglob(f"*{reader.SUFFIX}"))
        if len(paths) != 1:
            raise NoDeviceTimesError(f"the profiler wrote {len(paths)} profiles, expected 1")
        return XSpace.FromString(paths[0].read_bytes())


def runs_of(space: Any, count: int, kernel: str) -> list[Run]:
    """Return the runs of a profile, an XSpace, during which one program ran `count` times.

    A TPU's plane has a line with the runs of each program. A GPU's has only streams of kernels: every run has the same
    ones, so they are dealt out evenly, and a run lasts from the start of its first to the end of its last.

    Raises:
      NoDeviceTimesError: it has not as many runs.
    """
    profile = reader.from_space(space, "here")
    plane = next(iter(profile.planes), "")
    modules = [module for module in profile.modules if module.plane == plane]
    if len(modules) == count:
        ops = [op for op in profile.matching(kernel) if op.plane == plane]
        runs = []
        for module in modules:
            end_ps = module.start_ps + module.duration_ps
            inside = [op.self_ps for op in ops if module.start_ps <= op.start_ps < end_ps]
            runs.append(Run(module.duration_ps / 1e9, sum(inside) / 1e9 if inside else None))
        return runs
    if modules:
        raise NoDeviceTimesError(f"the profile has {len(modules)} runs of programs, expected {count}")
    spans = sorted(_gpu_spans_ps(space))
    if not spans or len(spans) % count:
        raise NoDeviceTimesError(f"the profile has no runs of programs, and {len(spans)} kernels for {count} runs")
    each = len(spans) // count
    chunks = [spans[i : i + each] for i in range(0, len(spans), each)]
    return [Run((max(end for _, end in chunk) - chunk[0][0]) / 1e9) for chunk in chunks]


def _gpu_spans_ps(space: Any) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of all that ran on the first GPU of a profile."""
    planes = [plane for plane in space.planes if plane.name.startswith(_GPU_PLANE)]
    for line in (line for plane in planes[:1] for line in plane.lines if line.name.startswith(_GPU_STREAM)):
        for event in line.events:
            start = line.timestamp_ns * 1000 + event.offset_ps
            yield start, start + event.duration_ps
