"""Lays collectives out on the links between a slice's chips: how many bytes the busiest link carries.

Chips sit on a grid; each is linked to its neighbours, one link an axis and side, both ways at once. An axis whose
length is a multiple of the device's `ici_wrap_length` closes into a ring; a shorter one is a line. Groups that fill a
block of the grid use all of the block's axes at once, as the compiler's collectives do; other groups pass their data
around in the order of their members, along the shortest way axis by axis.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

Coords = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The chips of a slice.

    Attributes:
      coords: of each device, by its position in the mesh. Devices of one chip share theirs.
      shape: lengths of the axes.
      wraps: whether each axis closes into a ring.
    """

    coords: tuple[Coords, ...]
    shape: tuple[int, ...]
    wraps: tuple[bool, ...]

    @classmethod
    def around(cls, coords: Sequence[Sequence[int]], wrap_length: int) -> "Grid":
        """Return the smallest grid that holds the chips. `wrap_length`: see the module."""
        positions = tuple(tuple(c) for c in coords)
        shape = tuple(max(axis) + 1 for axis in zip(*positions, strict=True))
        return cls(positions, shape, tuple(n > 1 and n % wrap_length == 0 for n in shape))

    def block(self, group: Sequence[int]) -> list[tuple[int, bool]] | None:
        """Return length and closedness of each axis of the block that a group fills; None where it fills none."""
        positions = {self.coords[i] for i in group}
        axes = [sorted(set(axis)) for axis in zip(*positions, strict=True)]
        if math.prod(map(len, axes)) != len(positions) or any(a[-1] - a[0] + 1 != len(a) for a in axes):
            return None
        lengths = zip(axes, self.shape, self.wraps, strict=True)
        return [(len(a), wraps and len(a) == n) for a, n, wraps in lengths if len(a) > 1]

    def sharing(self, groups: Sequence[Sequence[int]]) -> int:
        """Return how many of the groups fill the chips of the first one: the devices of a chip share its links."""
        chips = [{self.coords[i] for i in group} for group in groups]
        return sum(found == chips[0] for found in chips)

    def route(self, source: int, target: int) -> list[tuple[Coords, Coords]]:
        """Return the links from one device to another, axis by axis, the shorter way round a ring."""
        here, end = list(self.coords[source]), self.coords[target]
        links = []
        for axis, (length, wraps) in enumerate(zip(self.shape, self.wraps, strict=True)):
            distance = end[axis] - here[axis]
            if wraps and abs(distance) > length / 2:
                distance -= int(math.copysign(length, distance))
            for _ in range(abs(distance)):
                before = tuple(here)
                here[axis] = (here[axis] + (1 if distance > 0 else -1)) % length
                links.append((before, tuple(here)))
        return links

    def busiest(self, messages: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Return how many of the messages (from, to) the busiest link carries, and the longest way in links."""
        load: collections.Counter[tuple[Coords, Coords]] = collections.Counter()
        longest = 0
        for source, target in messages:
            way = self.route(source, target)
            load.update(way)
            longest = max(longest, len(way))
        return max(load.values(), default=0), longest


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Load that a collective puts on the links.

    Attributes:
      link_bytes: bytes over the busiest link, in one direction.
      hops: links that the data pass one after the other.
    """

    link_bytes: float
    hops: int


def permute(grid: Grid, pairs: Sequence[tuple[int, int]], size_bytes: int) -> Traffic:
    """Return the traffic where every pair sends `size_bytes` from the first to the second."""
    load, hops = grid.busiest([(a, b) for a, b in pairs if a != b])
    return Traffic(load * size_bytes, hops)


def gather(grid: Grid, groups: Sequence[Sequence[int]], size_bytes: int) -> Traffic:
    """Return the traffic where every member of a group gets `size_bytes`, of which it had its share.

    Reduce-scatter is its mirror, and costs the same.
    """
    group = groups[0]
    share = size_bytes / len(group)
    block = grid.block(group)
    if block is None:
        ring = [(a, b) for g in groups for a, b in zip(g, [*g[1:], g[0]], strict=True)]
        load, longest = grid.busiest(ring)
        return Traffic(load * share * (len(group) - 1), longest * (len(group) - 1))
    if not block:  # devices of one chip
        return Traffic(0, 0)
    ways = sum(2 if closed else 1 for _, closed in block)
    chips = math.prod(length for length, _ in block)
    size_bytes *= grid.sharing(groups)
    return Traffic(size_bytes * (1 - 1 / chips) / ways, sum(n // 2 if closed else n - 1 for n, closed in block))


def exchange(grid: Grid, groups: Sequence[Sequence[int]], size_bytes: int) -> Traffic:
    """Return the traffic where every member sends `size_bytes`, in equal shares to all members (all-to-all)."""
    group = groups[0]
    block = grid.block(group)
    if block is None:
        load, hops = grid.busiest([pair for g in groups for pair in itertools.permutations(g, 2)])
        return Traffic(load * size_bytes / len(group), hops)
    # The links that cut an axis in the middle carry all that goes from one half to the other.
    size_bytes *= grid.sharing(groups)
    loads = [size_bytes * (n // 2) * (n - n // 2) / n / (2 if closed else 1) for n, closed in block]
    return Traffic(max(loads, default=0), sum(n // 2 if closed else n - 1 for n, closed in block))
