"""What `pipeline.generate` shows on a terminal; and Ctrl-C, which ends a run between two steps: nothing is lost."""

import collections
import contextlib
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import TypeVar

from tqdm import tqdm

from pipeline.runs.batch import Line
from pipeline.runs.hosts import Hosts
from pipeline.stages.progress import Interrupted, StageEvent, StageTimings

T = TypeVar("T")
_BAR_FORMAT = "  {desc:<8} {bar:24} {n_fmt}/{total_fmt} {unit}{postfix}, {elapsed} so far, {remaining} left"
_UNITS = {"text": "prompts", "encode": "batches", "denoise": "steps", "vae": "batches"}


class Terminal:
    """Show one line a stage, as a `Progress`: what it is doing, then a bar with seconds a step and the time left.

    A signal raises Interrupted at the end of the step in which it comes; between steps, e.g. while loading or
    compiling, at once, as the second signal does anywhere.

    hosts: those that run the same command, where there are several. A signal that one of them gets in a step raises
    Interrupted on all at the end of it. Only the first process shows anything.
    """

    def __init__(self) -> None:
        self.hosts: Hosts | None = None
        self._place = ""  # where in a batch this is, e.g. "[2 of 3]"; stands before every line
        self._bar: tqdm | None = None
        self._last: StageEvent | None = None
        self._pending: int | None = None

    def say(self, place: str, text: str) -> None:
        """Print a line of its own, where there is text; the next ones are of the same place."""
        self.close()
        self._place = place
        if text:
            tqdm.write(f"{place} {text}")

    def __call__(self, event: StageEvent) -> None:
        self._last, name = event, f"{self._place} {event.stage:<8}".lstrip()
        if self.hosts is not None:
            self.hosts.note(self.where)
        if event.phase != "run":
            self.close()
            tqdm.write(f"  {name} {event.phase} ...")
        elif event.step_time_s is None:
            self.close()
            self._bar = tqdm(
                total=event.total_steps,
                initial=event.step,  # not 0 where a stage is resumed
                desc=name,
                unit=_UNITS[event.stage],
                disable=self.hosts is not None and not self.hosts.is_first,
                bar_format=_BAR_FORMAT,
            )
        elif self._bar is not None:
            self._bar.set_postfix_str(f"{event.step_time_s:.2f} s each", refresh=False)
            self._bar.update(event.step - self._bar.n)
            if event.step == event.total_steps:
                self.close()
        pending = self._pending
        if event.phase == "run" and self.hosts is not None:
            pending = self.hosts.agree_on_signal(pending)  # one that comes meanwhile is for the next step
        if pending is not None:
            raise Interrupted(pending, between_steps=True, everywhere=event.phase == "run")

    def checking(self, lines: Sequence[T]) -> Iterator[T]:
        """Yield the lines of a batch, with a bar where that takes more than a moment."""
        yield from tqdm(
            lines,
            desc="checking",
            unit="lines",
            delay=1.0,
            disable=self.hosts is not None and not self.hosts.is_first,
            bar_format=_BAR_FORMAT,
        )

    def close(self) -> None:
        """Leave the last line on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

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
        """Say where in a batch, and in which stage and step, this is: "[2 of 3] in denoise after step 3 of 50"."""
        event, where = self._last, "before the first stage"
        if event is not None:
            steps = f" after step {event.step} of {event.total_steps}" if event.total_steps > 1 else ""
            where = f"in {event.stage}{steps}"
        return f"{self._place} {where}".lstrip()

    @property
    def keeps_steps(self) -> bool:
        """Return whether the steps done of this stage are kept where it ends between two of them."""
        return self._last is not None and self._last.stage == "denoise"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # After the last step, too, until the next stage begins: its output is being saved.
        in_step = self._last is not None and self._last.phase == "run"
        if not in_step or self._pending is not None:
            raise Interrupted(number, between_steps=False)
        self._pending = number
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)


def timing_table(timings: Sequence[StageTimings]) -> str:
    """Return a table of seconds a stage."""
    lines = [f"  {'stage':<8} {'load s':>8} {'compile s':>10} {'run s':>8} {'steps':>6} {'s a step':>9}"]
    for timing in timings:
        step = f"{timing.step_time_s:>9.3f}" if timing.step_time_s is not None else f"{'':>9}"
        lines.append(
            f"  {timing.stage:<8} {timing.load_time_s:>8.2f} {timing.compile_time_s:>10.2f} {timing.run_time_s:>8.2f} "
            f"{len(timing.step_times_s):>6} {step}"
            + (f"  {timing.steps_computed} steps computed" if timing.steps_computed is not None else "")
            + ("  reused, times of the run that made it" if timing.reused else "")
        )
    ran = [timing for timing in timings if not timing.reused]
    total = sum(timing.load_time_s + timing.compile_time_s + timing.run_time_s for timing in ran)
    lines.append(f"  {'total':<8} {total:>8.2f}" + ("" if len(ran) == len(timings) else " of this run"))
    return "\n".join(lines)


def batch_table(items: Sequence[Line]) -> str:
    """Return a table of what became of every line of a batch, and how many there are of each."""
    lines = [f"  {'line':>4}  {'result':<15}  {'seconds':>8}  video, folder or error"]
    for item in items:
        where = (item.result.video_path or item.result.run_dir) if item.result is not None else item.error
        time_s = f"{item.time_s:.2f}" if item.time_s else ""
        lines.append(f"  {item.entry.line:>4}  {item.status:<15}  {time_s:>8}  {where or ''}".rstrip())
    counts = collections.Counter(item.status for item in items)
    lines.append("  " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return "\n".join(lines)
