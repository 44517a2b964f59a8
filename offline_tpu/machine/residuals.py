"""Says how far to trust a predicted time: the interval that four fifths of the measured times of its kind lie in.

The figures are in residuals.json beside this file, by kind of work and device: the 10th and 90th percentile of measured
over predicted times. `python -m tuning.validate.residuals` writes them, from the record that
`python -m tuning.validate set=wide` keeps.
"""

import functools
import importlib.resources
from collections.abc import Mapping
from typing import Literal

import msgspec

Kind = Literal["kernel", "matmul", "memory", "collective"]

#: Fewer measured rows of a kind than this say nothing: of one device, then those of all count; of all, then none.
MIN_ROWS = 8
#: Of an op whose kind too little was measured of: wide, and no percentile of anything.
_UNKNOWN = (0.7, 1.5)


class Residual(msgspec.Struct, frozen=True):
    """Measured over predicted times of a kind of work.

    Attributes:
      low, high: their 10th and 90th percentile; rows: how many there are.
    """

    low: float
    high: float
    rows: int


def kind_of(category: str) -> Kind:
    """Return the kind of work that ops of a category are; see `offline_tpu.OpCost`."""
    if category in ("kernel", "matmul", "collective"):
        return category  # type: ignore[return-value]
    return "memory"


def factors(device: str, times_s: Mapping[str, float]) -> tuple[float, float]:
    """Return the ends of the interval, over the predicted time.

    Args:
      times_s: predicted seconds by category of op. Errors of one kind are taken to go together: the ends are the means
        of the kinds' ends, weighed by time.
    """
    total = sum(times_s.values())
    if not total:
        return _UNKNOWN
    ends = [(time_s / total, _of(device, kind_of(category))) for category, time_s in times_s.items()]
    return sum(part * low for part, (low, _) in ends), sum(part * high for part, (_, high) in ends)


def _of(device: str, kind: Kind) -> tuple[float, float]:
    for name in (device, "all"):
        found = _read().get(kind, {}).get(name)
        if found is not None and found.rows >= MIN_ROWS:
            return found.low, found.high
    return _UNKNOWN


@functools.cache
def _read() -> dict[str, dict[str, Residual]]:
    data = importlib.resources.files("offline_tpu.machine").joinpath("residuals.json").read_bytes()
    return msgspec.json.decode(data, type=dict[str, dict[str, Residual]])
