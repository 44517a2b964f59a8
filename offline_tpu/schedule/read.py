"""Reads the two dump files that the compiler wrote about one op, for what it costs on its core."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from offline_tpu.machine.dma import CoreTiming, Recording
from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.schedule.bundles import Program
from offline_tpu.schedule.execute import execute, runs_alone
from offline_tpu.schedule.pace import steady_cycles

_SPILL, _FILL, _SCALAR = "VSTORE:SPILL", "VLOAD:FILL", "SALU"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Cost of one op on its core, from the compiler's schedule.

    Attributes:
      name: the HLO op's name.
      counts: how often each VLIW bundle of the op runs, in the order of the code.
      cycles: bundles executed; one bundle is one cycle.
      stall_cycles: cycles beyond these, waiting for DMAs, VMEM or matrix units.
      steady_cycles: what `cycles` would be at the pace of the middle of its straight code, by its matrix products, or
        where it has none by all of its vector instructions.
      unit_uses: executed slots by unit (MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VSTORE, SALU, ...).
      unit_capacity: slots a cycle by unit.
      spill_count, fill_count: executed vector register spills (stores) and fills (loads).
      hbm_bytes: bytes moved to and from HBM by the op's own DMAs, of each core in the mean.
      unresolved: branches and DMAs that depend on data, which are counted as run (a loop: one trip), and DMAs whose
        size is not known, which are not counted.
      is_alone: the chip has more cores, and they leave the op, and HBM, to this one.
      recording: of its clock, for `at`; None: not recorded.
    """

    name: str
    counts: Sequence[int]
    cycles: int
    stall_cycles: float
    steady_cycles: float
    unit_uses: dict[str, int]
    unit_capacity: dict[str, int]
    spill_count: int
    fill_count: int
    hbm_bytes: int
    unresolved: tuple[str, ...]
    is_alone: bool = False
    recording: Recording | None = dataclasses.field(default=None, repr=False, compare=False)

    def at(self, timing: CoreTiming) -> Self:
        """Return the schedule of a core with other constants. Its clock's calls must have been recorded."""
        assert self.recording is not None
        timing = timing.alone() if self.is_alone else timing
        return dataclasses.replace(self, stall_cycles=self.recording.stall_cycles(timing))

    def utilization(self, unit: str) -> float:
        """Return the fraction of the unit's slots that the executed bundles fill."""
        return self.unit_uses[unit] / (self.unit_capacity[unit] * self.cycles) if self.cycles else 0.0


def read_schedule(
    name: str,
    bundles_path: Path,
    utilization_path: Path,
    *,
    timing: CoreTiming,
    operands: Mapping[int, Sequence[int]] | None = None,
    record: bool = False,
) -> Schedule:
    """Read the two dump files of one op, and run its scalar slice.

    Args:
      name: the HLO op's.
      bundles_path, utilization_path: the files, *-final_bundles.txt and *-per-bundle-utilization.txt.
      timing: of the chip's core.
      operands: by index, the words of the op's operands that are known: constants, a traced grid size.
      record: keep what `Schedule.at` needs.

    Raises:
      UnknownDumpFormatError: the files are not in the known form, or they disagree in length.
    """
    try:
        program = Program(bundles_path.read_text())
    except UnknownDumpFormatError as error:
        raise UnknownDumpFormatError(f"{bundles_path.name}: {error}") from error
    capacity, table = _read_utilization(utilization_path)
    if len(table) != program.length:
        raise UnknownDumpFormatError(
            f"{utilization_path.name}: {len(table)} bundles, expected the {program.length} of {bundles_path.name}."
        )
    is_alone = timing.cores > 1 and runs_alone(program, timing, operands)
    execution = execute(program, timing.alone() if is_alone else timing, operands, record=record)
    is_alone = is_alone and execution.hbm_bytes > 0  # else it takes as long in any case
    work: Sequence[float] = program.matmuls
    if not work[-1]:
        vector = [column for column, unit in enumerate(capacity) if unit != _SCALAR]
        work = [0, *itertools.accumulate(sum(row[column] for column in vector) for row in table)]
    uses = dict.fromkeys(capacity, 0)
    units = list(capacity)
    for count, row in zip(execution.counts, table, strict=True):
        for unit, used in zip(units, row, strict=True):
            if used:
                uses[unit] += used * count
    return Schedule(
        name=name,
        counts=execution.counts,
        cycles=sum(execution.counts),
        stall_cycles=execution.stall_cycles,
        steady_cycles=steady_cycles(execution.counts, work),
        unit_uses=uses,
        unit_capacity=capacity,
        spill_count=uses.get(_SPILL, 0),
        fill_count=uses.get(_FILL, 0),
        hbm_bytes=execution.hbm_bytes // (timing.cores if is_alone else 1),
        unresolved=execution.unresolved,
        is_alone=is_alone,
        recording=execution.recording,
    )


def _read_utilization(path: Path) -> tuple[dict[str, int], list[list[int]]]:
    lines = path.read_text().splitlines()
    if len(lines) < 4 or not lines[0].startswith("== CAPA") or not lines[3].startswith("== UTILIZATION"):
        raise UnknownDumpFormatError(f"{path.name}: expected a capacity header, got {lines[:1]!r}.")
    units = [unit.strip() for unit in lines[1].split(",")]
    figures = [[int(x) for x in line.split()] for line in (lines[2], *lines[4:]) if line.strip()]
    if any(len(row) != len(units) for row in figures):
        raise UnknownDumpFormatError(f"{path.name}: expected {len(units)} figures a line.")
    return dict(zip(units, figures[0], strict=True)), figures[1:]
