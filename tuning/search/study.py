"""Choose the next candidate: an Optuna study on disk that survives any death of the sweep.

The records file is the truth about what was evaluated; the study remembers what was asked and guides TPE. A candidate
that was running when the sweep died is asked again, unless its record had already been written: then it is told.
"""

import contextlib
import dataclasses
import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from omegaconf import MISSING
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from tuning.search.shared import SharedStudy, open_storage, shown
from tuning.search.space import Candidate, Candidates, Space
from tuning.search.tunables import TunableSpace
from tuning.trials.records import Trial, objective

_SAMPLERS = ("grid", "random", "tpe")
#: Suggestions in a row that were seen or cannot be valid, after which TPE is given an unseen candidate at random.
_MAX_REJECTIONS = 15
#: Trials after which TPE follows what it has learnt; the candidates that a space names first count.
_STARTUP_TRIALS = 6
#: Between two looks at what other sweeps do, where this one has nothing left but to wait for them.
_WAIT_S = 0.5
#: A gain of less than this part of the time is none: estimates of a first pass are off by as much (docs/tuning.md).
GAIN = 0.01


@dataclasses.dataclass
class SearchSettings:
    """How to search, and when to stop: fields of configs/search/*.yaml. Raises ValueError for a value out of range.

    sampler: grid (the space's order), random (shuffled) or tpe; max_trials: of all runs of the study, None for all
    there are; patience: stop after so many trials in a row that gain less than the estimates are sure of (GAIN);
    storage: of a study that several sweeps work on, see `tuning.search.shared`; None: of this sweep alone.
    """

    sampler: str = MISSING
    max_trials: int | None = None
    seed: int = 0
    patience: int | None = None
    storage: str | None = None

    def __post_init__(self) -> None:
        if self.sampler not in _SAMPLERS:
            raise ValueError(f"search.sampler={self.sampler!r}: expected one of {_SAMPLERS}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"search.seed={self.seed}: expected 0 to {2**32 - 1}.")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"search.patience={self.patience}: expected at least 1, or null to use up max_trials.")
        if self.max_trials is not None and self.max_trials < 1:
            raise ValueError(f"search.max_trials={self.max_trials}: expected at least 1, or null for every candidate.")


@contextlib.contextmanager
def storage_errors(path: Path | str, *more: type[Exception]) -> Iterator[None]:
    """Raise UserError for what the study's file is to blame for: errors of the storage, and `more` while it is read."""
    kinds: tuple[type[Exception], ...] = (SQLAlchemyError, optuna.exceptions.OptunaError, *more)
    try:
        yield
    except kinds as error:
        cause = error.__cause__ or error  # SQLAlchemy's own text lists the statement and its parameters
        raise UserError(
            f"{path}: this study cannot be read or written ({str(cause).splitlines()[0]}); make room there, or delete "
            "it: the trials stay on record."
        ) from error


class Search:
    """Ask candidates one by one, never one twice, and be told their trials.

    on_record: by the candidate's key. first: keys to ask before all others, where they are candidates.

    With settings.storage other sweeps ask and tell, too: what they have told is in `told`.
    """

    def __init__(
        self,
        storage_path: Path,
        study_name: str,
        space: Space | TunableSpace,
        candidates: Candidates,
        settings: SearchSettings,
        on_record: Mapping[str, Trial],
        first: Sequence[str] = (),
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if settings.storage is None:
            storage_path.parent.mkdir(parents=True, exist_ok=True)
        self._space = space
        self._valid = {candidate.key: candidate for candidate in candidates.valid}
        self._settings = settings
        self._first = [self._valid[key] for key in first if key in self._valid]
        self._rng = random.Random(settings.seed)
        #: Values of the parameters that Optuna knows by their positions, so that TPE knows which are neighbours.
        self._numbers = {name: values for name, values in space.choices.items() if all(type(v) is int for v in values)}
        self._distributions: dict[str, BaseDistribution] = {
            name: IntDistribution(0, len(values) - 1) if name in self._numbers else CategoricalDistribution(values)
            for name, values in space.choices.items()
        }
        self._asked: dict[str, optuna.trial.Trial] = {}
        #: Candidates that need not be tried: smaller ones exceeded VMEM.
        self.ruled_out: set[str] = set()
        #: Why the search ended before its budget was spent, in words.
        self.stopped: str | None = None
        self.told: dict[str, Trial] = {}
        #: Candidates that other sweeps are at.
        self._taken: set[str] = set()
        self._shared: SharedStudy | None = None
        with storage_errors(where(settings, storage_path), LookupError, ValueError, RuntimeError):
            self._study = optuna.create_study(
                storage=open_storage(settings.storage) if settings.storage else f"sqlite:///{storage_path}",
                study_name=study_name,
                sampler=_make_sampler(settings),
                load_if_exists=True,
            )
            #: Candidates that were running when an earlier run died, and are asked first.
            self.interrupted: tuple[Candidate, ...] = ()
            if settings.storage is None:
                self.interrupted = self._resume(on_record)
            else:
                self._shared = SharedStudy(self._study)
                self._hear(self._shared)
        self._proposals = self._propose()

    @property
    def budget(self) -> int:
        """Return how many candidates this study will have when it is done."""
        left = len(self._valid) - len(self.ruled_out)
        return min(self._settings.max_trials or left, left)

    @property
    def untried_count(self) -> int:
        """Return how many candidates nobody has tried, less those that need not be."""
        return len(self._valid) - len(self.ruled_out) - len(self.told)

    def ask(self) -> Candidate | None:
        """Return a candidate not asked before, or None: the budget is spent, or no candidate is left.

        Of a shared study the last ones may be other sweeps': once this sweep has none, it waits for them, and takes
        over those of one that died.
        """
        while True:
            if self._shared is not None:
                self._hear(self._shared)
            open_count = self.budget - len(self.told) - len(self._asked)
            if open_count <= 0 or self._has_settled():
                return None
            if open_count > len(self._taken):
                candidate = self._ask()
                if candidate is not None:
                    return candidate
            elif self._asked:
                return None
            time.sleep(_WAIT_S)

    @property
    def is_shared(self) -> bool:
        """Return whether other sweeps may work on the study."""
        return self._shared is not None

    def close(self) -> None:
        """Leave a shared study."""
        if self._shared is not None:
            self._shared.close()

    def _hear(self, shared: SharedStudy) -> None:
        """Take what other sweeps have told, and what they are at."""
        records, taken = shared.look()
        self._taken = taken & self._valid.keys()
        for key in records.keys() - self.told.keys() - self._asked.keys():
            if key in self._valid:
                self.told[key] = records[key]
                if self.told[key].status is Status.OUT_OF_MEMORY:
                    self._rule_out(self._valid[key])

    def _ask(self) -> Candidate | None:
        """Return a candidate not asked before; None where other sweeps have just taken the rest."""
        rejections = 0
        while True:
            forced = next(self._proposals, None)
            if forced is None and rejections >= _MAX_REJECTIONS:
                unseen = [c for key, c in self._valid.items() if not self._seen(key)]
                if not unseen:
                    return None
                forced = self._rng.choice(unseen)
            if forced is not None:
                self._study.enqueue_trial(self._encode(forced))
            trial = self._study.ask(self._distributions)
            candidate = self._candidate(trial.params)
            if candidate is None:
                self._study.tell(trial, state=TrialState.PRUNED)  # TPE learns to avoid it
            elif self._seen(candidate.key) or not self._claimed(trial, candidate):
                self._study.tell(trial, state=TrialState.FAIL)  # TPE ignores it
            else:
                self._asked[candidate.key] = trial
                return candidate
            rejections += 1

    def tell(self, candidate: Candidate, record: Trial) -> None:
        """Take what became of a candidate that `ask` gave. Its record is on disk by now."""
        trial = self._asked.pop(candidate.key)
        if self._shared is None:
            self._tell(trial.number, record)
        else:
            with contextlib.suppress(ValueError, RuntimeError):  # finished: another took this sweep for dead
                self._shared.publish(trial, record)
                if record.conclusive or record.status is Status.TIMEOUT:
                    self._tell(trial.number, record)
                else:  # maybe this machine's fault: another sweep may try it
                    self._study.tell(trial.number, state=TrialState.FAIL)
        self.told[candidate.key] = record
        if record.status is Status.OUT_OF_MEMORY:
            self._rule_out(candidate)

    def importances(self) -> dict[str, float]:
        """Return how much of the difference between good and bad candidates each parameter explains, most first.

        Empty where too few candidates are known, or no parameter differs.
        """
        if sum(trial.status is Status.OK for trial in self.told.values()) < _STARTUP_TRIALS:
            return {}
        with warnings.catch_warnings(), contextlib.suppress(ValueError, RuntimeError):
            warnings.simplefilter("ignore")  # that it is experimental, or that trials are few
            evaluator = optuna.importance.PedAnovaImportanceEvaluator()
            found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
            return {name: part for name, part in found.items() if part > 0}
        return {}

    def _has_settled(self) -> bool:
        """Return whether the last trials gained nothing, and say so in `stopped`."""
        patience = self._settings.patience
        times = [objective(trial) for trial in self.told.values() if trial.status is Status.OK]
        if patience is None or len(times) <= patience:
            return False
        if min(times[-patience:]) < (1 - GAIN) * min(times[:-patience]):
            return False
        self.stopped = f"stopped after {len(self.told)} trials: the last {patience} gained less than {GAIN:.0%}"
        return True

    def _rule_out(self, small: Candidate) -> None:
        """Leave out candidates that are as large in every parameter that VMEM grows with, and otherwise the same."""
        grows = [name for name in self._space.grows_with if name in self._numbers]
        least = self._space.parameters_of(small)
        for key, candidate in self._valid.items():
            values = self._space.parameters_of(candidate)
            rest_same = all(values[name] == least[name] for name in values if name not in grows)
            if grows and rest_same and all(values[n] >= least[n] for n in grows) and not self._seen(key):
                self.ruled_out.add(key)

    def _seen(self, key: str) -> bool:
        return key in self.told or key in self._asked or key in self.ruled_out or key in self._taken

    def _claimed(self, trial: optuna.trial.Trial, candidate: Candidate) -> bool:
        """Return whether a candidate is this sweep's to evaluate; notes those that another has."""
        if self._shared is None or self._shared.claim(trial, candidate.key):
            return True
        self._taken.add(candidate.key)
        return False

    def _tell(self, number: int, record: Trial) -> None:
        if record.status is Status.OK:
            self._study.tell(number, objective(record))
        else:
            self._study.tell(number, state=TrialState.PRUNED)  # the worst there is, as TPE sees it

    def _candidate(self, parameters: Mapping[str, Any]) -> Candidate | None:
        """Return the valid candidate of these parameters, None where there is none."""
        if set(parameters) != set(self._space.choices):
            return None  # the sweep died while Optuna wrote them
        numbers = self._numbers
        values = {name: numbers[name][value] if name in numbers else value for name, value in parameters.items()}
        try:
            return self._valid.get(self._space.candidate_of(values).key)
        except (ValueError, NotImplementedError):
            return None  # not a kernel, e.g. block_kv_compute does not divide block_kv

    def _encode(self, candidate: Candidate) -> dict[str, Any]:
        """Return a candidate as Optuna's parameters."""
        numbers, parameters = self._numbers, self._space.parameters_of(candidate)
        return {name: numbers[name].index(value) if name in numbers else value for name, value in parameters.items()}

    def _resume(self, on_record: Mapping[str, Trial]) -> tuple[Candidate, ...]:
        """Read the study: fill `told`, and return the candidates that were asked but have no record."""
        interrupted: dict[str, Candidate] = {}
        for trial in self._study.get_trials(deepcopy=False):
            candidate = self._candidate(trial.params)
            record = on_record.get(candidate.key) if candidate is not None else None
            if trial.state is TrialState.RUNNING:
                if record is not None:
                    self._tell(trial.number, record)
                else:
                    self._study.tell(trial.number, state=TrialState.FAIL)
            if candidate is None or trial.state is TrialState.WAITING:
                continue
            if record is not None:
                self.told[candidate.key] = record
            else:
                interrupted[candidate.key] = candidate
        for key, record in self.told.items():
            if record.status is Status.OUT_OF_MEMORY and key in self._valid:
                self._rule_out(self._valid[key])
        return tuple(candidate for key, candidate in interrupted.items() if key not in self.ruled_out)

    def _propose(self) -> Iterator[Candidate]:
        """Yield candidates that do not wait for the sampler: interrupted, those to ask first, then all but for TPE."""
        proposals = [*self.interrupted, *self._first]
        proposals += [self._space.candidate_of(self._space.complete(parameters)) for parameters in self._space.first]
        if self._settings.sampler != "tpe":
            rest = list(self._valid.values())
            if self._settings.sampler == "random":
                random.Random(self._settings.seed).shuffle(rest)
            proposals += rest
        for candidate in proposals:
            if candidate.key in self._valid and not self._seen(candidate.key):
                yield candidate


def where(settings: SearchSettings, storage_path: Path) -> Path | str:
    """Return where a study is, for a message."""
    return shown(settings.storage) if settings.storage else storage_path


def _make_sampler(settings: SearchSettings) -> optuna.samplers.BaseSampler:
    if settings.sampler != "tpe":
        return optuna.samplers.RandomSampler(seed=settings.seed)  # every candidate is proposed: it never samples
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        # constant_liar: candidates that still run count as bad, so that parallel workers spread out
        return optuna.samplers.TPESampler(
            seed=settings.seed, multivariate=True, constant_liar=True, n_startup_trials=_STARTUP_TRIALS
        )
