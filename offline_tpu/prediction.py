"""What a prediction says: the cost of each op, and of the program."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from offline_tpu.collectives import Collective

Bound = Literal["compute", "hbm", "link"]
Category = Literal["kernel", "matmul", "elementwise", "layout", "collective", "other"]


@dataclasses.dataclass(frozen=True)
class OpCost:
    """Predicted cost of one HLO op over the whole program.

    Attributes:
      name, scope: the HLO op's name and its JAX op_name path ("" where the compiler made it).
      category: kernel (Pallas), matmul (and what is fused with it), elementwise (reductions too), layout (copies,
        transposes, slices, pads: data moved and not changed), collective, or other (what runs on a SparseCore).
      time_s: (cycles + stall_cycles) / clock, times `calls`; of a transfer or collective that runs beside other ops,
        what it adds to them.
      cycles: TensorCore cycles of one call; one VLIW bundle is one cycle.
      stall_cycles: cycles of one call beyond these, waiting for DMAs, for VMEM or for links.
      calls: how often the program runs the op.
      hbm_bytes: HBM traffic of one call.
      bound: what limits the op.
      vmem_bytes: VMEM that the op reserves.
      spill_count, fill_count: vector registers spilled and filled in one call.
      utilization: fraction of each unit's slots in use.
      unresolved: what depends on data: branches and DMAs (counted as run), trip counts (counted once), branches of
        conditionals (the slowest counted); and ops whose schedule is not known.
      collective: of a collective, its bytes and links.
      start_s: when the op first starts, from the start of the program.
    """

    name: str
    scope: str
    category: Category
    time_s: float
    cycles: int
    stall_cycles: float
    calls: int
    hbm_bytes: int
    bound: Bound
    vmem_bytes: int
    spill_count: int
    fill_count: int
    utilization: dict[str, float]
    unresolved: tuple[str, ...]
    collective: Collective | None
    start_s: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted cost of a compiled program on one chip.

    The ops run one after the other. Transfers and collectives that the compiler starts early run beside the ops up to
    the one that waits for them; see offline_tpu.program_time.

    Attributes:
      time_s, cycles, spill_count, fill_count, hbm_bytes: sums over `ops`, each times its calls.
      vmem_bytes: the most that an op reserves.
      peak_hbm_bytes: arguments, results, temporaries and code on one chip, by the compiler's own count.
      compile_time_s, compile_cpu_s: tracing, lowering and compiling here: on the clock, and of all of this process's
        threads, which tells more where the machine does other things.
    """

    time_s: float
    cycles: int
    ops: tuple[OpCost, ...]
    vmem_bytes: int
    spill_count: int
    fill_count: int
    hbm_bytes: int
    peak_hbm_bytes: int
    compile_time_s: float
    compile_cpu_s: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def matching(self, text: str) -> tuple[OpCost, ...]:
        """The ops whose name or scope contains `text`."""
        return tuple(op for op in self.ops if text in op.name or text in op.scope)

    def by_category(self) -> dict[str, float]:
        """Seconds by category, longest first."""
        return _summed((op.category, op.time_s) for op in self.ops)

    def by_scope(self, depth: int) -> dict[str, float]:
        """Seconds by the first `depth` parts of the scope, longest first; "" for ops that the compiler made."""
        return _summed(("/".join(op.scope.split("/")[:depth]), op.time_s) for op in self.ops)

    def breakdown(self, scopes: Sequence[str]) -> dict[str, float]:
        """Seconds by the first of `scopes` that an op's scope or name contains, and by category for the others."""
        return _summed(
            (next((text for text in scopes if text in op.scope or text in op.name), op.category), op.time_s)
            for op in self.ops
        )

    @property
    def collectives(self) -> tuple[OpCost, ...]:
        """The ops that communicate."""
        return tuple(op for op in self.ops if op.collective is not None)

    @property
    def unresolved(self) -> tuple[str, ...]:
        """What the prediction had to assume, with the op's name."""
        return tuple(f"{op.name}: {text}" for op in self.ops for text in op.unresolved)


def _summed(items: Any) -> dict[str, float]:
    sums: collections.Counter[str] = collections.Counter()
    for name, time_s in items:
        sums[name] += time_s
    return dict(sums.most_common())
