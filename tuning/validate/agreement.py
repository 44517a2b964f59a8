"""Predicted times against those of real chips: pairs, what they come to, and their picture."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from splash_workbench.status import Label, Status
from tuning.trials.records import Trial

#: The band of the picture: the part by which a prediction may be off before it is marked.
BAND = 0.15


@dataclasses.dataclass(frozen=True)
class Pair:
    """One call with both times.

    Attributes:
      group: what the pairs of one source have in common, for the legend: label, device, who.
      name: of the call and its configuration.
      label: of the time that is not predicted: measured or reported.
      actual_ms, predicted_ms: milliseconds.
      notes: what a reader must know of either.
    """

    group: str
    name: str
    label: Label
    actual_ms: float
    predicted_ms: float
    notes: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """Predicted over actual."""
        return self.predicted_ms / self.actual_ms


@dataclasses.dataclass(frozen=True)
class Summary:
    """How good the predictions are.

    Attributes:
      row_count: pairs compared; failed_count: calls without a prediction, in none of the figures below.
      median_abs_error, max_abs_error: of |predicted / actual - 1|; None without pairs.
      spearman: rank correlation of predicted and actual times; None where all times of one kind are the same.
    """

    row_count: int
    failed_count: int
    median_abs_error: float | None
    max_abs_error: float | None
    spearman: float | None

    @property
    def line(self) -> str:
        if self.median_abs_error is None or self.max_abs_error is None:
            return "nothing to compare"
        correlation = "-" if self.spearman is None else f"{self.spearman:.3f}"
        rows = "1 row" if self.row_count == 1 else f"{self.row_count} rows"
        return (
            f"{rows}: median error {self.median_abs_error:.1%}, worst {self.max_abs_error:.1%}, Spearman {correlation}"
        )


def summarize(pairs: Sequence[Pair], failed_count: int = 0) -> Summary:
    """The figures of pairs of one label."""
    errors = [abs(pair.ratio - 1) for pair in pairs]
    return Summary(
        row_count=len(pairs),
        failed_count=failed_count,
        median_abs_error=statistics.median(errors) if errors else None,
        max_abs_error=max(errors, default=None),
        spearman=spearman([pair.predicted_ms for pair in pairs], [pair.actual_ms for pair in pairs]),
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation: Pearson's, of the ranks, ties sharing their mean rank. None where one side does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(_ranks(x), _ranks(y))


def pairs_of(trials: Iterable[Trial]) -> list[Pair]:
    """The candidates that have been both predicted and measured.

    Joined are ok trials of the same kernel source, call (shape and dtype), device kind and candidate: the newest of
    each label.
    """
    newest: dict[Label, dict[tuple[str, ...], Trial]] = {Label.PREDICTED: {}, Label.MEASURED: {}}
    for trial in sorted(trials, key=lambda trial: trial.created_at):
        if trial.status is Status.OK and trial.time_ms is not None and trial.label in newest:
            source = trial.environment.kernel_hash
            key: tuple[str, ...] = (trial.kernel, source, str(trial.shape), trial.dtype, trial.device_kind, trial.key)
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
                )
            )
    return found


def draw(pairs: Sequence[Pair], path: Path, title: str) -> None:
    """Draws predicted over actual times to a PNG, log-log, with the identity and a band of BAND either way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    assert pairs, "something to draw"
    times = [time for pair in pairs for time in (pair.actual_ms, pair.predicted_ms)]
    low, high = min(times) / 4, max(times) * 4  # room for the names
    line = [low, high]
    figure, axes = plt.subplots(figsize=(7.5, 7.0), layout="constrained")
    axes.plot(line, line, color="black", linewidth=1, label="predicted = actual")
    axes.fill_between(
        line, [x * (1 - BAND) for x in line], [x * (1 + BAND) for x in line], color="lightgrey", label=f"±{BAND:.0%}"
    )
    for index, group in enumerate(dict.fromkeys(pair.group for pair in pairs)):
        of_group = [pair for pair in pairs if pair.group == group]
        summary = summarize(of_group)
        axes.scatter(
            [pair.actual_ms for pair in of_group],
            [pair.predicted_ms for pair in of_group],
            marker="os^Dv"[index % 5],
            zorder=3,
            label=f"{group}\n{summary.line}",
        )
    for number, pair in enumerate(sorted(pairs, key=lambda pair: pair.actual_ms)):
        above = number % 2 == 0
        label = axes.annotate(
            f"{pair.name}: {pair.ratio:.2f}",
            (pair.actual_ms, pair.predicted_ms),
            annotation_clip=True,
            xytext=(-6, 6) if above else (6, -6),
            textcoords="offset points",
            ha="right" if above else "left",
            va="bottom" if above else "top",
            fontsize=6,
            color="red" if abs(pair.ratio - 1) > BAND else "dimgrey",
        )
        label.set_in_layout(False)  # a long name may reach out of the axes: they would shrink to nothing
    axes.set(xscale="log", yscale="log", xlim=line, ylim=line, aspect="equal")
    labels = " or ".join(dict.fromkeys(str(pair.label) for pair in pairs))
    axes.set_xlabel(f"{labels} (ms)")
    axes.set_ylabel("predicted (ms)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        if math.log10(high / low) < 1.5:
            axis.set_minor_formatter(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(which="both", linewidth=0.3)
    axes.legend(loc="upper left", fontsize=8)
    axes.set_title(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=150, format="png")
    plt.close(figure)
    temporary.replace(path)


def _ranks(values: Sequence[float]) -> list[float]:
    return [(sum(v < x for v in values) + sum(v <= x for v in values) + 1) / 2 for x in values]
