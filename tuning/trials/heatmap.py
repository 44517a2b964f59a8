"""The picture of a sweep: block_q x block_kv, the best time over everything else in each cell."""

import collections
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from splash_workbench.trial_status import Status
from tuning.trials.figures import LIGHT
from tuning.trials.records import Trial


def file_name(exact: bool) -> str:
    """Return the picture's name. Candidates that are not exact rank apart, and have a picture of their own."""
    return "heatmap.png" if exact else "heatmap-int8.png"


def draw(trials: Sequence[Trial]) -> Figure | None:
    """Draw the ok trials of one sweep, the winner marked. Returns None where there is nothing to draw."""
    timed = [t for t in trials if t.status is Status.OK and t.time_ms is not None and t.block_sizes is not None]
    if not timed:
        return None
    if len(kinds := {(str(t.shape), t.dtype, t.device_kind, t.label) for t in timed}) != 1:
        raise ValueError(f"{kinds=}: expected trials of one shape, dtype, device kind and label.")
    best: dict[tuple[int, int], Trial] = {}
    for trial in sorted(timed, key=_time, reverse=True):
        best[trial.block_sizes.block_q, trial.block_sizes.block_kv] = trial  # type: ignore[union-attr]
    failures = collections.defaultdict(set)
    for trial in trials:
        if trial.block_sizes is not None and trial.status is not Status.OK:
            failures[trial.block_sizes.block_q, trial.block_sizes.block_kv].add(trial.status.value.replace("_", " "))
    rows = sorted({block_q for block_q, _ in best | failures}, reverse=True)
    columns = sorted({block_kv for _, block_kv in best | failures})
    times = [[_time(best[r, c]) if (r, c) in best else float("nan") for c in columns] for r in rows]

    # At least as wide as the title's first line.
    size = (max(7.0, 1.8 + 1.15 * len(columns)), 2.2 + 0.62 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("whitesmoke")  # cells that were not tried
    edges = ([number - 0.5 for number in range(len(values) + 1)] for values in (columns, rows))
    axes.pcolormesh(*edges, np.ma.masked_invalid(times), cmap="viridis_r")
    axes.invert_yaxis()
    winner = min(timed, key=_time)
    middle = (_time(winner) + max(_time(trial) for trial in best.values())) / 2
    for row, block_q in enumerate(rows):
        for column, block_kv in enumerate(columns):
            cell = (block_q, block_kv)
            if cell in best:
                trial = best[cell]
                colour = "#fefefe" if _time(trial) > middle else "black"
                text = f"{_time(trial):.4g}\n/{trial.block_sizes.block_kv_compute}"  # type: ignore[union-attr]
                axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
                if trial is winner:
                    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=3)
                    axes.add_patch(frame)
            elif cell in failures:
                text = "\n".join(sorted(failures[cell]))
                axes.text(column, row, text, ha="center", va="center", fontsize=7, color="dimgrey")
    axes.set_xticks(range(len(columns)), labels=[str(c) for c in columns])
    axes.set_yticks(range(len(rows)), labels=[str(r) for r in rows])
    axes.set_xlabel("block_kv (in the cell: ms, / block_kv_compute)", color=LIGHT["ink"])
    axes.set_ylabel("block_q", color=LIGHT["ink"])
    axes.set_title(
        f"{winner.workload} ({winner.shape} {winner.dtype}) on {winner.device}: {winner.label} ms, best of each cell\n"
        + textwrap.fill(f"winner {winner.time_ms:.3f} ms: {winner.config}", width=int(12 * size[0])),
        fontsize=9,
        color=LIGHT["ink"],
    )
    axes.tick_params(colors=LIGHT["ink"])
    return figure


def _time(trial: Trial) -> float:
    assert trial.time_ms is not None
    return trial.time_ms
