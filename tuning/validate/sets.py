"""The sets of `tuning.validate`: fixed choices of the public rows, spread over programs, chips and times."""

import heapq
import math
from collections.abc import Sequence

from tuning.validate.rows import SPLASH, MeasuredRow

#: By name, how many rows a set has, the smallest first; None: all there are.
SIZES: dict[str, int | None] = {"splash": 12, "quick": 60, "wide": 500, "all": None}

Pair = tuple[str, str]


def choose(rows: Sequence[MeasuredRow], name: str) -> list[MeasuredRow]:
    """Return the rows of a set, in their order.

    Every program on every chip has at least one row. The others go to the programs with the most rows: to the square
    root of their number in proportion, so that no program outweighs the rest. Of a program's rows on a chip, sorted by
    time and cut into as many parts as it has places, the middle one of each part is taken.

    Raises:
      ValueError: there is no such set.
    """
    if name not in SIZES:
        raise ValueError(f"set={name}: expected one of {', '.join(SIZES)}.")
    if name == "splash":
        return [row for row in rows if row.op == SPLASH]
    size = SIZES[name]
    if size is None or size >= len(rows):
        return list(rows)
    pairs: dict[Pair, list[MeasuredRow]] = {}
    for row in rows:
        pairs.setdefault((row.op, row.device_kind), []).append(row)
    places = _places({pair: len(members) for pair, members in pairs.items()}, size)
    chosen = {row.id for pair, members in pairs.items() for row in spread(members, places[pair])}
    return [row for row in rows if row.id in chosen]


def _places(counts: dict[Pair, int], size: int) -> dict[Pair, int]:
    """Return how many rows each pair gives: one, and then by highest averages of the root of its number of rows."""
    places = dict.fromkeys(counts, 1)
    queue = [(-math.sqrt(count) / 2, pair) for pair, count in counts.items() if count > 1]
    heapq.heapify(queue)
    for _ in range(size - len(counts)):
        _, pair = heapq.heappop(queue)
        places[pair] += 1
        if places[pair] < counts[pair]:
            heapq.heappush(queue, (-math.sqrt(counts[pair]) / (places[pair] + 1), pair))
    return places


def spread(rows: Sequence[MeasuredRow], places: int) -> list[MeasuredRow]:
    """Return the middle ones of so many parts of the rows in the order of their times, each once."""
    by_time = sorted(rows, key=lambda row: (row.time_ms, row.id))
    middles = ((2 * part + 1) * len(by_time) // (2 * places) for part in range(places))
    return [by_time[middle] for middle in dict.fromkeys(middles)]
