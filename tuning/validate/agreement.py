"""Predicted times against those of real chips: pairs, what they come to, and their picture."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
import scipy
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from splash_workbench.trial_status import Label, Status
from tuning.trials.figures import LIGHT, log_axes
from tuning.trials.records import Trial

_COLUMNS = 2
#: Of a chip with more pairs than this, points are small and have no names; with so many groups the legend is beside
#: them.
_NAMED_PAIRS, _MANY_GROUPS = 15, 4
#: Of times that span more than this only powers of ten are marked.
_MANY_TICKS = 1e4
#: The band of the picture: the part by which a prediction may be off before it is marked.
BAND = 0.05


@dataclasses.dataclass(frozen=True)
class Pair:
    """One call with both times.

    Attributes:
      group: what the pairs of one source have in common, for the legend: the program, or label and device.
      name: of the call and its configuration.
      label: of the time that is not predicted: measured or reported.
      actual_ms, predicted_ms: milliseconds.
      notes: what a reader must know of either.
      device_kind: of the chip.
      interval_ms: in which the actual time is expected; None where the prediction says none.
    """

    group: str
    name: str
    label: Label
    actual_ms: float
    predicted_ms: float
    notes: tuple[str, ...] = ()
    device_kind: str = ""
    interval_ms: tuple[float, float] | None = None

    @property
    def ratio(self) -> float:
        """Predicted over actual."""
        return self.predicted_ms / self.actual_ms


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """How good the predictions are.

    Attributes:
      row_count: pairs compared.
      failed_count, unmade_count: calls without a prediction, in none of the figures below: those that should have one,
        and those whose program cannot be made again.
      median_abs_error, p95_abs_error, max_abs_error: of |predicted / actual - 1|; None without pairs.
      spearman: rank correlation of predicted and actual times; None where all times of one kind are the same.
      within_interval: fraction of the actual times that lie in the prediction's interval; None without intervals.
    """

    row_count: int = 0
    failed_count: int = 0
    unmade_count: int = 0
    median_abs_error: float | None = None
    p95_abs_error: float | None = None
    max_abs_error: float | None = None
    spearman: float | None = None
    within_interval: float | None = None

    @property
    def line(self) -> str:
        if self.median_abs_error is None or self.max_abs_error is None:
            return "nothing to compare"
        correlation = "-" if self.spearman is None else f"{self.spearman:.3f}"
        rows = "1 row" if self.row_count == 1 else f"{self.row_count} rows"
        return (
            f"{rows}: median error {self.median_abs_error:.1%}, worst {self.max_abs_error:.1%}, Spearman {correlation}"
        )


def summarize(pairs: Sequence[Pair], failed_count: int = 0, unmade_count: int = 0) -> Summary:
    """Return the figures of pairs of one label."""
    errors = [abs(pair.ratio - 1) for pair in pairs]
    within = [pair.interval_ms[0] <= pair.actual_ms <= pair.interval_ms[1] for pair in pairs if pair.interval_ms]
    return Summary(
        row_count=len(pairs),
        failed_count=failed_count,
        unmade_count=unmade_count,
        median_abs_error=statistics.median(errors) if errors else None,
        p95_abs_error=float(np.percentile(errors, 95)) if errors else None,
        max_abs_error=max(errors, default=None),
        spearman=spearman([pair.predicted_ms for pair in pairs], [pair.actual_ms for pair in pairs]),
        within_interval=statistics.mean(within) if within else None,
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Return the rank correlation; None where one side does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return float(scipy.stats.spearmanr(x, y).statistic)


def pairs_of(trials: Iterable[Trial]) -> list[Pair]:
    """Return the candidates that have been both predicted and measured.

    Joined are ok trials of the same kernel source, call (shape and dtype), device kind, compiler options and candidate:
    the newest of each label.
    """
    newest: dict[Label, dict[tuple[str, ...], Trial]] = {Label.PREDICTED: {}, Label.MEASURED: {}}
    for trial in sorted(trials, key=lambda trial: trial.created_at):
        if trial.status is Status.OK and trial.time_ms is not None and trial.label in newest:
            source = trial.environment.kernel_hash
            call = (trial.call, trial.dtype, trial.device_kind, str(trial.compiler_options))
            key: tuple[str, ...] = (trial.kernel, source, *call, trial.key)
            newest[trial.label][key] = trial
    found = []
    for joined_by, measured in newest[Label.MEASURED].items():
        predicted = newest[Label.PREDICTED].get(joined_by)
        if predicted is not None:
            assert measured.time_ms is not None and predicted.time_ms is not None
            found.append(
                Pair(
                    group=f"measured on {measured.device_kind}",
                    name=f"{measured.workload} {measured.kernel} {measured.config}",
                    label=Label.MEASURED,
                    actual_ms=measured.time_ms,
                    predicted_ms=predicted.time_ms,
                    notes=tuple(dict.fromkeys((*measured.notes, *predicted.notes))),
                    device_kind=measured.device_kind,
                )
            )
    return found


def parity(pairs: Sequence[Pair]) -> Figure:
    """Draw predicted over actual times, log-log, with the identity and a band of BAND either way: a panel a chip.

    Of a chip with few pairs those outside of the band are named. The points have the ids pair-0, pair-1, ... in the
    order of `pairs`.
    """
    kinds = list(dict.fromkeys(pair.device_kind for pair in pairs))
    columns = min(len(kinds), _COLUMNS)
    rows = math.ceil(len(kinds) / columns)
    many = len({(pair.group, pair.device_kind) for pair in pairs}) >= _MANY_GROUPS
    figure = Figure(figsize=((7.8 if many else 4.8) * columns, 4.2 * rows), layout="constrained")
    for number, kind in enumerate(kinds, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _draw_panel(axes, [(n, pair) for n, pair in enumerate(pairs) if pair.device_kind == kind])
        if len(kinds) > 1:
            axes.set_title(kind, fontsize=9, color=LIGHT["ink"])
    return figure


def _draw_panel(axes: Axes, pairs: Sequence[tuple[int, Pair]]) -> None:
    """Draw the pairs of one chip, each with its number among all."""
    times = [time for _, pair in pairs for time in (pair.actual_ms, pair.predicted_ms)]
    low, high = min(times) / 1.5, max(times) * 1.5
    line = [low, high]
    edges = ([x * (1 - BAND) for x in line], [x * (1 + BAND) for x in line])
    axes.fill_between(line, *edges, color=LIGHT["line"], lw=0, label=f"within {BAND:.0%}")
    axes.plot(line, line, color=LIGHT["muted"], lw=1)
    groups = list(dict.fromkeys(pair.group for _, pair in pairs))
    named = len(pairs) <= _NAMED_PAIRS
    for number, pair in pairs:
        style = _style(groups.index(pair.group))
        size = 6.5 if named else 4
        axes.plot(
            pair.actual_ms, pair.predicted_ms, **style, ms=size, mec=LIGHT["paper"], mew=0.8, gid=f"pair-{number}"
        )
        if named and abs(pair.ratio - 1) > BAND:
            name = axes.annotate(
                f"{pair.name}: {pair.ratio:.2f}",
                (pair.actual_ms, pair.predicted_ms),
                (-6, 6),
                textcoords="offset points",
                ha="right",
                fontsize=6,
                color=LIGHT["muted"],
            )
            name.set_in_layout(False)  # a long name may reach out of the axes: they would shrink to nothing
    for index, group in enumerate(groups):
        summary = summarize([pair for _, pair in pairs if pair.group == group])
        label = f"{group}\n{summary.line}"
        if len(groups) >= _MANY_GROUPS:
            label = (
                f"{group}: {summary.row_count}, median {summary.median_abs_error:.1%}, 95 % {summary.p95_abs_error:.1%}"
            )
        axes.plot([], [], **_style(index), label=label)
    log_axes(axes, (1.0, 2.0, 5.0) if high / low < _MANY_TICKS else (1.0,))
    axes.set(xlim=line, ylim=line, ylabel="predicted, ms")
    axes.set_xlabel(f"{' or '.join(dict.fromkeys(str(pair.label) for _, pair in pairs))}, ms")
    look: dict[str, Any] = {"frameon": False, "labelcolor": LIGHT["ink"]}
    if len(groups) < _MANY_GROUPS:
        axes.legend(loc="upper left", fontsize=7, **look)
    else:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=6, markerscale=0.7, **look)


def _style(index: int) -> dict[str, Any]:
    """Return marker and colour of a group: twenty-five that differ."""
    return {"marker": "os^Dv"[(index + index // 5) % 5], "color": LIGHT[f"c{index % 5 + 1}"], "ls": "none"}
