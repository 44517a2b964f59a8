"""Stage timings, and what is told to a caller while a stage runs."""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np

from pipeline.request import Stage

Phase = Literal["load", "compile", "run"]


@dataclasses.dataclass(frozen=True)
class StageEvent:
    """Something a stage has begun (step 0) or a step it has done.

    step, total_steps: of the phase "run"; a step is a denoising step, a batch of latent frames, or the whole encoding.
    step_time_s: of the step just done, None at the beginning. preview: of a denoising step, what the video would be if
    this step were the last: float32 latents [1, frames, channels, height, width], copied from the device when called,
    which is possible until the callback returns.
    """

    stage: Stage
    phase: Phase
    step: int = 0
    total_steps: int = 0
    step_time_s: float | None = None
    preview: Callable[[], np.ndarray] | None = None


#: Called at every event. It may raise, e.g. to interrupt: the stage then stops within one step and frees its memory.
Progress = Callable[[StageEvent], None]


def no_progress(event: StageEvent) -> None:
    """The Progress of who does not want to know."""


@dataclasses.dataclass
class StageTimings:
    """Seconds a stage took. step_times_s: raw, one a step; their sum is less than run_time_s by what is between."""

    stage: Stage
    load_time_s: float = 0.0
    compile_time_s: float = 0.0
    run_time_s: float = 0.0
    step_times_s: list[float] = dataclasses.field(default_factory=list)
    reused: bool = False

    @contextlib.contextmanager
    def measure(self, phase: Phase, progress: Progress) -> Iterator[None]:
        """Add the time of the block to a phase, also when it fails."""
        progress(StageEvent(self.stage, phase))
        start = time.perf_counter()
        try:
            yield
        finally:
            field = f"{phase}_time_s"
            setattr(self, field, getattr(self, field) + time.perf_counter() - start)

    @property
    def step_time_s(self) -> float | None:
        """Median of the steps, None without any."""
        return statistics.median(self.step_times_s) if self.step_times_s else None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class StepClock:
    """Times the steps of one stage and tells of each."""

    def __init__(self, timings: StageTimings, total_steps: int, progress: Progress):
        self._timings = timings
        self._total_steps = total_steps
        self._progress = progress
        self._last = time.perf_counter()
        progress(StageEvent(timings.stage, "run", 0, total_steps))

    def tick(self, preview: Callable[[], np.ndarray] | None = None) -> None:
        """Call when a step's result is there (not merely dispatched). preview: see `StageEvent`."""
        now = time.perf_counter()
        self._timings.step_times_s.append(now - self._last)
        step = len(self._timings.step_times_s)
        self._progress(StageEvent(self._timings.stage, "run", step, self._total_steps, now - self._last, preview))
        self._last = time.perf_counter()
