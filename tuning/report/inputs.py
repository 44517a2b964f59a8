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
from tuning.validate.record import Validation

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrialFile:
    """The trials of one folder under results/sweeps or results/peers, at least one."""

    path: str
    trials: tuple[Trial, ...]

    @property
    def newest(self) -> Trial:
        return max(self.trials, key=lambda trial: (trial.created_at, trial.record_id))


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

    def trial_files(self, folder: str) -> tuple[TrialFile, ...]:
        """Read the trials of every folder in a folder."""
        paths = sorted((self.results_dir / folder).glob(f"*/{TRIALS_FILE}"))
        found = [TrialFile(self.shown(path), self.lines(path, Trial, "trial")) for path in paths]
        return tuple(file for file in found if file.trials)

    def tuned_entries(self, directory: Path) -> tuple[tuple[str, tuned.TunedEntry], ...]:
        """Read the tuned entries of every device kind."""
        entries = []
        for path in sorted(directory.glob("*.json")):
            file = tuned.read_file(path)
            entries += [(file.device_kind, entry) for entry in file.entries]
            self.count(f"splash_attn/tuned/{path.name}", len(file.entries), "tuned entry", "tuned entries")
        return tuple(entries)

    def validation(self, path: Path) -> Validation:
        """Read what `tuning.validate` wrote."""
        validation = Validation.read(path)
        if validation.libtpu is not None:
            self.count(self.shown(path), len(validation.rows), "comparison")
        return validation


def read(results_dir: Path, validation_path: Path, tuned_dir: Path = tuned.TUNED_DIR) -> Inputs:
    """Read all of it.

    Raises:
      ValueError: a file is malformed; the message names it and the field, and the line where it has lines.
    """
    reader = _Reader(results_dir)
    return Inputs(
        entries=reader.tuned_entries(tuned_dir),
        sweeps=reader.trial_files("sweeps"),
        peers=reader.trial_files("peers"),
        validation=reader.validation(validation_path),
        predicted=reader.lines(results_dir / "predict.jsonl", PredictionRecord, "prediction"),
        generated=reader.lines(results_dir / "generate.jsonl", GenerationRecord, "run"),
        quality=reader.lines(results_dir / "quality.jsonl", QualityRecord, "comparison"),
        files=tuple(reader.files),
        torn=tuple(reader.torn),
    )


def newest_of(files: Sequence[TrialFile]) -> tuple[list[TrialFile], list[TrialFile]]:
    """Return the newest file of each workload, device and backend, in that order, and the others."""
    groups: dict[tuple[str, str, str], list[TrialFile]] = {}
    for file in files:
        trial = file.newest
        groups.setdefault((trial.workload, trial.device, trial.backend), []).append(file)
    current, others = [], []
    for _, members in sorted(groups.items()):
        members.sort(key=lambda file: (file.newest.created_at, file.path))
        current.append(members.pop())
        others += members
    return current, others
