"""The picture of a sweep: two tunables, and in each cell the best time over everything else."""

import collections
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from splash_workbench.trial_status import Status
from tuning.trials.bound import known_device
from tuning.trials.figures import LIGHT
from tuning.trials.records import Trial

#: The tunables of attention's heat map.
ATTENTION = ("block_q", "block_kv")


def file_name(exact: bool, names: tuple[str, str] = ATTENTION) -> str:
    """Return the picture's name. Candidates that are not exact rank apart, and have a picture of their own."""
    axes = "" if names == ATTENTION else f"-{names[0]}-{names[1]}"
    return f"heatmap{axes}{'' if exact else '-int8'}.png"


def draw(trials: Sequence[Trial], names: tuple[str, str] = ATTENTION) -> Figure | None:
    """Draw the ok trials of one sweep, the winner marked. Returns None where there is nothing to draw.

    A cell shows an estimate of a first pass only where nothing in it was settled.

    names: of the tunables, rows first.
    """
    timed = [t for t in trials if t.status is Status.OK and t.time_ms is not None and set(names) <= t.tunables.keys()]
    if not timed:
        return None
    if len(kinds := {(t.call, t.dtype, t.device_kind, t.label) for t in timed}) != 1:
        raise ValueError(f"{kinds=}: expected trials of one shape, dtype, device kind and label.")

    def cell_of(trial: Trial) -> tuple[Any, Any]:
        return trial.tunables[names[0]], trial.tunables[names[1]]

    best: dict[tuple[Any, Any], Trial] = {}
    for trial in sorted(timed, key=lambda trial: (_is_estimate(trial), _time(trial)), reverse=True):
        best[cell_of(trial)] = trial
    failures = collections.defaultdict(set)
    for trial in trials:
        if set(names) <= trial.tunables.keys() and trial.status is not Status.OK:
            failures[cell_of(trial)].add(trial.status.value.replace("_", " "))
    rows = sorted({row for row, _ in best | failures}, key=_order, reverse=True)
    columns = sorted({column for _, column in best | failures}, key=_order)
    times = [[_time(best[r, c]) if (r, c) in best else float("nan") for c in columns] for r in rows]

    # At least as wide as the title's first line.
    size = (max(7.0, 1.8 + 1.15 * len(columns)), 2.2 + 0.62 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("whitesmoke")  # cells that were not tried
    edges = ([number - 0.5 for number in range(len(values) + 1)] for values in (columns, rows))
    axes.pcolormesh(*edges, np.ma.masked_invalid(times), cmap="viridis_r")
    axes.invert_yaxis()
    winner = min([t for t in timed if t.compiled == "whole"] or timed, key=_time)
    shows_compute = winner.block_sizes is not None and names == ATTENTION
    middle = (_time(winner) + max(_time(trial) for trial in best.values())) / 2
    for row, row_value in enumerate(rows):
        for column, column_value in enumerate(columns):
            cell = (row_value, column_value)
            if cell in best:
                trial = best[cell]
                colour = "#fefefe" if _time(trial) > middle else "black"
                compute = f"\n/{trial.block_sizes.block_kv_compute}" if shows_compute and trial.block_sizes else ""
                text = f"{'~' if _is_estimate(trial) else ''}{_time(trial):.4g}{compute}"
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
                if trial is winner:
                    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=3)
                    axes.add_patch(frame)
            elif cell in failures:
                text = "\n".join(sorted(failures[cell]))
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="dimgrey")
    axes.set_xticks(range(len(columns)), labels=[str(c) for c in columns])
    axes.set_yticks(range(len(rows)), labels=[str(r) for r in rows])
    in_cell = "ms, / block_kv_compute" if shows_compute else "ms"
    in_cell += ", ~ from a shorter kernel" if any(map(_is_estimate, best.values())) else ""
    axes.set_xlabel(f"{names[1]} (in the cell: {in_cell})", color=LIGHT["ink"])
    axes.set_ylabel(names[0], color=LIGHT["ink"])
    chip = known_device(winner.device_kind)
    title = [
        f"{_about(winner)} on {chip.name if chip else winner.device_kind}: {winner.label} ms, best of each cell",
        f"winner {winner.time_ms:.3f} ms: {winner.config}",
    ]
    wrapped = "\n".join(textwrap.fill(line, width=int(12 * size[0])) for line in title)
    axes.set_title(wrapped, fontsize=9, color=LIGHT["ink"])
    axes.tick_params(colors=LIGHT["ink"])
    return figure


def _is_estimate(trial: Trial) -> bool:
    return trial.compiled == "shorter"


def _about(trial: Trial) -> str:
    return trial.workload if trial.shape is None else f"{trial.workload} ({trial.shape} {trial.dtype})"


def _order(value: Any) -> tuple[bool, Any]:
    """Return a key that puts numbers before text and None."""
    return (False, value) if isinstance(value, int | float) else (True, str(value))


def _time(trial: Trial) -> float:
    assert trial.time_ms is not None
    return trial.time_ms
