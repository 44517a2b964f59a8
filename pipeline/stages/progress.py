"""Stage timings, traces of what a stage runs, and what is told to a caller meanwhile."""

import contextlib
import contextvars
import dataclasses
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from pipeline.requests.errors import RequestError
from pipeline.requests.request import GenerateRequest, Stage
from splash_workbench.errors import UserError
from splash_workbench.profiles.sessions import Recorder, check_name, safe_name


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM.

    signal_number: which. between_steps: whether the step it came in was ended first. everywhere: whether every process
    raises it, after the same step; a single process is every process.
    """

    def __init__(self, signal_number: int, between_steps: bool, everywhere: bool = False):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number, self.between_steps, self.everywhere = signal_number, between_steps, everywhere


Phase = Literal["load", "compile", "run"]
#: What is loaded and timed: a stage, or the VAE's encoder, which works for the stage "denoise".
Work = Stage | Literal["encode"]


@dataclasses.dataclass(frozen=True)
class StageEvent:
    """Something a stage has begun (step 0) or a step it has done.

    step, total_steps: of the phase "run"; a step is a denoising step, a batch of frames, or the whole encoding.
    step_time_s: of the step just done, None at the beginning. preview: of a denoising step, what the video would be if
    this step were the last: float32 latents [1, frames, channels, height, width], copied from the device when called,
    which is possible until the callback returns.
    """

    stage: Work
    phase: Phase
    step: int = 0
    total_steps: int = 0
    step_time_s: float | None = None
    preview: Callable[[], np.ndarray] | None = None


#: Called at every event. It may raise, e.g. to interrupt: the stage then stops within one step and frees its memory.
Progress = Callable[[StageEvent], None]


def no_progress(event: StageEvent) -> None:
    """Ignore an event: the no-op Progress."""


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def tracing(recorder: Recorder | None) -> Iterator[None]:
    """Profile every stage that runs in the block, without its loading and compiling: a session each."""
    option = "jax_compilation_cache_include_metadata_in_key"
    token, before = _recorder.set(recorder), jax.config.values[option]
    if recorder is not None:  # a cached program may be of before a scope was named
        jax.config.update(option, True)
    try:
        yield
    finally:
        jax.config.update(option, before)
        _recorder.reset(token)


def recorder_of(settings: Any, request: GenerateRequest) -> Recorder | None:
    """Return a recorder for `tracing` from a command line's profile, logdir and profile_run; None without profile=true.

    A run that is not named gets a name of what decides its time. Raises RequestError for one that cannot be a folder's.
    """
    if not settings.profile:
        return None
    attention, plan = request.attention, settings.parallel.plan
    choices = [
        attention.implementation,
        attention.block_sizes,
        attention.variant,
        attention.qk_dtype,
        None if plan == "auto" else plan,
        None if request.quality == "exact" else request.quality,
        request.quantization,
        request.cache.method,
        settings.parallel.num_devices and f"{settings.parallel.num_devices}-devices",
    ]
    size = f"{request.width}x{request.height}x{request.num_frames}-{request.dtype}"
    name = "-".join([Path(request.checkpoint).name, size, *(str(choice) for choice in choices if choice is not None)])
    run = check_profile_run(settings.profile_run) or safe_name(name)
    config = {**dataclasses.asdict(request), "plan": plan}
    try:
        return Recorder(Path(settings.logdir), run, config)
    except UserError as error:
        raise RequestError(f"profile_run={error}") from error


def check_profile_run(name: str | None) -> str | None:
    """Return a command line's profile_run. Raises RequestError for one that cannot be a folder's name."""
    try:
        return None if name is None else check_name(name)
    except UserError as error:
        raise RequestError(f"profile_run={error}") from error


@dataclasses.dataclass
class StageTimings:
    """Time of a stage, in seconds. step_times_s: raw, one a step; their sum is less than run_time_s by what is between.

    profiled: whether a profiler ran meanwhile, which takes time of its own. steps_computed: of the denoising steps, how
    many ran the transformer's blocks; None: all. read_bytes: of its weights, stored_bytes, those that this process read
    from storage.
    """

    stage: Work
    load_time_s: float = 0.0
    compile_time_s: float = 0.0
    run_time_s: float = 0.0
    step_times_s: list[float] = dataclasses.field(default_factory=list)
    reused: bool = False
    profiled: bool = False
    steps_computed: int | None = None
    read_bytes: int = 0
    stored_bytes: int = 0

    @property
    def step_time_s(self) -> float | None:
        """Median of the steps, of those that were computed; None without any."""
        # One that reuses another's blocks takes a fraction of its time.
        computed = sorted(self.step_times_s)[-(self.steps_computed or len(self.step_times_s)) :]
        return statistics.median(computed) if computed else None


class StageClock:
    """Time a stage and its steps, name the steps in a profile, and tell of each."""

    def __init__(self, stage: Work, progress: Progress = no_progress):
        self.timings, self.progress = StageTimings(stage), progress

    @contextlib.contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Add the time of the block to a phase, also when it fails. See `tracing` for what a run leaves besides."""
        timings, recorder = self.timings, _recorder.get() if phase == "run" else None
        if phase != "run":  # whose steps are told of
            self.progress(StageEvent(timings.stage, phase))
        timings.profiled |= recorder is not None
        with recorder.record(timings.stage) if recorder is not None else contextlib.nullcontext():
            start = time.perf_counter()
            try:
                yield
            finally:
                self._tell = self.progress  # whoever was told instead may be freed
                field = f"{phase}_time_s"
                setattr(timings, field, getattr(timings, field) + time.perf_counter() - start)

    def start(self, total_steps: int, tell: Progress | None = None) -> None:
        """Begin the first step of so many. tell: told of them in place of `progress`."""
        self._total_steps, self._tell = total_steps, tell or self.progress
        self._tell(StageEvent(self.timings.stage, "run", 0, total_steps))
        self._begin()

    def tick(self, preview: Callable[[], np.ndarray] | None = None) -> None:
        """Call when a step's result is there (not merely dispatched). preview: see `StageEvent`."""
        step_time_s = time.perf_counter() - self._last
        self._annotation.__exit__(None, None, None)
        self.timings.step_times_s.append(step_time_s)
        step = len(self.timings.step_times_s)
        self._tell(StageEvent(self.timings.stage, "run", step, self._total_steps, step_time_s, preview))
        if step < self._total_steps:
            self._begin()

    def _begin(self) -> None:
        number = len(self.timings.step_times_s) + 1
        self._annotation = jax.profiler.StepTraceAnnotation(self.timings.stage, step_num=number)
        self._annotation.__enter__()
        self._last = time.perf_counter()
