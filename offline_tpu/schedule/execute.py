"""Runs the scalar slice of one op: how often each bundle runs, and when its DMAs let it go on.

All control flow of a TPU core runs on its scalar unit, so loops, nested loops, software-pipeline prologues and
`pl.when` regions are counted by running them, not by guessing. What depends on data is unknown: a branch on it is
taken as not skipping its region, a DMA under it as running, and both are listed. Operands that the caller knows
(constants of the program, a traced grid size) are not unknown; scalars loaded from other SMEM addresses (block indices
that are prefetched) are assumed to differ where their addresses do. A loop of millions of trips, as XLA's ragged matmul
may have, is run for some of them.
"""

import bisect
import dataclasses
from collections.abc import Hashable, Mapping, Sequence

from offline_tpu.machine.dma import HBM_GRANULE_BYTES, CoreTiming, DmaClock, Recording, RecordingClock
from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.schedule.bundles import BRANCH, DMA, WAIT, Instruction, Program
from offline_tpu.schedule.scalar import SMEM_TABLE, Flag, Pointer, Scalars

BRANCH_DELAY_SLOTS = 4
WORD_BYTES = 4
#: Instructions after which the loop over the tiles of a ragged matmul is taken to go on as it began.
SAMPLED_INSTRUCTIONS = 3_000_000
#: And any other loop that says how many trips it makes.
LONG_INSTRUCTIONS = 12_000_000
MAX_EXECUTED_INSTRUCTIONS = 20_000_000
#: In `Execution.unresolved` of an op that was run so and whose trips depend on integers: it may be many times off.
RUN_IN_PART = "the others were taken to be alike"


@dataclasses.dataclass(frozen=True)
class Execution:
    """Result of running an op.

    Attributes:
      counts: how often each bundle runs.
      stall_cycles: cycles beyond those of the bundles: waits for DMAs and matrix units, and VMEM time of the DMAs.
      hbm_bytes: bytes that its DMAs move to and from HBM.
      unresolved: branches and DMAs that depend on data, and waits that match no DMA.
      recording: of its clock; None: not recorded.
    """

    counts: list[int]
    stall_cycles: float
    hbm_bytes: int
    unresolved: tuple[str, ...]
    recording: Recording | None = None


def execute(
    program: Program,
    timing: CoreTiming,
    operands: Mapping[int, Sequence[int]] | None = None,
    *,
    record: bool = False,
) -> Execution:
    """Run the program.

    Args:
      operands: by index, the words of operands that are known: constants, a traced grid size.
      record: keep the calls of the clock.

    Raises:
      UnknownDumpFormatError: the program does not end within a large number of steps.
    """
    clock = RecordingClock(timing) if record else DmaClock(timing)
    return _Run(program, clock, operands or {}).to_the_end()


def runs_alone(program: Program, timing: CoreTiming, operands: Mapping[int, Sequence[int]] | None = None) -> bool:
    """Return whether a chip's second core leaves the program to the first: it ends without a transfer of HBM.

    So it is with tokamax's ragged matmuls, and with XLA's small ops. Where it is not known whether one is started, it
    counts as started.
    """
    if not program.reads_core:
        return False
    try:
        found = _Run(program, _NoTransferClock(timing), operands or {}, core=1).to_the_end()
    except _TransferError:
        return False
    return not any("DMA" in text for text in found.unresolved)


class _TransferError(Exception):
    """A transfer was started."""


class _NoTransferClock(DmaClock):
    def start(self, flag: Hashable | None, size_bytes: int, spaces: tuple[str | None, ...], cores: int = 1) -> None:
        super().start(flag, size_bytes, spaces, cores)
        if self.hbm_bytes:
            raise _TransferError


class _Run:
    def __init__(self, program: Program, clock: DmaClock, operands: Mapping[int, Sequence[int]], core: int = 0) -> None:
        self._program = program
        self._addresses = sorted(program.events)
        self._scalars = Scalars(operands, core)
        self._bundles = [[(i.name, i, self._scalars.step(i)) for i in program.events[a]] for a in self._addresses]
        self._clock = clock
        self._unresolved: dict[str, None] = {}  # an ordered set
        self._clocked_to = 0  # the bundle up to which the clock has run
        self._ragged = SMEM_TABLE in operands
        self._follows_data = bool(operands)  # trips that look at integers are not alike
        self._trip = MAX_EXECUTED_INSTRUCTIONS  # of the longest loop
        self._conditions = {i.result: i for bundle in program.events.values() for i in bundle if i.result}
        self._widest = 0  # bundles of the longest loop

    def to_the_end(self) -> Execution:
        length = self._program.length
        delta = [0] * (length + 1)
        start, from_back_edge, steps, progress = 0, False, 0, 1.0
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
            if from_back_edge and branch_at - jump >= self._widest:
                self._widest = branch_at - jump
                enough = SAMPLED_INSTRUCTIONS if self._ragged else LONG_INSTRUCTIONS
                if steps > enough and (part := self._progress(branch_at)) is not None:
                    progress = part
                    why = RUN_IN_PART if self._follows_data else "all would take minutes to follow"
                    self._unresolved[f"its loop was run for {part:.1%} of its trips: {why}"] = None
                    break
        self._clock.finish()
        counts, running = [], 0
        for change in delta[:length]:
            running += change
            counts.append(running)
        recording = None
        if isinstance(self._clock, RecordingClock):
            recording = Recording(self._clock.calls, sum(counts), progress)
        return Execution(
            counts=[round(count / progress) for count in counts],
            stall_cycles=(self._clock.now - sum(counts)) / progress,
            hbm_bytes=round(self._clock.hbm_bytes / progress),
            unresolved=tuple(self._unresolved),
            recording=recording,
        )

    def _progress(self, branch_at: int) -> float | None:
        """Return the fraction of its trips that the loop with this back edge has made; None where it does not say."""
        branch = next(i for i in self._program.events[branch_at] if i.name == BRANCH)
        exit_test = self._conditions.get(branch.predicate or "")
        if exit_test is None or not exit_test.name.startswith("scmp.ge"):
            return None
        trip, trips = map(self._scalars.value, exit_test.operands)
        if not isinstance(trip, int) or not isinstance(trips, int) or not 0 < trip <= trips:
            return None
        before, self._trip = self._trip, trip
        # A ragged loop skips the tiles that a group does not fill: only between groups it tells how far.
        return None if self._ragged and trip - before <= 1 else trip / trips

    def _straight_line(self, start: int, from_back_edge: bool) -> tuple[int | None, int, int]:
        """Run from `start` to the first taken branch. Returns its target (None: the end), its place, and steps."""
        jump: int | None = None
        branch_at = -1
        steps = 0
        for position in range(bisect.bisect_left(self._addresses, start), len(self._addresses)):
            address = self._addresses[position]
            if jump is not None and address > branch_at + BRANCH_DELAY_SLOTS:
                break
            bundle = self._bundles[position]
            steps += len(bundle)
            # A phi's second value is the next trip's at the head of a loop; elsewhere, of what a branch did not skip.
            second_phi = from_back_edge if address == start else address in self._program.fall_throughs
            for name, instruction, step in bundle:
                if name == BRANCH:
                    if self._taken(instruction, address) and jump is None:
                        assert instruction.target is not None
                        jump, branch_at = self._program.labels[instruction.target], address
                elif name == DMA:
                    self._start_dma(instruction, address)
                elif name == WAIT:
                    self._wait(instruction, address)
                else:
                    step(second_phi)
        return jump, branch_at, steps

    def _run_clock_to(self, address: int) -> None:
        matmuls = self._program.matmuls[address] - self._program.matmuls[self._clocked_to]
        self._clock.advance(address - self._clocked_to, matmuls)
        self._clocked_to = address

    def _taken(self, instruction: Instruction, address: int) -> bool:
        taken = self._scalars.holds(instruction)
        if taken is None:
            self._unresolved[f"branch at {address:#x}"] = None
            return False
        return taken

    def _start_dma(self, instruction: Instruction, address: int) -> None:
        runs = self._scalars.holds(instruction)
        if runs is None:
            self._unresolved[f"DMA at {address:#x}"] = None
        elif not runs:
            return
        size = self._scalars.value(instruction.operands[0])
        if not isinstance(size, int):
            self._unresolved[f"size of the DMA at {address:#x}"] = None
            return
        ends = [self._scalars.value(operand) for operand in instruction.operands[2:]]
        spaces = instruction.spaces
        if ends:
            if spaces[1] == "smem":
                self._scalars.copy_to_smem(ends[0], ends[1], size * HBM_GRANULE_BYTES // WORD_BYTES)
            spaces = tuple(
                known or (end.space if isinstance(end, Pointer) else None)
                for known, end in zip(spaces, ends, strict=True)
            )
        if None in spaces:
            self._unresolved[f"memories of the DMA at {address:#x}"] = None
        self._run_clock_to(address)
        flag = self._scalars.value(instruction.operands[1])
        cores = 2 if isinstance(flag, Flag) and flag.is_shared else 1
        self._clock.start(self._scalars.flag(instruction.operands[1]), size * HBM_GRANULE_BYTES, spaces, cores)

    def _wait(self, instruction: Instruction, address: int) -> None:
        if self._scalars.holds(instruction) is False:
            return
        flag, size = self._scalars.flag(instruction.operands[0]), self._scalars.value(instruction.operands[1])
        self._run_clock_to(address)
        if flag is None or not isinstance(size, int) or not self._clock.wait(flag, size * HBM_GRANULE_BYTES):
            self._unresolved[f"wait at {address:#x} for a DMA that is not known"] = None
