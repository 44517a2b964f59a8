"""Reads the files that the compiler left: which schedule belongs to which op."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from offline_tpu.hlo import ragged, values
from offline_tpu.hlo.module import HloModule, HloOp, PrimitiveType
from offline_tpu.integers import Integers
from offline_tpu.machine.dma import CoreTiming
from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.overlays import Overlays, read_overlays
from offline_tpu.schedule.read import Schedule, read_schedule
from offline_tpu.schedule.scalar import SMEM_TABLE

#: In `Schedule.unresolved`: loops are counted as one trip each, so that the time may be many times too small.
UNKNOWN_TRIPS = "how often its loops run depends on integers that are not known"
_BUNDLES = re.compile(r"(\d+-(.+))-\d+-final_bundles\.txt$")
_MODULE_SUFFIX = "-TLP-hlo.txt"
_NOT_OPS = ("TLP", "<")
_ANALYSIS_SUFFIX = "schedule-analysis"
_UTILIZATION = "per-bundle-utilization"
_VMEM_SUFFIX = "-vmem_report.html"
_OVERLAYS_SUFFIX = "-overlay-graph.txt"
_VMEM_DATA = re.compile(r"\bDATA\s*=\s*(?=\{)")


class Dump:
    """The files that one compilation dumped.

    Attributes:
      module: its scheduled HLO.
      vmem_bytes: by op, the VMEM that it reserves while it runs.
      overlays: the pieces of its code; None in an archive from before they were dumped.

    Args:
      archived: the files come from an archive.
      grid_sizes: as for `offline_tpu.predict`.
      record: keep what `Schedule.at` needs.
      find_integers: returns what else is known of kernels' operands; it is asked only where the HLO does not say.

    Raises:
      UnknownDumpFormatError: the module or all schedules are missing, or not in the known form.
    """

    def __init__(
        self,
        directory: Path,
        *,
        timing: CoreTiming,
        grid_sizes: Mapping[str, int],
        find_integers: Callable[[], Integers] = Integers,
        archived: bool = False,
        record: bool = False,
    ) -> None:
        paths = sorted(directory.iterdir()) if directory.is_dir() else []
        self.module = HloModule.parse(_only(paths, _MODULE_SUFFIX).read_text())
        self.vmem_bytes = _read_vmem(_only(paths, _VMEM_SUFFIX))
        self.overlays: Overlays | None = None
        if not archived or any(path.name.endswith(_OVERLAYS_SUFFIX) for path in paths):
            self.overlays = read_overlays(_only(paths, _OVERLAYS_SUFFIX))
        self._timing = timing
        self._grid_sizes = grid_sizes
        self._record = record
        self._integers = functools.cache(find_integers)
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
        operands, complete = self._known_operands(computation, op)
        key = (name, tuple(operands.items()))
        if key not in self._read:
            stem, path = self._bundles[name]
            tables = [table for table in self._tables if table.name.startswith(stem + "-")]
            if len(tables) != 1:
                raise UnknownDumpFormatError(f"{path.name}: expected one utilization table, found {len(tables)}.")
            self._read[key] = read_schedule(
                name, path, tables[0], timing=self._timing, operands=operands, record=self._record
            )
        schedule = self._read[key]
        if not complete and any(text.startswith("branch") for text in schedule.unresolved):
            return dataclasses.replace(schedule, unresolved=(UNKNOWN_TRIPS, *schedule.unresolved))
        return schedule

    def names_of(self, opcode: str) -> set[str]:
        """Return the names of all ops of a kind, without the numbers that tell ops of one name apart."""
        return {op.name.rsplit(".", 1)[0] for op in self._all(opcode)}

    def scopes_of(self, opcode: str) -> set[str]:
        """Return the scopes of all ops of a kind."""
        return {op.scope for op in self._all(opcode)}

    def _all(self, opcode: str) -> Iterator[HloOp]:
        return (op for ops in self.module.computations.values() for op in ops if op.opcode == opcode)

    def _known_operands(self, computation: str, op: HloOp) -> tuple[dict[int, tuple[int, ...]], bool]:
        """Return the known words by operand, and whether all integers that may decide how often loops run are known."""
        if op.opcode == "fusion":
            return self._ragged_table(computation, op)
        if op.opcode != "custom-call":
            return {}, True
        name = op.name.rsplit(".", 1)[0]
        operands = [self.module.op(computation, operand) for operand in op.operands]
        integers = [i for i, x in enumerate(operands) if x.shape.element_type in (PrimitiveType.S32, PrimitiveType.U32)]
        known = {i: words for i in integers if (words := self._words(computation, op, operands[i])) is not None}
        if len(known) < len(integers):
            known = dict(self._integers().kernels.get(name, {})) | known
        scalars = [i for i in integers if not operands[i].shape.dimensions]
        if name in self._grid_sizes and scalars:
            known[scalars[0]] = (self._grid_sizes[name],)
        return known, known.keys() >= set(integers)

    def _ragged_table(self, computation: str, fusion: HloOp) -> tuple[dict[int, tuple[int, ...]], bool]:
        """Return the table of the rows where the groups of a ragged matmul start, as the schedule's operand."""
        if not ragged.is_matmul(self.module, fusion):
            return {}, True
        sizes = ragged.group_sizes(self.module, computation, fusion)
        words = None if sizes is None else self._words(computation, fusion, sizes)
        return ({}, False) if words is None else ({SMEM_TABLE: (0, *itertools.accumulate(words))}, True)

    def _words(self, computation: str, user: HloOp, op: HloOp) -> tuple[int, ...] | None:
        """Return the words of an operand of `user`; None where they are not known."""
        source = values.source(self.module, computation, op)
        if source.opcode == "parameter" and computation == self.module.entry:
            return self._integers().parameters.get(source.proto.parameter_number)
        if source.opcode != "get-tuple-element":
            return values.constant_words(self.module, computation, source)
        kernel = self.module.op(computation, source.operands[0])
        if not ragged.is_metadata(kernel):
            return None
        sizes = self._words(computation, kernel, self.module.op(computation, kernel.operands[0]))
        if sizes is None:
            return None
        results = ragged.metadata_words(self.module, computation, kernel, user, sizes)
        return None if results is None else results[source.proto.tuple_index]


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
            for name, op in (data["hlo_breakdowns"] or {}).items()
        }
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UnknownDumpFormatError(f"{path.name}: its data are not in the known form ({error}).") from error
