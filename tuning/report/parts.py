"""Pieces that both templates are given, and how a number is written."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from splash_workbench.trial_status import Label
from tuning.trials.bound import known_device

MISSING = "–"  # noqa: RUF001

#: (name, label, value by piece, note)
BarRow = tuple[str, Label, Mapping[str, float], str]


def stack(title: str, unit: str, rows: Sequence[BarRow], colours: Mapping[str, str], digits: int = 3) -> dict[str, Any]:
    """Return bars of stacked pieces on one scale, for `stacked`; widths of pieces are in percent of the longest bar.

    colours: CSS variable of `figures.COLOURS` by piece, in the order in which they are stacked; pieces without one come
    last, in the last colour.
    """
    found = {piece for _, _, values, _ in rows for piece, value in values.items() if value > 0}
    paint = {piece: colours[piece] for piece in colours if piece in found}
    paint |= dict.fromkeys(sorted(found - set(colours)), "c6")
    longest = max((sum(values.values()) for _, _, values, _ in rows), default=0.0) or 1.0
    bars = [
        {
            "name": name,
            "label": label,
            "total": sum(values.values()),
            "note": note,
            "segments": [
                {
                    "name": piece.replace("_", " "),
                    "value": values[piece],
                    "width": values[piece] / longest * 100,
                    "colour": colour,
                }
                for piece, colour in paint.items()
                if values.get(piece, 0) > 0
            ],
        }
        for name, label, values, note in rows
    ]
    legend = [(piece.replace("_", " "), colour) for piece, colour in paint.items()]
    return {
        "title": title,
        "unit": unit,
        "digits": digits,
        "bars": bars,
        "legend": legend if len(legend) > 1 else [],
    }


def significant(value: float | None, digits: int = 4) -> str:
    """Return a number rounded to so many significant digits, never in powers of ten."""
    if value is None:
        return MISSING
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def percent(value: float | None, digits: int = 0) -> str:
    """Return "94 %" for 0.942."""
    return MISSING if value is None else f"{value * 100:.{digits}f} %"


def signed_percent(value: float | None) -> str:
    """Return "−1.4 %" for -0.0135, with a minus sign as long as the plus."""  # noqa: RUF002
    return MISSING if value is None else f"{value * 100:+.1f} %".replace("-", "\u2212")


def device_title(device_kind: str) -> str:
    """Return "TPU v6e" for "TPU v6 lite", and the kind of an unknown device."""
    spec = known_device(device_kind)
    return f"TPU {spec.name}" if spec else device_kind


def listed(items: Iterable[str]) -> str:
    """Return each item once, in order, with commas."""
    return ", ".join(sorted(dict.fromkeys(items)))


def commit(name: str | None, dirty: bool = False) -> str:
    """Return a commit, short, with a mark where tracked files differed from it."""
    return "no commit" if name is None else name[:7] + ("+changes" if dirty else "")


def compiler(versions: Mapping[str, str]) -> str:
    """Return the versions of what compiled, for a caption."""
    return ", ".join(f"{name} {versions[name]}" for name in ("libtpu", "jax") if name in versions)


def origin(records: Sequence[Any], how: str, sources: str = "") -> str:
    """Return how the figures of trials or records were got: `how`, versions, sources, commits and days."""
    days = sorted({record.created_at[:10] for record in records})
    commits = listed(commit(record.environment.git_commit, record.environment.git_dirty) for record in records)
    versions = listed(compiler(record.environment.versions) for record in records)
    return f"{how}{versions}{sources}; commit {commits}; {' to '.join(dict.fromkeys((days[0], days[-1])))}"
