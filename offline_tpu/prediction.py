"""Holds a prediction: the cost of each op, and of the program."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from offline_tpu.collectives import Collective
from offline_tpu.machine import residuals
from offline_tpu.options import options_text
from splash_workbench.profiles.scopes import named_scope

Bound = Literal["compute", "hbm", "link"]
Category = Literal["kernel", "matmul", "elementwise", "layout", "collective", "other"]
Bottleneck = Literal["MXU", "vector units", "VMEM", "scalar unit", "HBM", "links"]

#: Units of a schedule by what they are parts of. VPOP takes results from the MXU and the transcendental unit (EUP).
_UNIT_GROUPS: dict[str, Bottleneck] = {
    "MXU": "MXU",  # of earlier libtpus; later ones count the next two apart
    "MATMUL": "MXU",
    "MATPUSH": "MXU",
    "VALU": "vector units",
    "XLU": "vector units",
    "EUP": "vector units",
    "VPOP": "vector units",
    "VLOAD": "VMEM",
    "VSTORE": "VMEM",
    "SALU": "scalar unit",
}


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop around an op: how often its body runs, and the seconds from one trip to the next."""

    trips: int
    period_s: float


@dataclasses.dataclass(frozen=True)
class OpCost:
    """Predicted cost of one HLO op over the whole program.

    Attributes:
      name, scope: the HLO op's name and its JAX op_name path ("" where the compiler made it).
      category: kernel (Pallas), matmul (and what is fused with it), elementwise (reductions too), layout (copies,
        transposes, slices, pads: data moved and not changed), collective, or other (what runs on a SparseCore).
      time_s: (cycles + stall_cycles) / clock, times `calls`; of a transfer or collective that runs beside other ops,
        what it adds to them.
      start_s: when the op first starts, from the start of the program.
      calls: how often the program runs the op.
      cycles: TensorCore cycles of one call; one VLIW bundle is one cycle.
      stall_cycles: cycles of one call beyond these, waiting for DMAs, for VMEM or for links.
      steady_cycles: of one call, see `offline_tpu.schedule.read.Schedule`.
      hbm_bytes: HBM traffic of one call.
      bound: what limits the op; `bottleneck` says it by unit.
      vmem_bytes: VMEM that the op reserves.
      spill_count, fill_count: vector registers spilled and filled in one call.
      utilization: fraction of each unit's slots in use.
      unresolved: what depends on data: branches and DMAs (counted as run), trip counts (counted once), branches of
        conditionals (the slowest counted); ops whose schedule is not known; and a loop whose code is loaded in every
        trip.
      collective: of a collective, its bytes and links.
      loops: around the op, the outermost first; `calls` is the product of their trips.
      code_bytes: size of its code.
      code_load_s: of one call, what it waits for its code: 0 where its loop is one piece of code (see
        offline_tpu.overlays).
      resting_cores: of the TensorCores that share the chip's ops, those that leave this one to another.
    """

    name: str
    scope: str
    category: Category
    time_s: float
    start_s: float
    calls: int
    cycles: int = 0
    stall_cycles: float = 0.0
    steady_cycles: int = 0
    hbm_bytes: int = 0
    bound: Bound = "compute"
    vmem_bytes: int = 0
    spill_count: int = 0
    fill_count: int = 0
    utilization: dict[str, float] = dataclasses.field(default_factory=dict)
    unresolved: tuple[str, ...] = ()
    collective: Collective | None = None
    loops: tuple[Loop, ...] = ()
    code_bytes: int = 0
    code_load_s: float = 0.0
    resting_cores: int = 0

    @property
    def busiest_unit(self) -> str | None:
        """Return the unit of which the largest fraction of slots is in use; None where no schedule says."""
        return max(self.utilization, key=self.utilization.__getitem__, default=None)

    @property
    def bottleneck(self) -> Bottleneck:
        """Return what limits the op: HBM, links, or the part of the core that its busiest unit belongs to."""
        if self.bound != "compute":
            return "HBM" if self.bound == "hbm" else "links"
        unit = (self.busiest_unit or "SALU").partition(":")[0]
        return _UNIT_GROUPS.get(unit, "vector units")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted cost of a compiled program on one chip. `str` gives it in one line, `table` op by op.

    The ops run one after the other. Transfers and collectives that the compiler starts early run beside the ops up to
    the one that waits for them; see offline_tpu.program_time.

    Attributes:
      device: name of the chip, e.g. "v6e".
      time_s, cycles, spill_count, fill_count, hbm_bytes: sums over `ops`, each times its calls.
      vmem_bytes: the most that an op reserves.
      peak_hbm_bytes: arguments, results, temporaries and code on one chip, by the compiler's own count.
      compile_time_s, compile_cpu_s: tracing, lowering and compiling here: on the clock, and of all of this process's
        threads, which tells more where the machine does other things.
      compiler_options: flags of libtpu that were given for this program.
      code_bytes: size of the whole program's code, its own control flow included.
      slow_time_s: as `time_s`, at the other end of what depends on data: with the `slow_grid_sizes` of `predict`.
      peak_live_bytes: of arguments, results and temporaries, the most that is in use at one time (XLA's
        peak_memory_in_bytes).
    """

    device: str
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
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    code_bytes: int = 0
    slow_time_s: float | None = None
    peak_live_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def matching(self, text: str) -> tuple[OpCost, ...]:
        """Return the ops whose name or scope contains `text`."""
        return tuple(op for op in self.ops if text in op.name or text in op.scope)

    def by_bottleneck(self) -> dict[Bottleneck, float]:
        """Return seconds by what limits the ops, longest first."""
        sums: dict[Bottleneck, float] = collections.defaultdict(float)
        for op in self.ops:
            sums[op.bottleneck] += op.time_s
        return dict(sorted(sums.items(), key=lambda item: -item[1]))

    @property
    def bottleneck(self) -> Bottleneck | None:
        """Return what limits the ops that take most of the time; None for a program without ops."""
        return next(iter(self.by_bottleneck()), None)

    @property
    def interval_s(self) -> tuple[float, float]:
        """Return seconds between which four fifths of the measured times of such work lie; see machine.residuals."""
        times_s: dict[str, float] = collections.defaultdict(float)
        for op in self.ops:
            times_s[op.category] += op.time_s
        low, high = residuals.factors(self.device, times_s)
        return low * self.time_s, high * self.time_s

    @property
    def collectives(self) -> tuple[OpCost, ...]:
        """Return the ops that communicate."""
        return tuple(op for op in self.ops if op.collective is not None)

    @property
    def unresolved(self) -> tuple[str, ...]:
        """Return what the prediction had to assume, with the op's name."""
        return tuple(f"{op.name}: {text}" for op in self.ops for text in op.unresolved)

    def __str__(self) -> str:
        shares = ", ".join(
            f"{name} {time_s / self.time_s:.0%}" for name, time_s in self.by_bottleneck().items() if time_s
        )
        low, high = self.interval_s
        options = f"; {options_text(self.compiler_options)}" if self.compiler_options else ""
        return (
            f"{self.time_s * 1e3:.3f} ms on one {self.device} (predicted; {low * 1e3:.3g} to {high * 1e3:.3g}), "
            f"bound by {shares or 'nothing'}; HBM: "
            f"{self.hbm_bytes / 2**20:,.1f} MiB moved, {self.peak_hbm_bytes / 2**20:,.1f} MiB held at most; VMEM: "
            f"{self.vmem_bytes / 2**20:.1f} MiB; code: {self.code_bytes / 2**20:.2f} MiB{options}"
        )

    def table(self, limit: int = 20) -> str:
        """Return `str(self)`, the `limit` longest ops, and what had to be assumed, as lines of text."""
        rows = [("ms", "share", "calls", "bound by", "busiest unit", "HBM MiB", "code KiB", "op", "named scope")]
        longest = sorted((op for op in self.ops if op.time_s), key=lambda op: -op.time_s)
        for op in longest[:limit]:
            unit = op.busiest_unit
            rows.append(
                (
                    f"{op.time_s * 1e3:.3f}",
                    f"{op.time_s / self.time_s:.1%}",
                    str(op.calls),
                    op.bottleneck,
                    f"{unit} {op.utilization[unit]:.0%}" if unit else "",
                    f"{op.hbm_bytes * op.calls / 2**20:,.1f}",
                    f"{op.code_bytes / 2**10:,.1f}",
                    op.name,
                    named_scope(op.scope),
                )
            )
        left_out = len(longest) - limit
        more = [f"... and {left_out} shorter ops"] if left_out > 0 else []
        alone = [f"one TensorCore runs it, the other rests: {op.name}" for op in longest[:limit] if op.resting_cores]
        assumed = [f"assumed: {text}" for text in self.unresolved]
        return "\n".join([str(self), *_aligned(rows), *more, *alone, *assumed])


def _aligned(rows: Sequence[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
