"""Finds the named scopes of ops, in what JAX calls them and in the HLO that a profile holds."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from splash_workbench.profiles.xla_pb2 import HloModuleProto, HloProto, XPlane, XSpace, XStat

_METADATA_PLANE, _HLO_STAT = "/host:metadata", "Hlo Proto"
#: Parts of an op_name that JAX adds, not the author of the program. `eval_jaxpr` is of JAX 0.11.
_ADDED = frozenset(
    "while body cond closed_call eval_jaxpr shard_map pjit checkpoint remat custom_jvp_call custom_vjp_call".split()  # noqa: SIM905
)
_NO_SCOPE = re.compile(r"\(|->|^branch_\d+_fun$")


def named_scope(op_name: str) -> str:
    """Return the named scopes of "jit(f)/blocks/while/body/closed_call/attention/dot": "blocks/attention".

    Left out are the primitive at the end, functions (`jit(f)`), the formulas of einsum, and what JAX adds for control
    flow. Of the several names that XLA gives a fused op the first counts.
    """
    parts = op_name.split(";")[0].rstrip(":").split("/")[:-1]
    return "/".join(part for part in parts if part not in _ADDED and not _NO_SCOPE.search(part))


class Instruction(NamedTuple):
    """Opcode and named scopes of an HLO op; "" where not known."""

    opcode: str = ""
    scope: str = ""


class Programs:
    """Opcode and scope of each op, from the HLO that the profiler saves."""

    def __init__(self, space: XSpace) -> None:
        self._by_id: dict[str, dict[str, Instruction]] = {}
        self._by_name: dict[str, list[dict[str, Instruction]]] = collections.defaultdict(list)
        for plane in space.planes:
            if plane.name != _METADATA_PLANE:
                continue
            for metadata in plane.event_metadata.values():
                proto = read_stats(plane, metadata.stats).get(_HLO_STAT)
                if isinstance(proto, bytes):
                    module = HloProto.FromString(proto).hlo_module
                    instructions = _instructions(module)
                    self._by_id[metadata.name[metadata.name.rfind("(") :]] = instructions
                    self._by_name[module.name].append(instructions)

    def find(self, stats: Mapping[str, Any], op: str) -> Instruction:
        """Return what an event ran, by its stats; nothing in it where the HLO is absent or does not tell which."""
        module = str(stats.get("hlo_module", ""))
        program = self._by_id.get(f"({stats.get('program_id')})")
        if program in self._by_name.get(module, ()) or (program and not module):
            return (program or {}).get(op, Instruction())
        # A program out of the compilation cache runs under the number that it had when it was compiled.
        found = {program[op] for program in self._by_name.get(module, ()) if op in program}
        return found.pop() if len(found) == 1 else Instruction()


def _instructions(module: HloModuleProto) -> dict[str, Instruction]:
    computations = {computation.id: computation for computation in module.computations}
    found = {}
    for computation in module.computations:
        for instruction in computation.instructions:
            scope = named_scope(instruction.metadata.op_name)
            if not scope and instruction.opcode == "fusion":  # made by the compiler: what most of it is of
                inside = [op for n in instruction.called_computation_ids for op in computations[n].instructions]
                scopes = collections.Counter(filter(None, (named_scope(op.metadata.op_name) for op in inside)))
                scope = scopes.most_common(1)[0][0] if scopes else ""
            found[instruction.name] = Instruction(instruction.opcode, scope)
    return found


def read_stats(plane: XPlane, stats: Iterable[XStat]) -> dict[str, Any]:
    """Return stats of a plane by their names."""
    found = {}
    for stat in stats:
        kind = stat.WhichOneof("value")
        value = getattr(stat, kind) if kind else None
        name = plane.stat_metadata[stat.metadata_id].name
        found[name] = plane.stat_metadata[value].name if kind == "ref_value" else value
    return found
