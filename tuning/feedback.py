"""Tell the user how a sweep goes: a line for each finished trial, and what the workers are at."""

import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import TextIO

from tqdm import tqdm

from splash_workbench.trial_status import Status
from tuning.trials.records import Trial, objective

#: Seconds between two looks at the workers, on a terminal and in a file.
_TERMINAL_S, _FILE_S = 1.0, 30.0
_ERROR_CHARACTERS = 90
_SAYS = {"whole": "", "kernel": ", kernel compiled alone", "shorter": ", from a shorter kernel"}


class Feedback:
    """Lines on stderr for one sweep, and on a terminal a bar below them; a context manager.

    on_record: what earlier runs tried. stages: returns what each running job is at, and for how many seconds; see
    `Runner.stages`.
    """

    def __init__(
        self,
        total: int,
        on_record: Collection[Trial],
        stages: Callable[[], list[tuple[str, float]]],
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self._stream = stream or sys.stderr
        self._enabled, self._stages = enabled, stages
        self._terminal = self._stream.isatty()
        self._start, self._done_before = time.monotonic(), len(on_record)
        self._done, self._total = len(on_record), total
        #: The newest of each configuration.
        self._timed = {trial.config: trial for trial in on_record if trial.time_ms is not None}
        self._end, self._lock = threading.Event(), threading.Lock()
        self._bar = tqdm(
            total=total,
            initial=len(on_record),
            unit="trial",
            leave=False,
            file=self._stream,
            disable=not (enabled and self._terminal),
        )
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Feedback":
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.close()

    def finished(self, trial: Trial, *, refined: bool = False) -> None:
        """Say what became of a trial. refined: it was tried before, by less than now."""
        with self._lock:
            self._done += 1
            self._total = max(self._total + refined, self._done)  # today's choice is not in the budget
            if trial.time_ms is not None:
                self._timed[trial.config] = trial
            self._bar.total = self._total
            self._bar.update()
            self._say(f"{self._done}/{self._total} {describe(trial)}{self._best_text(trial)}{self._left_text()}")

    def known(self, trial: Trial) -> None:
        """Count a trial that was on record."""
        with self._lock:
            if trial.time_ms is not None:
                self._timed[trial.config] = trial
            self._done += 1
            self._done_before += 1
            self._bar.update()

    def _best_text(self, trial: Trial) -> str:
        best = min(self._timed.values(), key=objective, default=None)
        if best is None or best is trial:
            return " (best so far)" if best is trial else ""
        return f" (best {best.time_ms:.4g} ms)"

    def _left_text(self) -> str:
        count, left = self._done - self._done_before, self._total - self._done
        if not count or left <= 0:
            return ""
        return f"; about {_duration((time.monotonic() - self._start) / count * left)} left"

    def _watch(self) -> None:
        while not self._end.wait(_TERMINAL_S if self._terminal else _FILE_S):
            at = ", ".join(f"{stage} {_duration(seconds)}" for stage, seconds in self._stages())
            with self._lock:
                if self._terminal:
                    self._bar.set_postfix_str(f"workers: {at or 'none'}")
                elif at:
                    self._say(f"{self._done}/{self._total} workers: {at}{self._left_text()}")

    def _say(self, line: str) -> None:
        if self._enabled:
            self._bar.write(line, file=self._stream)
            self._stream.flush()


def describe(trial: Trial) -> str:
    """Return a trial's configuration and what became of it, in one line."""
    config = f"{trial.block_sizes} " if trial.block_sizes else ""
    brief = trial.shape is not None  # of an attention's variant, what is switched on
    shown = {name: value for name, value in trial.variant.items() if not brief or value not in (None, False)}
    config += " ".join(f"{name}={value}" for name, value in shown.items())
    if trial.status is not Status.OK:
        return f"{config}: {trial.status} {(trial.error or '')[:_ERROR_CHARACTERS]}".rstrip()
    if trial.time_ms is None:
        return f"{config}: ok"
    return f"{config}: {trial.time_ms:.4g} ms {trial.label}{_SAYS[trial.compiled]}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
