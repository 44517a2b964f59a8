"""The records that a report is made of. A file that is not there is no error; a malformed one is."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from splash_attn import tuned
from splash_workbench.records import jsonl
from splash_workbench.records.generation import GenerationRecord
from splash_workbench.records.prediction import PredictionRecord
from splash_workbench.records.quality import QualityRecord
from tuning.trials.records import TRIALS_FILE, Trial
from tuning.trials.workloads import named_apart
from tuning.validate.record import Validation, on_record

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrialFile:
    """Trials of one call, dtype, device and backend from a folder of results/sweeps or results/peers, at least one."""

    path: str
    trials: tuple[Trial, ...]

    @property
    def newest(self) -> Trial:
        return max(self.trials, key=lambda trial: (trial.created_at, trial.record_id))

    @property
    def source(self) -> tuple[str, ...]:
        """Return a key that is equal for files whose times can be compared."""
        trial = self.newest
        return trial.context, trial.environment.kernel_hash, trial.environment.backend_hash


class Inputs:
    """Everything that is on record, read at once. Raises ValueError for a malformed file, with the line and the field.

    Attributes:
      entries: (device kind, tuned entry); of `tuned_dir`, or without one the user's and the shipped ones.
      sweeps, peers: of attention, one for each folder. Of those of several machines, each record once.
      others: sweeps of other kernels, likewise.
      validation: of `tuning.validate`, or the reported rows alone.
      predicted, generated, quality: the lines of the pipeline's files.
      quality_page: the videos of `pipeline.quality` side by side, where they are; else None.
      files: (file, what it holds) of each file that was read.
      torn: a line about each that a crash tore, and that is left out.
    """

    def __init__(self, results_dir: Path, validation_path: Path, tuned_dir: Path | None = None) -> None:
        self.results_dir, self.validation_path, self.tuned_dir = results_dir, validation_path, tuned_dir
        self.files: list[tuple[str, str]] = []
        self.torn: list[str] = []
        #: results_dir, and each machine's folder in it: one that has records, and is none of a sweep's.
        self._folders = [results_dir, *sorted(folder for folder in results_dir.glob("*") if _of_machine(folder))]
        self.entries = self._tuned_entries(tuned_dir)
        self.sweeps, self.peers, self.others = self._trial_files()
        self.validation = self._validation(validation_path)
        self.predicted = self._all_lines("predict.jsonl", PredictionRecord, "prediction")
        self.generated = self._all_lines("generate.jsonl", GenerationRecord, "run")
        self.quality = self._all_lines("quality.jsonl", QualityRecord, "comparison")
        page = results_dir / "quality" / "index.html"
        self.quality_page = page if page.is_file() else None

    def _shown(self, path: Path) -> str:
        """Return a path as the page names it."""
        inside = path.is_relative_to(self.results_dir)
        return f"{self.results_dir.name}/{path.relative_to(self.results_dir).as_posix()}" if inside else path.name

    def _count(self, path: str, number: int, one: str, several: str | None = None) -> None:
        """Note how many records a file had, where it had any."""
        if number:
            self.files.append((path, f"{number} {one if number == 1 else several or one + 's'}"))

    def _lines(self, path: Path, kind: type[T], what: str) -> list[T]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = jsonl.read(path, kind)
        self.torn += [str(warning.message).replace(str(path), self._shown(path)) for warning in caught]
        self._count(self._shown(path), len(found), what)
        return found

    def _all_lines(self, name: str, kind: type[T], what: str) -> list[T]:
        """Read a file of results_dir, and those of that name in the folders of machines below it."""
        return [line for folder in self._folders for line in self._lines(folder / name, kind, what)]

    def _trial_files(self) -> tuple[list[TrialFile], list[TrialFile], list[TrialFile]]:
        """Read the trials of every folder in sweeps and in peers, one name for each shape."""
        read = [
            (folder, self._shown(path), trial)
            for folder in ("sweeps", "peers")
            for machine in self._folders
            for path in sorted((machine / folder).glob(f"*/{TRIALS_FILE}"))
            for trial in self._lines(path, Trial, "trial")
        ]
        kept = {(folder, trial.record_id): (folder, path, trial) for folder, path, trial in reversed(read)}
        read = list(kept.values())[::-1]
        groups: dict[tuple[object, ...], list[Trial]] = {}
        for (folder, path, _), trial in zip(read, named_apart([trial for *_, trial in read]), strict=True):
            groups.setdefault((folder, path, *_kind(trial)), []).append(trial)
        found: dict[object, list[TrialFile]] = {"sweeps": [], "peers": [], "others": []}
        for (where, name, *_), trials in groups.items():
            found[where if trials[0].shape is not None else "others"].append(TrialFile(str(name), tuple(trials)))
        return found["sweeps"], found["peers"], found["others"]

    def _validation(self, path: Path) -> Validation:
        """Read what `tuning.validate` wrote: a file, or of a folder the widest set."""
        file = on_record(path)
        if file is None:
            return Validation.reported_alone()
        validation = Validation.read(file)
        self._count(self._shown(file), len(validation.rows), "comparison")
        return validation

    def _tuned_entries(self, directory: Path | None) -> list[tuple[str, tuned.TunedEntry]]:
        entries = []
        for folder in [directory] if directory else [tuned.user_dir(), tuned.TUNED_DIR]:
            name = "splash_attn/tuned" if folder == tuned.TUNED_DIR else "own tuned entries"
            for path in sorted(folder.glob("*.json")):
                file = tuned.read_file(path)
                entries += [(file.device_kind, entry) for entry in file.entries]
                self._count(f"{name}/{path.name}", len(file.entries), "tuned entry", "tuned entries")
        return entries


def _of_machine(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("sweeps", "peers", "predict.jsonl", "generate.jsonl"))


def newest_of(files: Sequence[TrialFile]) -> tuple[list[TrialFile], list[TrialFile]]:
    """Return the newest file of each shape, dtype, device and backend, and those whose times it outdates.

    Trials of the others, which come from the same sources, are with the newest.
    """
    groups: dict[tuple[object, ...], list[TrialFile]] = {}
    for file in sorted(files, key=lambda file: (file.newest.created_at, file.path)):
        groups.setdefault(_kind(file.newest), []).append(file)
    current, outdated = [], []
    for members in groups.values():
        newest = members[-1]
        same = [file for file in members if file.source == newest.source]
        current.append(TrialFile(newest.path, tuple(trial for file in same for trial in file.trials)))
        outdated += [file for file in members if file not in same]
    return sorted(current, key=_title), sorted(outdated, key=_title)


def _kind(trial: Trial) -> tuple[object, ...]:
    if trial.shape is None:  # of another kernel, which may tune its compiler's options
        return trial.kernel, trial.call, trial.device_kind, trial.backend
    return trial.shape, trial.dtype, trial.device_kind, trial.backend, str(trial.compiler_options)


def _title(file: TrialFile) -> tuple[str, ...]:
    return file.newest.workload, file.newest.device, file.newest.backend, file.newest.dtype, file.path
