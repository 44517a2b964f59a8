"""Times a program whose dump was kept again, at other constants of the time model.

The dump is parsed and its scalar slices run once; for other constants only the clocks of the DMAs run again.
"""

import tempfile
from pathlib import Path

from offline_tpu import archive
from offline_tpu.dump import Dump
from offline_tpu.hlo.module import HloOp
from offline_tpu.machine.constants import FittedConstants, core_timing
from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.machine.links import Grid
from offline_tpu.program_time import ProgramCost
from offline_tpu.schedule.read import Schedule


class KeptProgram:
    """A program from what `offline_tpu.predict` kept of it.

    Attributes:
      unresolved: what the prediction had to assume.

    Args:
      path: the archive.
      device: that it was compiled for.

    Raises:
      ValueError: the file is not such an archive.
      UnknownDumpFormatError: the dump is not in the known form.
    """

    def __init__(self, path: Path, device: DeviceSpec) -> None:
        self._timing = core_timing(device)
        self._schedules: dict[tuple[str, str], Schedule | None] = {}
        with tempfile.TemporaryDirectory() as folder:
            facts = archive.unpack(path, Path(folder))
            self._dump = Dump(Path(folder), timing=self._timing, grid_sizes={}, archived=True, record=True)
            self._grid = Grid.around(facts.coords, device.ici_wrap_length)
            cost = self._cost(device, FittedConstants.of(device))
            cost.walk()  # reads all schedules, while their files are there
        self.unresolved = tuple(dict.fromkeys(text for op in cost.ops for text in op.unresolved))

    def time_s(self, device: DeviceSpec, constants: FittedConstants) -> float:
        """Return the program's seconds at other constants, and the device's clock."""
        return self._cost(device, constants).walk()

    def _cost(self, device: DeviceSpec, constants: FittedConstants) -> ProgramCost:
        timing = constants.core_timing(device)
        timed: dict[int, Schedule] = {}

        def find_schedule(computation: str, op: HloOp) -> Schedule | None:
            schedule = self._recorded(computation, op)
            if schedule is None or timing == self._timing:
                return schedule
            if id(schedule) not in timed:
                timed[id(schedule)] = schedule.at(timing)
            return timed[id(schedule)]

        return ProgramCost(
            self._dump.module,
            find_schedule,
            vmem_bytes=self._dump.vmem_bytes,
            overlays=self._dump.overlays,
            device=device,
            grid=self._grid,
            trip_counts={},
            constants=constants,
        )

    def _recorded(self, computation: str, op: HloOp) -> Schedule | None:
        key = (computation, op.name)
        if key not in self._schedules:
            self._schedules[key] = self._dump.schedule(computation, op)
        return self._schedules[key]
