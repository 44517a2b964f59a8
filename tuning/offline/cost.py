"""From schedules and HLO to time: what each op costs and what bounds it."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from splash_attn.device import DeviceSpec
from tuning.offline.constants import HBM_EFFICIENCY, dma_timing
from tuning.offline.dma import DmaTiming
from tuning.offline.errors import UnknownDumpFormatError
from tuning.offline.schedule import Schedule, read_schedule

_FINAL_BUNDLES = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = ")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_WHILE = re.compile(r"\bwhile\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_CALLED = re.compile(r"(?:to_apply|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"(\d+)","size":"(\d+)"')

Bound = Literal["compute", "hbm"]


@dataclasses.dataclass(frozen=True)
class OpCost:
    """Predicted cost of one HLO op over the whole program.

    Attributes:
      name, scope: the HLO op's name and its JAX op_name path ("" where the compiler made it).
      time_s: (cycles + stall_cycles) / clock, times `calls`.
      cycles: TensorCore cycles of one call; one VLIW bundle is one cycle.
      stall_cycles: cycles of one call beyond these, waiting for DMAs or for VMEM; see tuning.offline.dma.
      calls: how often the program runs the op.
      hbm_bytes: HBM traffic of one call.
      bound: what limits the op.
      vmem_bytes: VMEM that the op reserves.
      spill_count, fill_count: vector registers spilled and filled in one call.
      utilization: fraction of each unit's slots in use.
      unresolved: what depends on data: branches and DMAs (counted as run), trip counts (counted once).
    """

    name: str
    scope: str
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


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted cost of a compiled program on one chip; ops run one after the other."""

    time_s: float
    cycles: int
    ops: tuple[OpCost, ...]
    vmem_bytes: int
    spill_count: int
    fill_count: int
    hbm_bytes: int
    peak_hbm_bytes: int
    compile_time_s: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def matching(self, text: str) -> tuple[OpCost, ...]:
        """The ops whose name or scope contains `text`."""
        return tuple(op for op in self.ops if text in op.name or text in op.scope)


def predict_from_dump(
    compiled: jax.stages.Compiled,
    dump_dir: Path,
    *,
    device: DeviceSpec,
    compile_time_s: float,
    grid_sizes: Mapping[str, int],
) -> Prediction:
    """Joins the dumped schedules of a program's ops with its HLO; `grid_sizes` as for `predict`.

    Raises:
      UnknownDumpFormatError: there is no schedule, or not in the known form.
    """
    hlo = _read_hlo(compiled.as_text())
    ops = []
    for schedule in _read_schedules(dump_dir, grid_sizes, dma_timing(device)):
        op = hlo.get(schedule.name)
        if op is not None:
            ops.append(_cost(schedule, op, device))
    if not ops:
        raise UnknownDumpFormatError(f"{dump_dir}: no schedule of any of the program's {len(hlo)} ops was dumped.")
    memory = compiled.memory_analysis()
    return Prediction(
        time_s=sum(op.time_s for op in ops),
        cycles=sum(op.cycles * op.calls for op in ops),
        ops=tuple(ops),
        vmem_bytes=max(op.vmem_bytes for op in ops),
        spill_count=sum(op.spill_count * op.calls for op in ops),
        fill_count=sum(op.fill_count * op.calls for op in ops),
        hbm_bytes=sum(op.hbm_bytes * op.calls for op in ops),
        peak_hbm_bytes=(
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.generated_code_size_in_bytes
        ),
        compile_time_s=compile_time_s,
    )


@dataclasses.dataclass(frozen=True)
class _HloOp:
    scope: str
    calls: int
    vmem_bytes: int
    unresolved: tuple[str, ...]


def _cost(schedule: Schedule, op: _HloOp, device: DeviceSpec) -> OpCost:
    hbm_cycles = schedule.hbm_bytes / (HBM_EFFICIENCY * device.hbm_bytes_per_s) * device.clock_hz
    return OpCost(
        name=schedule.name,
        scope=op.scope,
        time_s=(schedule.cycles + schedule.stall_cycles) / device.clock_hz * op.calls,
        cycles=schedule.cycles,
        stall_cycles=schedule.stall_cycles,
        calls=op.calls,
        hbm_bytes=schedule.hbm_bytes,
        bound="compute" if schedule.cycles >= hbm_cycles else "hbm",
        vmem_bytes=op.vmem_bytes,
        spill_count=schedule.spill_count,
        fill_count=schedule.fill_count,
        utilization={unit: round(schedule.utilization(unit), 4) for unit in schedule.unit_capacity},
        unresolved=schedule.unresolved + op.unresolved,
    )


def _read_schedules(dump_dir: Path, grid_sizes: Mapping[str, int], timing: DmaTiming) -> list[Schedule]:
    schedules = []
    for path in sorted(dump_dir.iterdir()):
        match = _FINAL_BUNDLES.match(path.name)
        if match is None or match[1].endswith("schedule-analysis") or match[1].startswith(("<", "TLP")):
            continue
        stem = path.name.rsplit("-", 2)[0]
        tables = [p for p in dump_dir.iterdir() if p.name.startswith(stem + "-") and "per-bundle-utilization" in p.name]
        if len(tables) != 1:
            raise UnknownDumpFormatError(f"{path.name}: expected one utilization table beside it, found {len(tables)}.")
        kernel = match[1].rsplit(".", 1)[0]
        schedules.append(read_schedule(match[1], path, tables[0], timing=timing, grid_size=grid_sizes.get(kernel)))
    return schedules


def _read_hlo(text: str) -> dict[str, _HloOp]:
    """Every op of the scheduled HLO with how often it runs, from the trip counts that the compiler knows."""
    lines_of: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = header[2]
            lines_of[current] = []
            if header[1]:
                entry = current
        elif current:
            lines_of[current].append(line)
    ops: dict[str, _HloOp] = {}

    def visit(computation: str, calls: int, unresolved: tuple[str, ...]) -> None:
        for line in lines_of.get(computation, ()):
            match = _OP.match(line)
            if match is None:
                continue
            scope = _OP_NAME.search(line)
            vmem = _VMEM.search(line)
            ops[match[1]] = _HloOp(
                scope=scope[1] if scope else "",
                calls=calls,
                vmem_bytes=int(vmem[1]) + int(vmem[2]) if vmem else 0,
                unresolved=unresolved,
            )
            loop = _WHILE.search(line)
            if loop:
                trips = _TRIPS.search(line)
                note = () if trips else (f"{match[1]}: trip count not known, counted once",)
                visit(loop[2], calls * int(trips[1]) if trips else calls, unresolved + note)
                continue
            branches = _BRANCHES.search(line)
            called = re.findall(r"%([\w.\-]+)", branches[1]) if branches else _CALLED.findall(line)
            note = (f"{match[1]}: every branch counted",) if "conditional(" in line else ()
            for name in called:
                visit(name, calls, unresolved + note)

    visit(entry, 1, ())
    return ops
