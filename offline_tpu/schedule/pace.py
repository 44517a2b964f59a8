"""Finds the pace at which unrolled code runs once its pipeline is full."""

import bisect
import statistics
from collections.abc import Sequence
from itertools import groupby

#: Part of a stretch of code that the pace is taken of, and how many such parts are compared.
_PART, _PARTS = 0.25, 200


def steady_cycles(counts: Sequence[int], work: Sequence[float]) -> float:
    """Return the cycles that an op's bundles would take, did all of its work go as it goes in most of its code.

    Filling and draining a pipeline costs what it costs once, however long the code between them is. The pace is the
    median over all parts that are a quarter of the stretch of code (neighbouring bundles that run equally often) with
    the most work: those at its ends are slower, and so are those where one pipeline ends and another begins; most must
    be neither.

    Args:
      counts: how often each bundle runs.
      work: [bundles + 1], how much of the work is begun before each bundle, e.g. of matrix products.

    Returns:
      0 for an op without such work.
    """
    total, most, start, stretch = 0.0, 0.0, 0, (0, 0)
    for runs, bundles in groupby(counts):
        end = start + len(list(bundles))
        done = runs * (work[end] - work[start])
        total += done
        if done > most:
            most, stretch = done, (start, end)
        start = end
    if not most:
        return 0.0
    first, end = stretch
    part = (work[end] - work[first]) * _PART

    def reached(amount: float) -> int:
        return bisect.bisect_left(work, work[first] + amount, first, end + 1)

    step = (work[end] - work[first] - part) / _PARTS
    spans = [reached(i * step + part) - reached(i * step) for i in range(_PARTS + 1)]
    return total * statistics.median(spans) / part
