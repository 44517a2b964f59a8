"""Turns schedules and HLO into the time of a program.

Ops run in the compiler's order, one after the other. A transfer or collective between a `-start` and its `-done` runs
beside the ops between them: it gets the HBM (or link) time that these leave, in the order of the starts, and what is
left of it when the program waits for it is added. While a transfer fills VMEM beside an op, it takes VMEM time from it
as the op's own DMAs do (see offline_tpu.machine.dma). A synchronous collective overlaps with nothing.

A loop costs its body times its trips, which its counter says. Of a conditional the slowest branch is counted, and said
so. A transfer that the compiler moved across programs (cross_program_prefetch) was started by the run before.
"""

import dataclasses
from collections.abc import Callable, Mapping

from offline_tpu import collectives
from offline_tpu.collectives import Collective
from offline_tpu.hlo import values
from offline_tpu.hlo.module import HloModule, HloOp, array_bytes
from offline_tpu.machine.constants import SPARSE_CORE_START_S, FittedConstants
from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.machine.links import Grid
from offline_tpu.machine.sustained import slowdowns
from offline_tpu.overlays import BUNDLE_BYTES, Overlays
from offline_tpu.prediction import Bound, Category, Loop, OpCost
from offline_tpu.schedule.read import Schedule

#: Ops that name, take apart or allocate; the core does nothing for them.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id optimization-barrier "  # noqa: SIM905
    "opt-barrier add-dependency domain".split()
)
_FREE_CUSTOM_CALLS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound", "SliceBitcast")
_MOVES = frozenset(
    "copy transpose bitcast reshape slice dynamic-slice dynamic-update-slice pad concatenate reverse broadcast iota "  # noqa: SIM905
    "parameter constant tuple get-tuple-element convert gather select compare fusion and or not".split()
)
#: Results smaller than this and without a schedule are scalars that the program itself computes between ops.
_SCALAR_BYTES = 4096

#: Finds an op's schedule; None where the compiler wrote none.
FindSchedule = Callable[[str, HloOp], Schedule | None]


@dataclasses.dataclass
class _Transfer:
    """A transfer beside the ops: seconds that it still needs, and when it may be done at the earliest."""

    name: str
    resource: Bound
    left_s: float
    earliest_s: float
    hbm_bytes: int
    collective: Collective | None
    fills_vmem: bool


@dataclasses.dataclass(frozen=True)
class _Context:
    calls: int
    unresolved: tuple[str, ...]
    environment: values.Environment


class ProgramCost:
    """Walks a scheduled module.

    Attributes:
      ops: the cost of each op, after `walk`.

    Args:
      vmem_bytes: by op, the VMEM that it reserves.
      overlays: the pieces of the program's code, where they are known.
      trip_counts: by text that a loop's scope contains, trips of a loop whose count depends on data.
      constants: of the device; None: those in use.
    """

    def __init__(
        self,
        module: HloModule,
        find_schedule: FindSchedule,
        *,
        vmem_bytes: Mapping[str, int],
        overlays: Overlays | None = None,
        device: DeviceSpec,
        grid: Grid,
        trip_counts: Mapping[str, int],
        constants: FittedConstants | None = None,
    ) -> None:
        self._module = module
        self._find_schedule = find_schedule
        self._vmem_bytes = vmem_bytes
        self._overlays = overlays
        self._device = device
        self._grid = grid
        self._trip_counts = trip_counts
        self._constants = constants or FittedConstants.of(device)
        self._hbm_bytes_per_s = self._constants.hbm_bytes_per_s(device)
        self._issue_hz = self._constants.issue_hz(device)
        #: Of the time that a transfer fills VMEM, the part that the ops beside it lose.
        self._slowdown = self._hbm_bytes_per_s / (self._constants.vmem_bytes_per_stolen_cycle * self._issue_hz)
        #: How much longer ops take because HBM does not keep up its bandwidth, by name.
        self._slowdowns: Mapping[str, float] = {}
        self.ops: list[OpCost] = []

    def walk(self) -> float:
        """Add up the cost of the whole program, in `ops` too. Returns its seconds.

        Raises:
          UnknownDumpFormatError: a collective is not modelled, or not in a known form.
        """
        time_s = self._computation(self._module.entry, _Context(1, (), ()), 0.0)
        share, burst_s = self._constants.hbm_sustained_share, self._constants.hbm_burst_s
        self._slowdowns = slowdowns(self.ops, self._hbm_bytes_per_s, share, burst_s) if share < 1 else {}
        if self._slowdowns:
            self.ops = []
            time_s = self._computation(self._module.entry, _Context(1, (), ()), 0.0)
        return time_s

    def _computation(self, name: str, context: _Context, start_s: float) -> float:
        """Add up one execution of a computation that starts at `start_s`. Returns its seconds."""
        now = start_s
        beside: list[_Transfer] = []
        for op in self._module.computations[name]:
            if op.opcode == "while":
                now += self._loop(name, op, context, now)
            elif op.opcode == "conditional":
                now += self._conditional(op, context, now)
            elif op.opcode == "call":
                now += self._computation(op.called[0], dataclasses.replace(context, environment=()), now)
            elif op.opcode == "custom-call-done":
                now += self._sparse_core(name, op, context, now)
            elif op.opcode.startswith("custom-call-"):
                continue  # starts and updates of the SparseCore's work
            elif op.opcode.endswith("-done"):
                now += self._finish(op, beside, context, now)
            elif op.opcode.endswith("-update"):
                for transfer in beside:
                    transfer.name = op.name if transfer.name == op.operands[0] else transfer.name
            elif op.opcode.endswith("-start"):
                beside.append(self._start(name, op, now))
            else:
                now += self._synchronous(name, op, beside, context, now)
        return now - start_s

    def _loop(self, computation: str, op: HloOp, context: _Context, now: float) -> float:
        trips = values.trip_count(self._module, computation, op, context.environment)
        unresolved = context.unresolved
        if trips is None:
            trips = next((n for text, n in self._trip_counts.items() if text in op.scope), None)
        if trips is None:
            trips = 1
            unresolved = (*unresolved, f"trips of the loop {op.name} ({op.scope or 'no scope'})")
        invariant = values.invariant_state(self._module, computation, op, context.environment)
        inside = _Context(context.calls * trips, unresolved, invariant)
        first = len(self.ops)
        period_s = self._computation(op.called[0], inside, now)
        loop = Loop(trips, period_s)
        self.ops[first:] = [dataclasses.replace(op, loops=(loop, *op.loops)) for op in self.ops[first:]]
        return trips * period_s

    def _conditional(self, op: HloOp, context: _Context, now: float) -> float:
        """Add up the slowest branch. Returns its seconds."""
        note = f"which of {len(op.called)} branches of {op.name} runs"
        inside = _Context(context.calls, (*context.unresolved, note), ())
        kept = self.ops
        slowest, slowest_ops = -1.0, []
        for branch in op.called:
            self.ops = []
            time_s = self._computation(branch, inside, now)
            if time_s > slowest:
                slowest, slowest_ops = time_s, self.ops
        self.ops = [*kept, *slowest_ops]
        return max(slowest, 0.0)

    def _start(self, computation: str, op: HloOp, now: float) -> _Transfer:
        collective = collectives.cost_of(op, computation, self._module, self._grid, self._device)
        if collective is not None:
            hbm_s = collective.hbm_bytes / self._hbm_bytes_per_s
            return _Transfer(
                op.name, "link", max(collective.link_s, hbm_s), now, collective.hbm_bytes, collective, False
            )
        ends = op.shape.tuple_shapes[:2]  # where it goes and where it comes from
        hbm_bytes = min(map(array_bytes, ends)) * sum(array_bytes(end, hbm_only=True) > 0 for end in ends)
        hbm_bytes //= self._device.cores  # each moves its part, as of an op
        if op.proto.HasField("cross_program_prefetch_index"):
            return _Transfer(op.name, "hbm", 0.0, now, hbm_bytes, None, True)
        earliest_s = now + self._constants.dma_latency_s
        return _Transfer(op.name, "hbm", hbm_bytes / self._hbm_bytes_per_s, earliest_s, hbm_bytes, None, True)

    def _finish(self, op: HloOp, beside: list[_Transfer], context: _Context, now: float) -> float:
        """Wait for the transfer that an op names, and for those before it on the same resource."""
        index = next((i for i, transfer in enumerate(beside) if transfer.name == op.operands[0]), None)
        if index is None:
            raise UnknownDumpFormatError(f"{op.name}: expected that {op.operands[0]} was started before it.")
        transfer = beside.pop(index)
        waited = transfer.left_s
        for earlier in beside[:index]:
            if earlier.resource == transfer.resource:
                waited += earlier.left_s
                earlier.left_s = 0.0
        waited = max(waited, transfer.earliest_s - now)
        category: Category = "collective" if transfer.collective else "layout"
        self._add(
            op,
            context,
            now,
            waited,
            category,
            transfer.resource,
            hbm_bytes=transfer.hbm_bytes,
            collective=transfer.collective,
        )
        return waited

    def _sparse_core(self, computation: str, op: HloOp, context: _Context, now: float) -> float:
        """Count what a SparseCore does, beside nothing: a collective, or the HBM traffic of what it moves."""
        start = op
        while start.operands and not start.called:
            start = self._module.op(computation, start.operands[0])
        inside = [(name, inner) for name in start.called for inner in self._module.computations[name]]
        costs = (collectives.cost_of(inner, name, self._module, self._grid, self._device) for name, inner in inside)
        collective = next((cost for cost in costs if cost is not None), None)
        if collective is not None:
            time_s = SPARSE_CORE_START_S + max(collective.link_s, collective.hbm_bytes / self._hbm_bytes_per_s)
            hbm_bytes = collective.hbm_bytes
            self._add(op, context, now, time_s, "collective", "link", hbm_bytes=hbm_bytes, collective=collective)
            return time_s
        hbm_bytes = 2 * array_bytes(op.shape)
        time_s = hbm_bytes / self._hbm_bytes_per_s
        note = "runs on a SparseCore: counted as the HBM traffic of its result"
        self._add(op, context, now, time_s, "other", "hbm", hbm_bytes=hbm_bytes, unresolved=(note,))
        return time_s

    def _synchronous(
        self, computation: str, op: HloOp, beside: list[_Transfer], context: _Context, now: float
    ) -> float:
        if op.opcode in _FREE or op.proto.custom_call_target in _FREE_CUSTOM_CALLS:
            return 0.0
        schedule = self._find_schedule(computation, op)
        collective = collectives.cost_of(op, computation, self._module, self._grid, self._device)
        if collective is not None:
            # The core drives the links step by step; its bundles depend on the chip, and wait for the links.
            hbm_s = collective.hbm_bytes / self._hbm_bytes_per_s
            time_s = max(collective.link_s, hbm_s)
            bound: Bound = "link" if collective.link_s >= hbm_s else "hbm"
            time_s += self._let_others_go_on(beside, time_s, hbm_s, collective.link_s)
            self._add(
                op, context, now, time_s, "collective", bound, hbm_bytes=collective.hbm_bytes, collective=collective
            )
            return time_s
        if schedule is None:
            if array_bytes(op.shape) > _SCALAR_BYTES:
                note = "no schedule was dumped for it: not counted"
                self._add(op, context, now, 0.0, "other", "compute", unresolved=(note,))
            return 0.0
        loading_s, notes = self._load_code(schedule)
        time_s = (schedule.cycles + schedule.stall_cycles) / self._issue_hz + loading_s + self._constants.op_overhead_s
        hbm_s = schedule.hbm_bytes / self._hbm_bytes_per_s
        time_s = self._slowdowns.get(op.name, 1.0) * (time_s + self._let_others_go_on(beside, time_s, hbm_s, 0.0))
        self._add(
            op,
            context,
            now,
            time_s,
            self._category(op),
            "compute" if schedule.cycles / self._issue_hz >= hbm_s else "hbm",
            hbm_bytes=schedule.hbm_bytes,
            schedule=schedule,
            unresolved=schedule.unresolved + notes,
            code_load_s=loading_s,
        )
        return time_s

    def _load_code(self, schedule: Schedule) -> tuple[float, tuple[str, ...]]:
        """Return the seconds in which one call of an op waits for its own code, with a note where there are any."""
        loads = self._overlays.loads(schedule.counts) if self._overlays else None
        if loads is None:
            return 0.0, ()
        time_s = loads.time_s(self._hbm_bytes_per_s, self._constants.dma_latency_s)
        pieces = len(loads.sizes)
        return time_s, (
            f"its loop spans {pieces} pieces of code, which are loaded anew in each of {loads.trips:,} trips: "
            f"{time_s * 1e3:.3f} ms a call counted, as if nothing ran beside the loads",
        )

    def _let_others_go_on(self, beside: list[_Transfer], time_s: float, hbm_s: float, link_s: float) -> float:
        """Let what runs beside an op use what the op leaves of HBM and links. Returns what that costs the op."""
        free = {"hbm": max(0.0, time_s - hbm_s), "link": max(0.0, time_s - link_s)}
        stolen_s = 0.0
        for transfer in beside:
            done_s = min(transfer.left_s, free[transfer.resource])
            transfer.left_s -= done_s
            free[transfer.resource] -= done_s
            if transfer.fills_vmem:
                stolen_s += done_s * self._slowdown
        return stolen_s

    def _category(self, op: HloOp) -> Category:
        if op.opcode == "custom-call":
            return "kernel"
        opcodes = {inner.opcode for inner in self._module.inside(op)} if op.opcode == "fusion" else {op.opcode}
        if opcodes & {"convolution", "dot"}:
            return "matmul"
        return "layout" if opcodes <= _MOVES else "elementwise"

    def _add(
        self,
        op: HloOp,
        context: _Context,
        start_s: float,
        time_s: float,
        category: Category,
        bound: Bound,
        *,
        hbm_bytes: int = 0,
        schedule: Schedule | None = None,
        collective: Collective | None = None,
        unresolved: tuple[str, ...] = (),
        code_load_s: float = 0.0,
    ) -> None:
        cycles = schedule.cycles if schedule else 0
        self.ops.append(
            OpCost(
                name=op.name,
                scope=op.scope,
                category=category,
                time_s=time_s * context.calls,
                cycles=cycles,
                stall_cycles=time_s * self._issue_hz - cycles,
                steady_cycles=round(schedule.steady_cycles) if schedule else 0,
                calls=context.calls,
                hbm_bytes=hbm_bytes,
                bound=bound,
                vmem_bytes=self._vmem_bytes.get(op.name, 0),
                spill_count=schedule.spill_count if schedule else 0,
                fill_count=schedule.fill_count if schedule else 0,
                utilization=(
                    {unit: round(schedule.utilization(unit), 6) for unit in schedule.unit_capacity} if schedule else {}
                ),
                code_bytes=len(schedule.counts) * BUNDLE_BYTES if schedule else 0,
                code_load_s=code_load_s,
                resting_cores=self._device.cores - 1 if schedule and schedule.is_alone else 0,
                unresolved=context.unresolved + unresolved,
                collective=collective,
                start_s=start_s,
            )
        )
