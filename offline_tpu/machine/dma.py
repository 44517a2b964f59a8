"""Times the transfers of one op: when they finish, and how long its core waits for them.

The core starts a DMA, goes on, and waits for its flag later. Transfers to and from HBM share one channel, in the order
in which they were started: each begins a latency after its start and then takes bytes / bandwidth. Filling or emptying
VMEM takes cycles from the core, since both want the same memory.
"""

import collections
import dataclasses
from collections.abc import Hashable
from typing import Any, Self

HBM_GRANULE_BYTES = 32


@dataclasses.dataclass(frozen=True)
class CoreTiming:
    """Constants of the model, in cycles in which the core issues a bundle.

    Attributes:
      bytes_per_cycle: HBM bandwidth that streaming transfers reach.
      latency_cycles: from the start of a DMA to its first byte, and from its last to the flag, together.
      vmem_bytes_per_stolen_cycle: bytes moved into or out of VMEM for each cycle that the core loses to them.
      matmul_cycles: from one matmul of a packed register to the next, over all matrix units.
      cores: that share HBM, each with its part of the bandwidth, above.
    """

    bytes_per_cycle: float
    latency_cycles: float
    vmem_bytes_per_stolen_cycle: float
    matmul_cycles: float
    cores: int = 1

    def alone(self) -> Self:
        """Return the timing of a core whose chip's others rest: it has the whole bandwidth of HBM."""
        return dataclasses.replace(self, bytes_per_cycle=self.bytes_per_cycle * self.cores, cores=1)


class DmaClock:
    """Time on the core, in cycles, with the transfers that run beside it.

    Attributes:
      now: cycles since the op began, stalls included.
      hbm_bytes: bytes that the op's transfers moved to and from HBM.
    """

    def __init__(self, timing: CoreTiming) -> None:
        self._timing = timing
        self._free_at = 0.0
        self._pending: dict[Hashable, collections.deque[tuple[float, int]]] = {}
        self.now = 0.0
        self.hbm_bytes = 0

    def advance(self, bundles: float, matmuls: float = 0.0) -> None:
        """Execute bundles: a cycle each, and no fewer than the matmuls in them hold the matrix units.

        The schedules of XLA's own fusions assume less than the published peak allows, by up to a third.
        """
        self.now += max(bundles, matmuls * self._timing.matmul_cycles)

    def start(self, flag: Hashable | None, size_bytes: int, spaces: tuple[str | None, ...], cores: int = 1) -> None:
        """Start a DMA; `flag` is told when it ends (None: nobody can be waiting for it). cores: whose VMEM it fills."""
        in_hbm = spaces.count("hbm") or spaces.count(None)  # a pointer that the dump does not explain: to HBM
        if "vmem" in spaces:
            self.now += size_bytes / self._timing.vmem_bytes_per_stolen_cycle
        begin = max(self.now + self._timing.latency_cycles, self._free_at)
        end = begin + size_bytes * max(1, in_hbm) / cores / self._timing.bytes_per_cycle
        if in_hbm:
            self.hbm_bytes += size_bytes * in_hbm // cores
            self._free_at = end
        if flag is not None:
            self._pending.setdefault(flag, collections.deque()).append((end, size_bytes))

    def wait(self, flag: Hashable, size_bytes: int) -> bool:
        """Wait until `flag` has been told of that many bytes. Returns False where no transfer was started with it.

        Of a window that sticks out of its array only a part is transferred; the core itself tells the flag the rest.
        """
        pending = self._pending.get(flag)
        if not pending:
            return False
        while pending and size_bytes > 0:
            end, transferred = pending.popleft()
            self.now = max(self.now, end)
            if transferred > size_bytes:
                pending.appendleft((end, transferred - size_bytes))
            size_bytes -= transferred
        return True

    def finish(self) -> None:
        """End the op, when its last transfer has ended."""
        self.now = max([self.now, *(end for pending in self._pending.values() for end, _ in pending)])


#: One call of a DmaClock: the method's name, and its arguments.
Call = tuple[str, tuple[Any, ...]]


class RecordingClock(DmaClock):
    """A clock that keeps its calls, for a `Recording`.

    Attributes:
      calls: so far; what runs between two DMAs or waits is one `advance`, of cycles.
    """

    def __init__(self, timing: CoreTiming) -> None:
        super().__init__(timing)
        self.calls: list[Call] = []
        self._cycles = 0.0
        self._flags: dict[Hashable, int] = {}

    def advance(self, bundles: float, matmuls: float = 0.0) -> None:
        self._cycles += max(bundles, matmuls * self._timing.matmul_cycles)
        super().advance(bundles, matmuls)

    def start(self, flag: Hashable | None, size_bytes: int, spaces: tuple[str | None, ...], cores: int = 1) -> None:
        self._keep("start", (self._number(flag), size_bytes, spaces, cores))
        super().start(flag, size_bytes, spaces, cores)

    def wait(self, flag: Hashable, size_bytes: int) -> bool:
        self._keep("wait", (self._number(flag), size_bytes))
        return super().wait(flag, size_bytes)

    def finish(self) -> None:
        self._keep("finish", ())
        super().finish()

    def _keep(self, method: str, arguments: tuple[Any, ...]) -> None:
        if self._cycles:
            self.calls.append(("advance", (self._cycles,)))
            self._cycles = 0.0
        self.calls.append((method, arguments))

    def _number(self, flag: Hashable | None) -> int | None:
        """Return a flag's number, which takes less room than the flag."""
        return None if flag is None else self._flags.setdefault(flag, len(self._flags))


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a RecordingClock kept of one run.

    Attributes:
      calls: of the clock.
      bundles: that ran; progress: the part of the op that they are.
    """

    calls: list[Call]
    bundles: int
    progress: float

    def stall_cycles(self, timing: CoreTiming) -> float:
        """Return the whole op's cycles beyond its bundles at other constants; `matmul_cycles` stay as they were."""
        clock = DmaClock(timing)
        methods = {name: getattr(clock, name) for name in ("advance", "start", "wait", "finish")}
        for method, arguments in self.calls:
            methods[method](*arguments)
        return (clock.now - self.bundles) / self.progress
