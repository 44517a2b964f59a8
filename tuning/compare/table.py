"""Several runs side by side, joined by named scope: medians, their noise, ratios to the first."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from splash_workbench import cli
from splash_workbench.trial_status import Label

#: Rows that are no scope's, after the part of the run that they are of: "denoise (step)".
NO_SCOPE, STEP, ALL_OPS = "(no scope)", "(step)", "(all ops)"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run to compare.

    Attributes:
      made_by: of a prediction, what made it.
      sessions: for each repeat, scope -> seconds of each step. A prediction has one session of one step.
      spaces: by part, an XSpace of it for TensorBoard; of the last repeat.
      paths: by part, the file that it is from, where it is from one.
      config: what ran, as far as is known.
    """

    name: str
    label: Label
    device: str
    made_by: str | None
    sessions: tuple[Mapping[str, Sequence[float]], ...]
    notes: tuple[str, ...] = ()
    spaces: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paths: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        by = f" by {self.made_by}" if self.made_by else ""
        return f"{self.name} ({self.label}{by}, {self.device})"

    @property
    def scopes(self) -> set[str]:
        return {scope for session in self.sessions for scope in session}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A scope in a run: median of all steps of all sessions, and the range where a repeat may well fall.

    low_s, high_s: the least 10th and the greatest 90th percentile of its sessions; count: steps.
    """

    median_s: float
    low_s: float
    high_s: float
    count: int

    @classmethod
    def of(cls, run: Run, scope: str) -> Self | None:
        """Return the cell, None where the run lacks the scope."""
        samples = [list(session[scope]) for session in run.sessions if session.get(scope)]
        if not samples:
            return None
        low_s, high_s = (edge(float(np.percentile(s, q)) for s in samples) for edge, q in ((min, 10), (max, 90)))
        everything = [time_s for session in samples for time_s in session]
        return cls(statistics.median(everything), low_s, high_s, len(everything))


@dataclasses.dataclass(frozen=True)
class Row:
    """A scope in all runs. cells: None where the run lacks it; ratios: median of each run after the first, over its.

    verdicts: for each run after the first: "slower" or "faster" than it where the ranges lie apart, "noise" where they
      overlap ("same" of predictions, which have none), "?" where a run has too few steps to say, "only here", "gone",
      or "" where neither has it.
    """

    scope: str
    cells: tuple[Cell | None, ...]
    ratios: tuple[float | None, ...]
    verdicts: tuple[str, ...]


#: With so many steps of each of two equal runs their ranges lie apart in 1 of 300 rows; with 8 in 1 of 700.
MIN_STEPS = 7


def rows_of(runs: Sequence[Run], depth: int | None = None) -> list[Row]:
    """Return the union of the runs' scopes: steps first, sums next, then by the time of the run that spends most on it.

    depth: join on so many parts of the scope only.
    """
    if depth is not None:
        runs = [_cut(run, depth) for run in runs]
    rows = []
    for scope in {scope for run in runs for scope in run.scopes}:
        before, *others = cells = [Cell.of(run, scope) for run in runs]
        ratios = (cell.median_s / before.median_s if cell and before and before.median_s else None for cell in others)
        verdicts = (_verdict(runs[0], before, run, cell) for run, cell in zip(runs[1:], others, strict=True))
        rows.append(Row(scope, tuple(cells), tuple(ratios), tuple(verdicts)))

    def order(row: Row) -> tuple[int, float, str]:
        rank = next((rank for rank, kind in enumerate((STEP, ALL_OPS)) if row.scope.endswith(kind)), 2)
        return rank, -max(cell.median_s for cell in row.cells if cell is not None), row.scope

    return sorted(rows, key=order)


def notes_of(runs: Sequence[Run]) -> list[str]:
    """Return notes about the figures, for below the table."""
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    labels = {run.label for run in runs}
    if len(labels) > 1:
        notes.append("measured beside predicted: a ratio between them is the prediction's error, not a speed-up")
    if len({run.device for run in runs}) > 1:
        notes.append(f"different devices: {', '.join(sorted({run.device for run in runs}))}")
    if single := [run.name for run in runs if run.label is Label.MEASURED and len(run.sessions) == 1]:
        notes.append(
            f"one session of {', '.join(single)}: what changes between sessions (load, clocks, memory) is not in the "
            "noise; run the same command again, twice or more, alternating the runs"
        )
    measured = [run for run in runs if run.label is Label.MEASURED]
    counts = [sum(len(session.get(scope, ())) for session in run.sessions) for run in measured for scope in run.scopes]
    if any(count < MIN_STEPS for count in counts):
        notes.append(f'"?": fewer than {MIN_STEPS} steps of it, too few to tell a difference from noise')
    if Label.PREDICTED in labels:
        notes.append("a prediction is a model's exact figure: it has no noise, but the model's error")
    return notes


def records(runs: Sequence[Run], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table as flat rows, for CSV and JSON. Seconds."""
    found = []
    for row in rows:
        fields: dict[str, Any] = {"scope": row.scope}
        for index, (run, cell) in enumerate(zip(runs, row.cells, strict=True)):
            for name in ("median_s", "low_s", "high_s"):
                fields[f"{run.name}.{run.label}_{name.removeprefix('median_')}"] = getattr(cell, name, None)
            fields[f"{run.name}.steps"] = cell.count if cell else 0
            if index:
                fields[f"{run.name}.ratio"] = row.ratios[index - 1]
                fields[f"{run.name}.verdict"] = row.verdicts[index - 1]
        found.append(fields)
    return found


def text(runs: Sequence[Run], rows: Sequence[Row], limit: int | None = None) -> str:
    """Return the table for a terminal: milliseconds, half the range as +-, ratios and verdicts."""
    shown = cli.aligned(_lines(runs, rows[:limit], ""))
    if left_out := len(rows) - len(rows[:limit]):
        shown.append(f"... {left_out} more scopes, all in the files")
    return "\n".join(shown)


def markdown(runs: Sequence[Run], rows: Sequence[Row]) -> str:
    """Return the table as Markdown, with titles and notes."""
    header, *lines = [f"| {' | '.join(line)} |" for line in _lines(runs, rows, "verdict")]
    table = [header, f"|{' --- |' * (3 * len(runs) - 1)}", *lines]
    titles = [f"- {run.title}" for run in runs]
    return "\n".join([*titles, "", *table, "", *(f"- {note}" for note in notes_of(runs))]) + "\n"


def _lines(runs: Sequence[Run], rows: Sequence[Row], verdict_title: str) -> list[list[str]]:
    """Return the cells of the table, its header first."""
    header = ["scope", f"{runs[0].name} ms"]
    for run in runs[1:]:
        header += [f"{run.name} ms", "ratio", verdict_title]
    lines = [header]
    for row in rows:
        line = [row.scope, _figure(row.cells[0])]
        for cell, ratio, verdict in zip(row.cells[1:], row.ratios, row.verdicts, strict=True):
            line += [_figure(cell), "" if ratio is None else f"{ratio:.3f}", verdict]
        lines.append(line)
    return lines


def _verdict(first: Run, before: Cell | None, run: Run, cell: Cell | None) -> str:
    if before is None or cell is None:
        return "only here" if cell is not None else ("gone" if before is not None else "")
    measured = [c for owner, c in ((first, before), (run, cell)) if owner.label is Label.MEASURED]
    if any(c.count < MIN_STEPS for c in measured):
        return "?"
    if cell.low_s > before.high_s:
        return "slower"
    if cell.high_s < before.low_s:
        return "faster"
    return "noise" if measured else "same"


def _cut(run: Run, depth: int) -> Run:
    """Return the run with scopes that agree in the first parts summed, step by step."""
    sessions = []
    for session in run.sessions:
        summed: dict[str, list[float]] = {}
        for scope, steps in session.items():
            special = scope.endswith((NO_SCOPE, STEP, ALL_OPS))
            name = scope if special else "/".join(scope.split("/")[:depth])
            before = summed.get(name, [0.0] * len(steps))
            summed[name] = [a + b for a, b in zip(before, steps, strict=True)]
        sessions.append(summed)
    return dataclasses.replace(run, sessions=tuple(sessions))


def _figure(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = (cell.high_s - cell.low_s) / 2
    return f"{cell.median_s * 1e3:.3f}" + (f" +-{spread * 1e3:.3f}" if spread else "")
