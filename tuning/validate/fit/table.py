"""Lines that `python -m tuning.validate.fit` prints, and the tables that the documentation includes."""

from collections.abc import Iterator, Sequence

from tuning.validate.fit.fitting import Errors, Fitted

_Row = Sequence[str]


def lines(fitted: Fitted) -> Iterator[str]:
    """Return what is printed."""
    yield f"fitted on {fitted.row_count} rows of set={fitted.set}; without"
    yield from (f"  {count} rows: {reason}" for reason, count in sorted(fitted.without.items()))
    for title, head, rows in _tables(fitted):
        yield from ("", title)
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        for row in (head, *rows):
            yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def markdown(fitted: Fitted) -> Iterator[str]:
    """Return the same as Markdown."""
    yield f"Fitted on {fitted.row_count} rows of `set={fitted.set}`. Without:"
    yield ""
    yield from (f"- {count} rows: {reason}" for reason, count in sorted(fitted.without.items()))
    for title, head, rows in _tables(fitted):
        yield from ("", f"{title}:", "")
        for row in (head, ["---"] * len(head), *rows):
            yield f"| {' | '.join(row)} |"


def _tables(fitted: Fitted) -> Iterator[tuple[str, _Row, list[_Row]]]:
    constants: list[_Row] = [
        (name, f"{value:.4g}", f"{new:.4g}", f"{new / value - 1:+.1%}", f"{fitted.equal_weights[name]:.4g}")
        for (name, value), new in zip(fitted.in_use.items(), fitted.constants.values(), strict=True)
    ]
    yield "Constants", ("constant", "in use", "fitted", "change", "programs weighed the same"), constants
    groups: list[_Row] = [
        (group.op, group.device, str(group.row_count), *_percent(group.in_use), *_percent(group.fitted))
        for group in fitted.groups
    ]
    head = ("program", "chip", "rows", "median", "95 %", "worst", "median, fitted", "95 %, fitted", "worst, fitted")
    yield "Errors at the constants in use, and as fitted", head, groups
    programs: list[_Row] = [
        (
            left_out.op,
            str(left_out.row_count),
            *_percent(left_out.errors)[:2],
            *(f"{value:.3g}" for value in left_out.constants.values()),
        )
        for left_out in fitted.programs
    ]
    left_out_head = ("program left out", "rows", "median", "95 %", *fitted.in_use)
    yield "Errors of each program at constants fitted without it, and these", left_out_head, programs


def _percent(errors: Errors) -> tuple[str, str, str]:
    return f"{errors.median:.1%}", f"{errors.p95:.1%}", f"{errors.worst:.1%}"
