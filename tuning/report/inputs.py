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
    """Trials of one shape, dtype, device and backend from a folder of results/sweeps or results/peers, at least one."""

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


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that is on record.

    Attributes:
      entries: (device kind, tuned entry).
      sweeps, peers: one for each folder.
      validation: of `tuning.validate`, or the reported rows alone.
      predicted, generated, quality: the lines of the pipeline's files.
      files: (file, what it holds) of each file that was read.
      torn: a line about each that a crash tore, and that is left out.
    """

    entries: tuple[tuple[str, tuned.TunedEntry], ...]
    sweeps: tuple[TrialFile, ...]
    peers: tuple[TrialFile, ...]
    validation: Validation
    predicted: tuple[PredictionRecord, ...]
    generated: tuple[GenerationRecord, ...]
    quality: tuple[QualityRecord, ...]
    files: tuple[tuple[str, str], ...]
    torn: tuple[str, ...]


class _Reader:
    """Reads files of a results folder, and keeps account of what was read and what was torn."""

    def __init__(self, results_dir: Path) -> None:
        self.results_dir = results_dir
        self.files: list[tuple[str, str]] = []
        self.torn: list[str] = []

    def shown(self, path: Path) -> str:
        """Return a path as the page names it."""
        inside = path.is_relative_to(self.results_dir)
        return f"{self.results_dir.name}/{path.relative_to(self.results_dir).as_posix()}" if inside else path.name

    def count(self, path: str, number: int, one: str, several: str | None = None) -> None:
        """Note how many records a file had, where it had any."""
        if number:
            self.files.append((path, f"{number} {one if number == 1 else several or one + 's'}"))

    def lines(self, path: Path, kind: type[T], what: str) -> tuple[T, ...]:
        """Read JSON lines."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = jsonl.read(path, kind)
        self.torn += [str(warning.message).replace(str(path), self.shown(path)) for warning in caught]
        self.count(self.shown(path), len(found), what)
        return tuple(found)

    def trial_files(self) -> dict[str, list[TrialFile]]:
        """Read the trials of every folder in sweeps and in peers, one name for each shape."""
        read = [
            ((folder, self.shown(path)), trial)
            for folder in ("sweeps", "peers")
            for path in sorted((self.results_dir / folder).glob(f"*/{TRIALS_FILE}"))
            for trial in self.lines(path, Trial, "trial")
        ]
        groups: dict[tuple[object, ...], list[Trial]] = {}
        for (place, _), trial in zip(read, named_apart([trial for _, trial in read]), strict=True):
            groups.setdefault((*place, *_kind(trial)), []).append(trial)
        found: dict[str, list[TrialFile]] = {"sweeps": [], "peers": []}
        for (folder, path, *_), trials in groups.items():
            found[str(folder)].append(TrialFile(str(path), tuple(trials)))
        return found

    def tuned_entries(self, directory: Path | None) -> tuple[tuple[str, tuned.TunedEntry], ...]:
        """Read the tuned entries of every device kind: of a folder, or without one the user's and the shipped ones."""
        entries = []
        for folder in [directory] if directory else [tuned.user_dir(), tuned.TUNED_DIR]:
            name = "splash_attn/tuned" if folder == tuned.TUNED_DIR else "own tuned entries"
            for path in sorted(folder.glob("*.json")):
                file = tuned.read_file(path)
                entries += [(file.device_kind, entry) for entry in file.entries]
                self.count(f"{name}/{path.name}", len(file.entries), "tuned entry", "tuned entries")
        return tuple(entries)

    def validation(self, path: Path) -> Validation:
        """Read what `tuning.validate` wrote: a file, or of a folder the widest set."""
        file = on_record(path)
        if file is None:
            return Validation.reported_alone()
        validation = Validation.read(file)
        self.count(self.shown(file), len(validation.rows), "comparison")
        return validation


def read(results_dir: Path, validation_path: Path, tuned_dir: Path | None = None) -> Inputs:
    """Read all of it.

    Raises:
      ValueError: a file is malformed; the message names it and the field, and the line where it has lines.
    """
    reader = _Reader(results_dir)
    entries, files = reader.tuned_entries(tuned_dir), reader.trial_files()
    return Inputs(
        entries=entries,
        sweeps=tuple(files["sweeps"]),
        peers=tuple(files["peers"]),
        validation=reader.validation(validation_path),
        predicted=reader.lines(results_dir / "predict.jsonl", PredictionRecord, "prediction"),
        generated=reader.lines(results_dir / "generate.jsonl", GenerationRecord, "run"),
        quality=reader.lines(results_dir / "quality.jsonl", QualityRecord, "comparison"),
        files=tuple(reader.files),
        torn=tuple(reader.torn),
    )


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
    return trial.shape, trial.dtype, trial.device_kind, trial.backend, str(trial.compiler_options)


def _title(file: TrialFile) -> tuple[str, ...]:
    return file.newest.workload, file.newest.device, file.newest.backend, file.newest.dtype, file.path
