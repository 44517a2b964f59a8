"""Runs the scalar slice of one op: how often each bundle runs, and when its DMAs let it go on.

All control flow of a TPU core runs on its scalar unit, so loops, nested loops, software-pipeline prologues and
`pl.when` regions are counted by running them, not by guessing. What depends on data is unknown: a branch on it is
taken as not skipping its region, a DMA under it as running, and both are listed. Two things are assumed instead: a
traced grid size has the value that the caller names, and scalars loaded from different SMEM addresses (block indices
that are prefetched) differ.
"""

import bisect
import dataclasses

from tuning.offline import scalar
from tuning.offline.bundles import BRANCH, DMA, WAIT, Instruction, Program
from tuning.offline.dma import HBM_GRANULE_BYTES, DmaClock, DmaTiming
from tuning.offline.errors import UnknownDumpFormatError

BRANCH_DELAY_SLOTS = 4
MAX_EXECUTED_INSTRUCTIONS = 20_000_000


@dataclasses.dataclass(frozen=True)
class Execution:
    """What running an op came to.

    Attributes:
      counts: how often each bundle runs.
      stall_cycles: cycles beyond those of the bundles: waits for DMAs, and VMEM time that they take.
      hbm_bytes: bytes that its DMAs move to and from HBM.
      unresolved: branches and DMAs that depend on data, and waits that match no DMA.
    """

    counts: list[int]
    stall_cycles: float
    hbm_bytes: int
    unresolved: tuple[str, ...]


def execute(program: Program, timing: DmaTiming, *, grid_size: int | None = None) -> Execution:
    """Runs the program.

    Args:
      grid_size: the value of a traced grid size, where the op has one.

    Raises:
      UnknownDumpFormatError: the program does not end within a large number of steps.
    """
    return _Run(program, timing, grid_size).to_the_end()


class _Run:
    def __init__(self, program: Program, timing: DmaTiming, grid_size: int | None) -> None:
        self._program = program
        self._addresses = sorted(program.events)
        self._values: scalar.Values = {}
        if grid_size is not None and program.grid_size_name is not None:
            self._values[program.grid_size_name] = grid_size
        self._clock = DmaClock(timing)
        self._unresolved: dict[str, None] = {}  # an ordered set
        self._clocked_to = 0  # the bundle up to which the clock has run

    def to_the_end(self) -> Execution:
        length = self._program.length
        delta = [0] * (length + 1)
        start, from_back_edge, steps = 0, False, 0
        while True:
            self._clocked_to = start
            jump, branch_at, taken_steps = self._straight_line(start, from_back_edge)
            steps += taken_steps
            if steps > MAX_EXECUTED_INSTRUCTIONS:
                raise UnknownDumpFormatError(f"the schedule did not end within {MAX_EXECUTED_INSTRUCTIONS} steps.")
            end = length if jump is None else min(branch_at + BRANCH_DELAY_SLOTS + 1, length)
            self._run_clock_to(end)
            delta[start] += 1
            delta[end] -= 1
            if jump is None:
                break
            from_back_edge = jump <= branch_at
            start = jump
        self._clock.finish()
        counts, running = [], 0
        for change in delta[:length]:
            running += change
            counts.append(running)
        return Execution(
            counts=counts,
            stall_cycles=self._clock.now - sum(counts),
            hbm_bytes=self._clock.hbm_bytes,
            unresolved=tuple(self._unresolved),
        )

    def _straight_line(self, start: int, from_back_edge: bool) -> tuple[int | None, int, int]:
        """Runs from `start` to the first taken branch: where that leads (None: the end), where it is, and steps."""
        jump: int | None = None
        branch_at = -1
        steps = 0
        for position in range(bisect.bisect_left(self._addresses, start), len(self._addresses)):
            address = self._addresses[position]
            if jump is not None and address > branch_at + BRANCH_DELAY_SLOTS:
                break
            for instruction in self._program.events[address]:
                steps += 1
                if instruction.name == BRANCH:
                    if self._taken(instruction, address) and jump is None:
                        assert instruction.target is not None
                        jump, branch_at = self._program.labels[instruction.target], address
                elif instruction.name == DMA:
                    self._start_dma(instruction, address)
                elif instruction.name == WAIT:
                    self._wait(instruction, address)
                else:
                    scalar.assign(instruction, self._values, from_back_edge and address == start)
        return jump, branch_at, steps

    def _run_clock_to(self, address: int) -> None:
        self._clock.run(address - self._clocked_to)
        self._clocked_to = address

    def _taken(self, instruction: Instruction, address: int) -> bool:
        taken = scalar.holds(instruction, self._values)
        if taken is None:
            self._unresolved[f"branch at {address:#x}"] = None
            return False
        return taken

    def _start_dma(self, instruction: Instruction, address: int) -> None:
        runs = scalar.holds(instruction, self._values)
        if runs is None:
            self._unresolved[f"DMA at {address:#x}"] = None
        elif not runs:
            return
        size, flag = (scalar.value_of(operand, self._values) for operand in instruction.operands)
        if not isinstance(size, int):
            self._unresolved[f"size of the DMA at {address:#x}"] = None
            return
        if None in instruction.spaces:
            self._unresolved[f"memories of the DMA at {address:#x}"] = None
        self._run_clock_to(address)
        known = flag if isinstance(flag, str) and scalar.is_flag(flag) else None
        self._clock.start(known, size * HBM_GRANULE_BYTES, instruction.spaces)

    def _wait(self, instruction: Instruction, address: int) -> None:
        if scalar.holds(instruction, self._values) is False:
            return
        flag, size = (scalar.value_of(operand, self._values) for operand in instruction.operands)
        self._run_clock_to(address)
        known = isinstance(flag, str) and scalar.is_flag(flag) and isinstance(size, int)
        if not known or not self._clock.wait(str(flag), size * HBM_GRANULE_BYTES):  # type: ignore[operator]
            self._unresolved[f"wait at {address:#x} for a DMA that is not known"] = None
