"""Several runs side by side, joined by named scope: medians, their noise, ratios to the first."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from splash_workbench.status import Label

#: Rows that are no scope's, after the part of the run that they are of: "denoise (step)".
NO_SCOPE, STEP, ALL_OPS = "(no scope)", "(step)", "(all ops)"


@dataclasses.dataclass(frozen=True)
class Column:
    """One run.

    Attributes:
      name: of the run.
      label, device: of its times.
      made_by: of a prediction, what made it.
      sessions: for each repeat, scope -> seconds of each step. A prediction has one session of one step.
      notes: what a reader must know of it.
    """

    name: str
    label: Label
    device: str
    made_by: str | None
    sessions: tuple[Mapping[str, Sequence[float]], ...]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        by = f" by {self.made_by}" if self.made_by else ""
        return f"{self.name} ({self.label}{by}, {self.device})"

    @property
    def scopes(self) -> set[str]:
        return {scope for session in self.sessions for scope in session}


@dataclasses.dataclass(frozen=True)
class Cell:
    """A scope in a run.

    Attributes:
      median_s: over all steps of all sessions.
      low_s, high_s: the least 10th and the greatest 90th percentile of its sessions: where a repeat may well fall.
      count: steps.
    """

    median_s: float
    low_s: float
    high_s: float
    count: int

    @classmethod
    def from_sessions(cls, sessions: Iterable[Sequence[float]]) -> "Cell":
        samples = [list(session) for session in sessions if session]
        everything = [time_s for session in samples for time_s in session]
        low_s, high_s = (edge(float(np.percentile(s, q)) for s in samples) for edge, q in ((min, 10), (max, 90)))
        return cls(statistics.median(everything), low_s, high_s, len(everything))


@dataclasses.dataclass(frozen=True)
class Row:
    """A scope in all runs. cells: None where the run lacks it.

    verdicts: for each run after the first: "slower" or "faster" than it where the ranges lie apart, "noise" where they
      overlap ("same" of predictions, which have none), "?" where a run has too few steps to say, "only here", "gone",
      or "" where neither has it.
    """

    scope: str
    cells: tuple[Cell | None, ...]
    verdicts: tuple[str, ...]

    @property
    def ratios(self) -> tuple[float | None, ...]:
        """Median of each run after the first, over the first's."""
        first = self.cells[0]
        return tuple(
            cell.median_s / first.median_s if cell is not None and first is not None and first.median_s else None
            for cell in self.cells[1:]
        )


#: With so many steps of each of two equal runs their ranges lie apart in 1 of 300 rows; with 8 in 1 of 700.
MIN_STEPS = 7


def rows_of(columns: Sequence[Column], depth: int | None = None) -> list[Row]:
    """Return the union of the runs' scopes: steps first, sums next, then by the time of the run that spends most on it.

    depth: join on so many parts of the scope only.
    """
    if depth is not None:
        columns = [_cut(column, depth) for column in columns]
    rows = []
    for scope in {scope for column in columns for scope in column.scopes}:
        cells = tuple(
            Cell.from_sessions(session.get(scope, ()) for session in column.sessions)
            if scope in column.scopes
            else None
            for column in columns
        )
        verdicts = tuple(
            _verdict(columns[0], cells[0], column, cell) for column, cell in zip(columns[1:], cells[1:], strict=True)
        )
        rows.append(Row(scope, cells, verdicts))

    def order(row: Row) -> tuple[int, float, str]:
        rank = next((rank for rank, kind in enumerate((STEP, ALL_OPS)) if row.scope.endswith(kind)), 2)
        return rank, -max(cell.median_s for cell in row.cells if cell is not None), row.scope

    return sorted(rows, key=order)


def notes_of(columns: Sequence[Column]) -> list[str]:
    """Return notes about the figures, for below the table."""
    notes = [f"{column.name}: {note}" for column in columns for note in column.notes]
    labels = {column.label for column in columns}
    if len(labels) > 1:
        notes.append("measured beside predicted: a ratio between them is the prediction's error, not a speed-up")
    if len({column.device for column in columns}) > 1:
        notes.append(f"different devices: {', '.join(sorted({column.device for column in columns}))}")
    single = [column.name for column in columns if column.label is Label.MEASURED and len(column.sessions) == 1]
    if single:
        notes.append(
            f"one session of {', '.join(single)}: what changes between sessions (load, clocks, memory) is not in the "
            "noise; run the same command again, twice or more, alternating the runs"
        )
    counts = [
        sum(len(session.get(scope, ())) for session in column.sessions)
        for column in columns
        if column.label is Label.MEASURED
        for scope in column.scopes
    ]
    if any(count < MIN_STEPS for count in counts):
        notes.append(f'"?": fewer than {MIN_STEPS} steps of it, too few to tell a difference from noise')
    if Label.PREDICTED in labels:
        notes.append("a prediction is a model's exact figure: it has no noise, but the model's error")
    return notes


def records(columns: Sequence[Column], rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the table as flat rows, for CSV and JSON. Seconds."""
    found = []
    for row in rows:
        fields: dict[str, Any] = {"scope": row.scope}
        for index, (column, cell) in enumerate(zip(columns, row.cells, strict=True)):
            unit = f"{column.name}.{column.label}"
            fields |= {
                f"{unit}_s": cell.median_s if cell else None,
                f"{unit}_low_s": cell.low_s if cell else None,
                f"{unit}_high_s": cell.high_s if cell else None,
                f"{column.name}.steps": cell.count if cell else 0,
            }
            if index:
                fields |= {
                    f"{column.name}.ratio": row.ratios[index - 1],
                    f"{column.name}.verdict": row.verdicts[index - 1],
                }
        found.append(fields)
    return found


def text(columns: Sequence[Column], rows: Sequence[Row], limit: int | None = None) -> str:
    """Return the table for a terminal: milliseconds, half the range as +-, ratios and verdicts."""
    lines = _lines(columns, rows[:limit], "")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = [
        "  ".join(
            [f"{line[0]:<{widths[0]}}", *(f"{c:>{w}}" for c, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    ]
    left_out = len(rows) - len(rows[:limit])
    return "\n".join([*shown, *([f"... {left_out} more scopes, all in the files"] if left_out else [])])


def markdown(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """Return the table as Markdown, with titles and notes."""
    header, *lines = [f"| {' | '.join(line)} |" for line in _lines(columns, rows, "verdict")]
    table = [header, f"|{' --- |' * (3 * len(columns) - 1)}", *lines]
    titles = [f"- {column.title}" for column in columns]
    return "\n".join([*titles, "", *table, "", *(f"- {note}" for note in notes_of(columns))]) + "\n"


def _lines(columns: Sequence[Column], rows: Sequence[Row], verdict_title: str) -> list[list[str]]:
    """Return the cells of the table, its header first."""
    header = ["scope", f"{columns[0].name} ms"]
    for column in columns[1:]:
        header += [f"{column.name} ms", "ratio", verdict_title]
    lines = [header]
    for row in rows:
        line = [row.scope, _figure(row.cells[0])]
        for cell, ratio, verdict in zip(row.cells[1:], row.ratios, row.verdicts, strict=True):
            line += [_figure(cell), "" if ratio is None else f"{ratio:.3f}", verdict]
        lines.append(line)
    return lines


def _verdict(first: Column, before: Cell | None, column: Column, cell: Cell | None) -> str:
    if before is None or cell is None:
        return "only here" if cell is not None else ("gone" if before is not None else "")
    measured = [c for owner, c in ((first, before), (column, cell)) if owner.label is Label.MEASURED]
    if any(c.count < MIN_STEPS for c in measured):
        return "?"
    if cell.low_s > before.high_s:
        return "slower"
    if cell.high_s < before.low_s:
        return "faster"
    return "noise" if measured else "same"


def _cut(column: Column, depth: int) -> Column:
    """Return the column with scopes that agree in the first parts summed, step by step."""
    sessions = []
    for session in column.sessions:
        summed: dict[str, list[float]] = {}
        for scope, steps in session.items():
            special = scope.endswith((NO_SCOPE, STEP, ALL_OPS))
            name = scope if special else "/".join(scope.split("/")[:depth])
            before = summed.get(name)
            summed[name] = list(steps) if before is None else [a + b for a, b in zip(before, steps, strict=True)]
        sessions.append(summed)
    return dataclasses.replace(column, sessions=tuple(sessions))


def _figure(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    spread = (cell.high_s - cell.low_s) / 2
    return f"{cell.median_s * 1e3:.3f}" + (f" +-{spread * 1e3:.3f}" if spread else "")
