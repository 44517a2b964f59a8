"""Reads how a program's code is cut into pieces (overlays) that are loaded into instruction memory while it runs.

The dump's overlay graph has the pieces, with their sizes in bundles, and which piece leads to which. A loop that fits
instruction memory is one piece and stays loaded. One that does not is cut, and the graph has a cycle: each trip loads
every piece of it anew.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from offline_tpu.machine.errors import UnknownDumpFormatError

#: In memory, on every chip. `memory_analysis().generated_code_size_in_bytes` grows by 64 to 65 for each bundle of the
#: overlay graph on v6e, v7x and v5p, over 320 programs of 3,000 to 62,000 bundles (and has 1 to 2 MB besides).
BUNDLE_BYTES = 64
#: What a piece may have beside the bundles of its ops: jumps to other pieces, padding to eight bundles.
_PIECE_EXTRA = 64

_EDGE = re.compile(r'\s*"([^"]*)" -> "([^"]*)"')
_PIECE = re.compile(r"#(\d+):(?:prelude|tlp|hlo) def:(?:n/a|#\d+) size:(\d+)(?: <exit>)?")


@dataclasses.dataclass(frozen=True)
class Overlays:
    """The pieces of one program's code.

    Attributes:
      sizes: by number of the piece, its bundles.
      loops: numbers of the pieces that form a cycle, in the order of the code; one entry for each cycle.
    """

    sizes: dict[int, int]
    loops: tuple[tuple[int, ...], ...]

    @classmethod
    def parse(cls, text: str) -> "Overlays":
        """Parse an overlay graph.

        Raises:
          UnknownDumpFormatError: it is not in the known form.
        """
        first, *edges, last = text.strip().splitlines() or ["", ""]
        if first != "digraph {" or last != "}" or not edges:
            raise UnknownDumpFormatError(f"expected an overlay graph as digraph {{...}}, got {text[:60]!r}.")
        sizes: dict[int, int] = {}
        leads_to: dict[int, set[int]] = {}
        for edge in edges:
            match = _EDGE.fullmatch(edge)
            pieces = [_PIECE.fullmatch(end) for end in match.groups()] if match else []
            if not all(pieces) or not pieces:
                raise UnknownDumpFormatError(f"expected two pieces of code and their sizes, got {edge!r}.")
            source, target = (int(piece[1]) for piece in pieces if piece)
            sizes.update({int(piece[1]): int(piece[2]) for piece in pieces if piece})
            leads_to.setdefault(source, set()).add(target)
        return cls(sizes, _cycles(sizes, leads_to))

    @property
    def code_bytes(self) -> int:
        """Return the size of the whole program's code."""
        return sum(self.sizes.values()) * BUNDLE_BYTES

    def loads(self, counts: Sequence[int]) -> "Loads | None":
        """Return what one call of an op loads while it loops; None where its loop is one piece.

        A cycle belongs to the op if it is at least half of the op's code and not longer: the graph names no ops.

        Args:
          counts: how often each bundle of the op runs in one call, in the order of the code.
        """
        start = next((address for address, count in enumerate(counts) if count > 1), None)
        if start is None:
            return None
        for loop in self.loops:
            sizes = [self.sizes[piece] for piece in loop]
            if len(counts) / 2 <= sum(sizes) <= len(counts) + _PIECE_EXTRA * len(sizes):
                return Loads(tuple(sizes), _trips(sizes, counts[start:]))
        return None


@dataclasses.dataclass(frozen=True)
class Loads:
    """The pieces that an op's loop spans. sizes: bundles of each; trips: of the loop in one call of the op."""

    sizes: tuple[int, ...]
    trips: int

    def time_s(self, bytes_per_s: float, latency_s: float) -> float:
        """Return the seconds that loading takes in one call, if nothing runs beside it."""
        return self.trips * sum(latency_s + size * BUNDLE_BYTES / bytes_per_s for size in self.sizes)


def read_overlays(path: Path) -> Overlays:
    """Read the overlay graph of a dump.

    Raises:
      UnknownDumpFormatError: it is not in the known form.
    """
    try:
        return Overlays.parse(path.read_text())
    except UnknownDumpFormatError as error:
        raise UnknownDumpFormatError(f"{path.name}: {error}") from error


def _cycles(sizes: dict[int, int], leads_to: dict[int, set[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the sets of pieces that each lead to each other, of two pieces and more."""
    reached = {piece: _reached_from(piece, leads_to) for piece in sizes}
    cycles = {tuple(sorted(other for other in reached[piece] if piece in reached[other])) for piece in sizes}
    return tuple(sorted(cycle for cycle in cycles if len(cycle) > 1))


def _reached_from(piece: int, leads_to: dict[int, set[int]]) -> set[int]:
    reached: set[int] = set()
    waiting = [piece]
    while waiting:
        new = leads_to.get(waiting.pop(), set()) - reached
        reached |= new
        waiting.extend(new)
    return reached


def _trips(sizes: Sequence[int], counts: Sequence[int]) -> int:
    """Return how often control passes from piece to piece of a loop whose code `counts` begins with.

    Of the bundles around the end of a piece the one that runs least counts: a loop that ends there stays within it.
    """
    passed = []
    for number in range(1, len(sizes)):
        end = sum(sizes[:number])
        near = counts[max(0, end - _PIECE_EXTRA * number) : end + _PIECE_EXTRA]
        passed.append(min((count for count in near if count), default=0))
    return max(passed)
