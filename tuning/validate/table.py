"""Lines that `python -m tuning.validate` prints."""

from collections.abc import Sequence
from pathlib import Path

from splash_workbench import cli
from tuning.validate.agreement import Pair, Summary, summarize
from tuning.validate.record import LISTED_ERROR, Comparison, Validation

_LISTED_OPS = 3
_ERRORS = ("rows", "median", "95 %", "worst", "Spearman", "in interval")
_HEAD = ("program", "chip", *_ERRORS, "other memory", "failed", "not made")


def group_lines(validation: Validation) -> list[str]:
    """Return the table by program and chip, then by chip, its last line for all rows."""
    groups = [*validation.groups, *validation.chips]
    rows = [_HEAD, *((group.op, group.device_kind, *_figures(group, group.other_memory_count)) for group in groups)]
    rows.append(("all", "", *_figures(validation, sum(group.other_memory_count for group in validation.groups))))
    return cli.aligned(rows, left=(0, 1))


def _figures(summary: Summary, others: int) -> tuple[str, ...]:
    errors = (summary.median_abs_error, summary.p95_abs_error, summary.max_abs_error)
    return (
        str(summary.row_count),
        *("-" if error is None else f"{error:.1%}" for error in errors),
        "-" if summary.spearman is None else f"{summary.spearman:.3f}",
        "-" if summary.within_interval is None else f"{summary.within_interval:.0%}",
        str(others or ""),
        str(summary.failed_count or ""),
        str(summary.unmade_count or ""),
    )


def listed_lines(validation: Validation) -> list[str]:
    """Return the rows that are off by more than LISTED_ERROR, and what bounds each."""
    if not validation.listed:
        return []
    lines = [f"off by more than {LISTED_ERROR:.0%}, milliseconds reported and predicted:"]
    for row in validation.listed:
        lines.append(f"{row.id} on {row.device_kind}: {row.shape} {row.config}".rstrip())
        lines.append(f"  {row.reported_ms:.4g} -> {row.predicted_ms:.4g}, ratio {row.ratio:.3f}; {_bound(row)}")
        if row.same_memory is False:
            lines.append(
                f"  another compiler made what was timed: it held {row.reported_memory_mb:,.1f} MB, "
                f"and this one's program holds {row.compiled_memory_mb:,.1f}"
            )
        if row.form:
            lines.append(f"  made {row.form}, whose memory is nearest to the reported")
        lines.extend(f"  not known: {text}" for text in row.unresolved)
        if more := row.unresolved_count - len(row.unresolved):
            lines.append(f"  ... and {more} more that are not known")
    return lines


def _bound(row: Comparison) -> str:
    ops = ", ".join(f"{op.name} {op.time_s * 1e3:.3g} ({op.bound})" for op in row.ops[:_LISTED_OPS])
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row.shares.items() if share >= 0.01)
    return f"bound by {row.bottleneck}: {ops}; {shares}"


def missing_lines(validation: Validation) -> list[str]:
    """Return the rows without a prediction, those of one reason in one line."""
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for row in validation.rows:
        if row.error:
            reasons.setdefault((row.status, row.device_kind, row.error or ""), []).append(row.id)
    words = {"failed": "failed", "unmade": "cannot be made", "reported": "not predicted"}
    return [
        f"{_several(ids)} on {kind} {words[status]}: {error}" for (status, kind, error), ids in sorted(reasons.items())
    ]


def _several(ids: Sequence[str]) -> str:
    return ids[0] if len(ids) == 1 else f"{len(ids)} rows, {ids[0]} to {ids[-1]},"


def row_lines(rows: Sequence[Comparison]) -> list[str]:
    """Return a line for every row."""
    width, config_width = (max(len(text) for text in texts) for texts in zip(*map(_names, rows), strict=True))
    lines = [f"{'':<{width}}  {'':<{config_width}}  {'reported':>9}  {'predicted':>9}  {'ratio':>6}  longest ops, ms"]
    for row in rows:
        name, config = _names(row)
        head = f"{name:<{width}}  {config:<{config_width}}  {row.reported_ms:>9.3f}  "
        if row.predicted_ms is None:
            lines.append(f"{head}{'-':>9}  {'-':>6}  {row.error}")
            continue
        ops = ", ".join(f"{op.name} {op.time_s * 1e3:.3f}" for op in row.ops[:_LISTED_OPS])
        lines.append(f"{head}{row.predicted_ms:>9.3f}  {row.ratio:>6.3f}  {ops}")
    return lines


def _names(row: Comparison) -> tuple[str, str]:
    return f"{row.op} {row.shape}", row.config


def measured_lines(pairs: Sequence[Pair], results_dir: Path) -> list[str]:
    """Return the candidates that have been both measured and predicted."""
    if not pairs:
        return [f"measured: no candidate in {results_dir} has been both measured and predicted"]
    width = max(len(pair.name) for pair in pairs)
    lines = [f"measured: records in {results_dir}, joined with the predictions of the same candidates"]
    lines.append(f"{'':<{width}}  {'measured':>9}  {'predicted':>9}  {'ratio':>6}")
    for pair in sorted(pairs, key=lambda pair: pair.name):
        lines.append(f"{pair.name:<{width}}  {pair.actual_ms:>9.3f}  {pair.predicted_ms:>9.3f}  {pair.ratio:>6.3f}")
        lines.extend(f"  {note}" for note in pair.notes)
    for group in dict.fromkeys(pair.group for pair in pairs):
        lines.append(f"{group}: {summarize([pair for pair in pairs if pair.group == group]).line}")
    return lines
