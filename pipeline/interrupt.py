"""Ctrl-C and SIGTERM end a run between two steps, so that nothing computed is lost."""

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType

from pipeline.stages.progress import Progress, StageEvent


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM. signal_number: which. between_steps: whether the step it came in was ended first."""

    def __init__(self, signal_number: int, between_steps: bool):
        super().__init__(signal.Signals(signal_number).name)
        self.signal_number = signal_number
        self.between_steps = between_steps


class Interruptible:
    """Raise Interrupted, as a `Progress`, at the end of the step in which a signal came.

    Between steps, e.g. while loading or compiling, a signal raises it at once, as the second signal does anywhere.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._last: StageEvent | None = None
        self._pending: int | None = None

    def __call__(self, event: StageEvent) -> None:
        self._last = event
        self._progress(event)
        if self._pending is not None:
            raise Interrupted(self._pending, between_steps=True)

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM so in the block; in the main thread only."""
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def where(self) -> str:
        """Say which stage, and step where there are several, was reached: "in denoise after step 3 of 50"."""
        event = self._last
        if event is None:
            return "before the first stage"
        if event.phase != "run" or event.total_steps < 2:
            return f"in {event.stage}"
        return f"in {event.stage} after step {event.step} of {event.total_steps}"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        event = self._last
        # After the last step, too, until the next stage begins: its output is being saved.
        in_step = event is not None and event.phase == "run" and event.total_steps > 0
        if not in_step or self._pending is not None:
            raise Interrupted(number, between_steps=False)
        self._pending = number
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
