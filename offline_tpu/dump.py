"""Reads the files that the compiler left: which schedule belongs to which op."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from offline_tpu.hlo import values
from offline_tpu.hlo.module import HloModule, HloOp, PrimitiveType
from offline_tpu.machine.dma import CoreTiming
from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.schedule.read import Schedule, read_schedule

_BUNDLES = re.compile(r"(\d+-(.+))-\d+-final_bundles\.txt$")
_MODULE_SUFFIX = "-TLP-hlo.txt"
_NOT_OPS = ("TLP", "<")
_ANALYSIS_SUFFIX = "schedule-analysis"
_UTILIZATION = "per-bundle-utilization"
_VMEM_SUFFIX = "-vmem_report.html"
_VMEM_DATA = re.compile(r"\bDATA\s*=\s*(?=\{)")


class Dump:
    """The files that one compilation dumped.

    Attributes:
      module: its scheduled HLO.
      vmem_bytes: by op, the VMEM that it reserves while it runs.

    Args:
      grid_sizes: as for `offline_tpu.predict`.
      record: keep what `Schedule.at` needs.

    Raises:
      UnknownDumpFormatError: the module or all schedules are missing, or not in the known form.
    """

    def __init__(
        self, directory: Path, *, timing: CoreTiming, grid_sizes: Mapping[str, int], record: bool = False
    ) -> None:
        paths = sorted(directory.iterdir()) if directory.is_dir() else []
        self.module = HloModule.parse(_only(paths, _MODULE_SUFFIX).read_text())
        self.vmem_bytes = _read_vmem(_only(paths, _VMEM_SUFFIX))
        self._timing = timing
        self._grid_sizes = grid_sizes
        self._record = record
        self._tables = [path for path in paths if _UTILIZATION in path.name]
        self._bundles: dict[str, tuple[str, Path]] = {}
        for path in paths:
            match = _BUNDLES.match(path.name)
            if match and not match[2].startswith(_NOT_OPS) and not match[2].endswith(_ANALYSIS_SUFFIX):
                self._bundles[match[2]] = (match[1], path)
        if not self._bundles and any(op.opcode == "fusion" for op in self.module.computations[self.module.entry]):
            raise UnknownDumpFormatError("no schedule of any op was dumped.")
        # The compiler makes one program for ops that are the same, and dumps it once.
        self._twins = {
            self.module.signature(computation, op): op.name
            for computation, ops in self.module.computations.items()
            for op in ops
            if op.name in self._bundles
        }
        self._read: dict[object, Schedule] = {}

    def schedule(self, computation: str, op: HloOp) -> Schedule | None:
        """Return the schedule of an op; None where the compiler wrote none.

        Raises:
          UnknownDumpFormatError: it is not in the known form.
        """
        name = op.name
        if name not in self._bundles:
            name = self._twins.get(self.module.signature(computation, op), "")
        if not name:
            return None
        operands = self._known_operands(computation, op)
        key = (name, tuple(operands.items()))
        if key not in self._read:
            stem, path = self._bundles[name]
            tables = [table for table in self._tables if table.name.startswith(stem + "-")]
            if len(tables) != 1:
                raise UnknownDumpFormatError(f"{path.name}: expected one utilization table, found {len(tables)}.")
            self._read[key] = read_schedule(
                name, path, tables[0], timing=self._timing, operands=operands, record=self._record
            )
        return self._read[key]

    def _known_operands(self, computation: str, op: HloOp) -> dict[int, tuple[int, ...]]:
        if op.opcode != "custom-call":
            return {}
        known = {}
        for index, name in enumerate(op.operands):
            words = values.constant_words(self.module, computation, self.module.op(computation, name))
            if words is not None:
                known[index] = words
        size = self._grid_sizes.get(op.name.rsplit(".", 1)[0])
        if size is not None:
            shapes = [self.module.op(computation, name).shape for name in op.operands]
            scalars = [i for i, s in enumerate(shapes) if s.element_type == PrimitiveType.S32 and not s.dimensions]
            if scalars:
                known[scalars[0]] = (size,)
        return known


def _only(paths: list[Path], suffix: str) -> Path:
    found = [path for path in paths if path.name.endswith(suffix)]
    if len(found) != 1:
        raise UnknownDumpFormatError(f"expected one file *{suffix} in the dump, found {len(found)}.")
    return found[0]


def _read_vmem(path: Path) -> dict[str, int]:
    """Return VMEM bytes by op, from the data in the script of the page that the compiler draws."""
    text = path.read_text()
    start = _VMEM_DATA.search(text)
    if start is None:
        raise UnknownDumpFormatError(f"{path.name}: expected its data as DATA = {{...}}.")
    try:
        data, _ = json.JSONDecoder().raw_decode(text, start.end())
        return {
            name: sum(block["block_size"] for block in op["blocks"] if block["block_type"] == "SCOPED")
            for name, op in data["hlo_breakdowns"].items()
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UnknownDumpFormatError(f"{path.name}: its data are not in the known form ({error}).") from error
