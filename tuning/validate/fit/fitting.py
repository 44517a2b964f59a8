"""Fits the constants of the time model to rows that say how their predicted times move with them."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import msgspec
import numpy as np

#: How far, in logarithms, a constant may be expected to move: what is known as a share of a published figure, the rest.
_PRIOR_OF_PUBLISHED, _PRIOR = 0.05, 0.7
#: Of the prior beside one row.
_PRIOR_WEIGHT = 0.3
#: Errors under the first count as squares, and from the second on ever less.
_SMALL_ERROR, _LARGE_ERROR = 0.01, 0.12
_ITERATIONS = 60


class FitRow(msgspec.Struct, frozen=True, kw_only=True):
    """A measured row for the fit.

    Attributes:
      id, op: of the row; device: short name of its chip.
      log_ratio: log(predicted / measured) at the constants in use.
      sensitivities: by constant, d(log predicted) / d(log constant).
    """

    id: str
    op: str
    device: str
    log_ratio: float
    sensitivities: dict[str, float]


class Errors(msgspec.Struct, frozen=True):
    """Percentiles of |predicted / measured - 1|."""

    median: float
    p95: float
    worst: float

    @classmethod
    def of(cls, rows: Sequence[FitRow], shifts: Mapping[str, float]) -> Self:
        """Return those of rows with the constants moved."""
        errors = np.abs(np.expm1(log_ratios(rows, shifts)))
        return cls(float(np.median(errors)), float(np.percentile(errors, 95)), float(errors.max()))


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """The rows of one program on one chip: errors at the constants in use, and at the fitted ones."""

    op: str
    device: str
    row_count: int
    in_use: Errors
    fitted: Errors


class LeftOut(msgspec.Struct, frozen=True, kw_only=True):
    """A program that the constants were fitted without: what its rows are off by at them."""

    op: str
    row_count: int
    errors: Errors
    constants: dict[str, float]


class Fitted(msgspec.Struct, frozen=True, kw_only=True):
    """What a fit came to.

    Attributes:
      set: of the rows.
      row_count: rows fitted on; without: by reason, rows that were not.
      in_use, constants: by name, as they are and as fitted; equal_weights: as fitted with every program on every chip
        of the same weight.
      groups: by program and chip; programs: each left out of the fit.
      rows: all that the fit saw.
    """

    set: str
    row_count: int
    without: dict[str, int]
    in_use: dict[str, float]
    constants: dict[str, float]
    equal_weights: dict[str, float]
    groups: tuple[Group, ...]
    programs: tuple[LeftOut, ...]
    rows: tuple[FitRow, ...]

    @classmethod
    def of(cls, name: str, rows: Sequence[FitRow], without: Mapping[str, int], in_use: Mapping[str, float]) -> Self:
        """Fit on all rows, and on all but each program's."""
        shifts = fit(rows)

        def moved(found: Mapping[str, float]) -> dict[str, float]:
            return {name: value * math.exp(found.get(name, 0.0)) for name, value in in_use.items()}

        return cls(
            set=name,
            row_count=len(rows),
            without=dict(without),
            in_use=dict(in_use),
            constants=moved(shifts),
            equal_weights=moved(fit(rows, weight_power=0.0)),
            groups=_groups(rows, shifts),
            programs=_left_out(rows, moved),
            rows=tuple(rows),
        )


def log_ratios(rows: Sequence[FitRow], shifts: Mapping[str, float]) -> np.ndarray:
    """Return log(predicted / measured) with constants moved by so much, in logarithms."""
    moved = (sum(slope * shifts.get(name, 0.0) for name, slope in row.sensitivities.items()) for row in rows)
    return np.array([row.log_ratio + shift for row, shift in zip(rows, moved, strict=True)])


def fit(rows: Sequence[FitRow], weight_power: float = 0.5) -> dict[str, float]:
    """Return by constant how far, in logarithms, the rows move it: by iteratively reweighted least squares.

    Args:
      weight_power: a program on a chip weighs its number of rows to this power.
    """
    if not rows:
        return {}
    names = sorted({name for row in rows for name in row.sensitivities})
    slopes = np.array([[row.sensitivities.get(name, 0.0) for name in names] for row in rows])
    errors = np.array([row.log_ratio for row in rows])
    pairs = [(row.op, row.device) for row in rows]
    share = np.array([pairs.count(pair) ** (weight_power - 1) for pair in pairs])
    share /= share.mean()
    published = [name.startswith(("hbm_efficiency", "cycle_efficiency", "clock_hz")) for name in names]
    prior = np.diag(_PRIOR_WEIGHT / np.where(published, _PRIOR_OF_PUBLISHED, _PRIOR) ** 2)
    shift = np.zeros(len(names))
    for _ in range(_ITERATIONS):
        off = errors + slopes @ shift
        weights = share / (np.abs(off) + _SMALL_ERROR) / (1 + (off / _LARGE_ERROR) ** 2)
        weighted = slopes * weights[:, None]
        shift = np.linalg.solve(slopes.T @ weighted + prior, -weighted.T @ errors)
    return dict(zip(names, shift.tolist(), strict=True))


def _groups(rows: Sequence[FitRow], shifts: Mapping[str, float]) -> tuple[Group, ...]:
    found = []
    for op, device in sorted({(row.op, row.device) for row in rows}):
        members = [row for row in rows if (row.op, row.device) == (op, device)]
        found.append(
            Group(
                op=op,
                device=device,
                row_count=len(members),
                in_use=Errors.of(members, {}),
                fitted=Errors.of(members, shifts),
            )
        )
    return tuple(found)


def _left_out(rows: Sequence[FitRow], moved: Callable[[Mapping[str, float]], dict[str, float]]) -> tuple[LeftOut, ...]:
    found = []
    for op in sorted({row.op for row in rows}):
        members = [row for row in rows if row.op == op]
        shifts = fit([row for row in rows if row.op != op])
        found.append(LeftOut(op=op, row_count=len(members), errors=Errors.of(members, shifts), constants=moved(shifts)))
    return tuple(found)
