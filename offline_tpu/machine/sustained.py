"""How long HBM keeps up its full bandwidth: on some chips, not for more than milliseconds on end.

Reported times of v6e programs whose ops all wait for HBM are those of full bandwidth up to some 9 ms, and up to 1.24
times as long from 40 ms on, whatever the size of their buffers; those of programs that wait for the core are not, nor
those of other chips. So a burst is counted as spent by work that moves more than the sustained share of the bandwidth,
and as regained by work that moves less. Why is not known; what is fitted on what is in docs/predictions.md.
"""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class Work(Protocol):
    """An op of a program; the fields are those of `offline_tpu.prediction.OpCost`."""

    @property
    def name(self) -> str: ...
    @property
    def time_s(self) -> float: ...
    @property
    def calls(self) -> int: ...
    @property
    def hbm_bytes(self) -> int: ...
    @property
    def bound(self) -> str: ...
    @property
    def loops(self) -> tuple[Any, ...]: ...


def slowdowns(ops: Iterable[Work], bytes_per_s: float, sustained_share: float, burst_s: float) -> Mapping[str, float]:
    """Return by how much ops that wait for HBM take longer than at full bandwidth, by name; others are left out.

    Args:
      ops: of a program, in its order, at full bandwidth.
      bytes_per_s: full bandwidth.
      sustained_share: of it, that can be kept up for ever.
      burst_s: seconds at full bandwidth after which a rested chip has no more than that.
    """
    found: dict[str, float] = {}
    full = left = burst_s * (1 - sustained_share)
    # The ops of a loop take turns: what counts is their mean load.
    for _, group in itertools.groupby(enumerate(ops), lambda item: item[1].loops[0] if item[1].loops else item[0]):
        members = [op for _, op in group]
        time_s = sum(op.time_s for op in members)
        if time_s <= 0:
            continue
        load = min(1.0, sum(op.hbm_bytes * op.calls for op in members) / bytes_per_s / time_s)
        above = load - sustained_share
        slow_s = max(0.0, time_s - left / above) if above > 0 else 0.0
        left = min(full, max(0.0, left - above * time_s))
        waiting = [op for op in members if op.bound == "hbm"]
        waiting_s = sum(op.time_s for op in waiting)
        if slow_s and waiting_s:
            factor = 1 + slow_s * (load / sustained_share - 1) / waiting_s
            found |= {op.name: max(factor, found.get(op.name, 1.0)) for op in waiting}
    return found
