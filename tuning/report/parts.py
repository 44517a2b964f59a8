"""Pieces that both templates are given, and how a number is written."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from splash_workbench.status import Label
from tuning.trials.bound import known_device

MISSING = "–"  # noqa: RUF001


#: (name, label, value by piece, note)
BarRow = tuple[str, Label, Mapping[str, float], str]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A piece of a bar. colour: a CSS variable of `charts.COLOURS`; width: percent of the widest bar."""

    name: str
    value: float
    width: float
    colour: str


@dataclasses.dataclass(frozen=True)
class Bar:
    """A row of stacked pieces. total: of all of them; note: small, below the name."""

    name: str
    label: Label
    total: float
    segments: tuple[Segment, ...]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Stack:
    """Bars on one scale. legend: (name, colour) of the pieces; unit: of their values; digits: significant ones."""

    title: str
    unit: str
    bars: tuple[Bar, ...]
    legend: tuple[tuple[str, str], ...]
    digits: int = 3


@dataclasses.dataclass(frozen=True)
class Tile:
    """One finding at the top of the page."""

    value: str
    text: str
    label: Label


def stack(
    title: str,
    unit: str,
    rows: Sequence[BarRow],
    colours: Mapping[str, str],
    digits: int = 3,
) -> Stack:
    """Return bars scaled to the longest.

    colours: of the pieces, in the order in which they are stacked; pieces without one come last, in the last colour.
    """
    found = {piece for _, _, values, _ in rows for piece, value in values.items() if value > 0}
    order = [piece for piece in colours if piece in found] + sorted(found - set(colours))
    paint = {piece: colours.get(piece, "c6") for piece in order}
    longest = max((sum(values.values()) for _, _, values, _ in rows), default=0.0) or 1.0
    bars = []
    for name, label, values, note in rows:
        pieces = [
            Segment(piece.replace("_", " "), values[piece], values[piece] / longest * 100, paint[piece])
            for piece in order
            if values.get(piece, 0) > 0
        ]
        bars.append(Bar(name, label, sum(values.values()), tuple(pieces), note))
    legend = tuple((piece.replace("_", " "), paint[piece]) for piece in order)
    return Stack(title, unit, tuple(bars), legend if len(legend) > 1 else (), digits)


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


def signed_percent(value: float | None, digits: int = 1) -> str:
    """Return "−1.4 %" for -0.0135, with a minus sign as long as the plus."""  # noqa: RUF002
    if value is None:
        return MISSING
    return f"{value * 100:+.{digits}f} %".replace("-", "\u2212")


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
