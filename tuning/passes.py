"""The passes of a sweep: search, compile whole what may win, and time what would run today."""

import collections
import concurrent.futures
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from splash_attn.types import BlockSizes, QkDtype
from splash_workbench.files import require_writable
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from tuning.backends.evaluate import Evaluator
from tuning.feedback import Feedback
from tuning.search.settings import SweepSettings
from tuning.search.space import Candidate
from tuning.search.study import Search
from tuning.trials import records
from tuning.trials.promote import today, todays_choice
from tuning.trials.records import Compiled, Trial, best_of, objective

#: Candidates asked for ahead of the first that is not told yet: a slow one must not leave workers idle.
_ASKED_PER_WORKER = 2
#: Candidates that are compiled at their own length after a first pass from shorter ones, and how near the best they
#: must be: on v6e most such passes are less far off (docs/tuning.md).
_FINALISTS, _NEAR = 4, 1.01
#: What would run today is compiled whole unless it is slower than the winner by more than any estimate was off.
_OFF = 1.08
#: With so many near the best, or fewer, that is compiled whole at once, beside the others' kernels.
_FEW = 3
_KERNEL: Compiled = "kernel"
_WHOLE: Compiled = "whole"


class Passes:
    """One run of a sweep; `run` does all of it.

    Attributes:
      evaluated_count: trials made by this run, from the cache or by a job; the others were on record.
    """

    def __init__(
        self,
        settings: SweepSettings,
        search: Search,
        evaluator: Evaluator,
        on_record: Mapping[str, Trial],
        path: Path,
        recorded: Sequence[Trial] = (),
    ) -> None:
        """recorded: all that earlier runs made of this context; on_record: by key, what counts of it."""
        self._settings, self._search, self._evaluator = settings, search, evaluator
        self._on_record, self._path = on_record, path
        self._alone_ms = {trial.key: ms for trial in recorded if (ms := _alone_ms(trial)) is not None}
        self._first_pass: Compiled = "shorter" if settings.quick and settings.backend.quick else "whole"
        self.evaluated_count = 0

    def run(self) -> None:
        """Ask, evaluate, record and tell until the budget is spent; then settle which candidate wins."""
        search = self._search
        self._pool = concurrent.futures.ThreadPoolExecutor(self._settings.workers)
        stages = self._evaluator.runner.stages
        with Feedback(search.budget, search.told.values(), stages, enabled=self._settings.progress) as self._feedback:
            try:
                self._explore()
                if self._first_pass != "whole":
                    self._settle()
                if self._settings.promote and not self._settings.compiler_options:
                    self._time_todays_choice()
            finally:
                self._evaluator.runner.cancel()
                self._pool.shutdown(cancel_futures=True)

    def _make(
        self,
        block_sizes: BlockSizes | None,
        options: Mapping[str, object],
        compiled: Compiled,
        before: Trial | None = None,
    ) -> Trial:
        estimate_ms = (before.estimate_ms or before.time_ms) if before is not None else None
        kernel = self._settings.kernel_name
        trial = self._evaluator.evaluate(block_sizes, options, kernel, compiled=compiled, estimate_ms=estimate_ms)
        jsonl.append(self._path, trial)  # on disk first: the study can be put right from it, not the other way
        self.evaluated_count += 1
        if (alone_ms := _alone_ms(trial)) is not None:
            self._alone_ms[trial.key] = alone_ms
        self._feedback.finished(trial, refined=before is not None)
        if trial.status is Status.CRASHED:  # of a full disk all others would, too
            folder, scratch_bytes = self._path.parent, self._settings.backend.scratch_bytes
            require_writable(f"results_dir={self._settings.results_dir}", folder, scratch_bytes)
        return trial

    def _explore(self) -> None:
        """Evaluate what the search asks for.

        A trial is recorded as soon as it is made, but told in the order in which the candidates were asked, each
        followed by one question: what the search then asks depends on its seed and on `workers`, not on which worker
        was faster.
        """
        untold: collections.deque[tuple[Candidate, concurrent.futures.Future[Trial]]] = collections.deque()

        def ask() -> None:
            candidate = self._search.ask()
            if candidate is None:
                return
            if candidate.key in self._on_record:  # another study of this context has evaluated it
                future: concurrent.futures.Future[Trial] = concurrent.futures.Future()
                future.set_result(self._on_record[candidate.key])
                self._feedback.known(self._on_record[candidate.key])
            else:
                future = self._pool.submit(self._make, candidate.block_sizes, candidate.options, self._first_pass)
            untold.append((candidate, future))

        for _ in range(_ASKED_PER_WORKER * self._settings.workers):
            ask()
        while untold:
            candidate, future = untold.popleft()
            self._search.tell(candidate, future.result())
            ask()

    def _settle(self) -> None:
        """Compile the best at their own length, and the best of them whole, until the best is known by a whole one."""
        told = self._search.told
        finalists_left = _FINALISTS
        while ranked := self._expected(cautious=finalists_left > 0):
            best_ms, best = ranked[0]
            if best.compiled == "whole":
                return
            chosen, how_best = [best], _WHOLE
            if best.compiled == "shorter" and finalists_left:
                near = [t for ms, t in ranked if t.compiled == "shorter" and ms <= _NEAR * best_ms]
                chosen = near[: min(self._settings.workers, finalists_left)]
                how_best = _KERNEL if len(near) > _FEW else _WHOLE  # the best of a few most often stays it
                finalists_left -= len(chosen)
            ways = [how_best if trial is best else _KERNEL for trial in chosen]
            for trial in self._pool.map(self._refined, chosen, ways):
                told[trial.key] = trial

    def _refined(self, before: Trial, compiled: Compiled) -> Trial:
        return self._make(before.block_sizes, before.variant, compiled, before)

    def _expected(self, *, cautious: bool) -> list[tuple[float, Trial]]:
        """Return the ok trials with the ms that a whole compile is expected to say, the best first.

        An estimate is taken to be off by as much as those of the same variant were that have been settled. Where there
        are none, cautious: it is taken as it is; else to be off as those of the variants most like it. What a kernel
        compiled alone says is taken to be off by as much as it was of those that were compiled whole after that.
        """
        timed = [t for t in self._search.told.values() if t.status is Status.OK and t.time_ms is not None]
        settled = [(t, objective(t) / t.estimate_ms) for t in timed if t.estimate_ms and t.compiled != "shorter"]

        whole = [
            objective(t) / self._alone_ms[t.key] for t in timed if t.compiled == "whole" and t.key in self._alone_ms
        ]
        of_alone = statistics.median(whole) if whole else 1.0

        def alike(one: Trial, other: Trial) -> int:
            return sum(other.variant.get(name) == value for name, value in one.variant.items())

        def expected(trial: Trial) -> float:
            if trial.compiled == "kernel":
                return objective(trial) * of_alone
            if trial.compiled == "whole" or not settled:
                return objective(trial)
            most = max(alike(trial, other) for other, _ in settled)
            if cautious and most < len(trial.variant):
                return objective(trial)
            return objective(trial) * statistics.median(off for other, off in settled if alike(trial, other) == most)

        return sorted(((expected(trial), trial) for trial in timed), key=lambda pair: pair[0])

    def _time_todays_choice(self) -> None:
        """Evaluate what would run today, which the winner must beat to be promoted, as exactly as it needs."""
        winner = best_of(self._search.told.values())
        if winner is None:
            return
        told = self._search.told
        known = dict(self._on_record) | told
        for block_sizes, options in self._todays(winner):
            key = records.config_key(block_sizes, options)
            trial = known.get(key)
            if trial is None:
                trial = self._make(block_sizes, options, self._first_pass)
            near = trial.time_ms is not None and trial.time_ms < _OFF * objective(winner)
            if trial.compiled != "whole" and near:
                self._make(block_sizes, options, "whole", trial)

    def _todays(self, winner: Trial) -> Iterator[tuple[BlockSizes | None, dict[str, object]]]:
        if winner.shape is None:
            yield None, self._settings.default_options
        elif (choice := todays_choice(winner, self._settings.promotion_dir)) is not None:
            yield choice.block_sizes, choice.variant.to_dict()


def _alone_ms(trial: Trial) -> float | None:
    """Return the time of an op whose kernel was compiled alone; None where it was not, or has none."""
    return trial.time_ms if trial.compiled == "kernel" and trial.status is Status.OK else None


def todays_keys(settings: SweepSettings, device_kind: str) -> list[str]:
    """Return the keys of what would run today: a search that asks for it first need not compile it at its end."""
    shape = settings.workload.shape
    if shape is None:
        return [records.config_key(None, settings.default_options)]
    choices = (
        today(device_kind, shape, settings.workload.dtype, dtype, settings.promotion_dir) for dtype in get_args(QkDtype)
    )
    return [records.config_key(c.block_sizes, c.variant.to_dict()) for c in choices if c is not None]
