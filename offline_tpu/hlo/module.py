"""Reads the compiler's scheduled HLO: computations, their ops in order, shapes, calls and scopes.

XLA itself parses the text, through jaxlib: a private API, which this file alone uses. jaxlib is pinned as libtpu is.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence

from offline_tpu.machine.errors import UnknownDumpFormatError
from splash_workbench.profiles.xla_pb2 import HloComputationProto, HloInstructionProto, HloModuleProto, ShapeProto
from splash_workbench.profiles.xla_pb2 import PrimitiveType as PrimitiveType

_VMEM_SPACE = 1
_BITS = {"PRED": 8, "TOKEN": 0, "OPAQUE_TYPE": 0}
#: The parser fills in values of its own for those that the text leaves out.
_ELIDED = re.compile(r"%([\w.\-]+) = \S+ constant\([^)\n]*\.\.\.")
#: Fields that only name or describe; what an op is applied to and what it calls are compared by content instead.
_NAMES = (
    "name id metadata frontend_attributes sharding channel_id operand_ids control_predecessor_ids "  # noqa: SIM905
    "called_computation_ids".split()
)


@dataclasses.dataclass(frozen=True)
class HloOp:
    """One op of a computation.

    Attributes:
      proto: XLA's own description.
      opcode: XLA's; of an op that runs another one asynchronously that one's, e.g. "slice-start".
      operands: names of ops of the same computation.
      called: names of the computations that the op calls; of a while its body, then its condition.
      is_root: whether the op is its computation's result.
      values: of a constant of integers or booleans its elements; None of another op, or where the text leaves them out.
    """

    proto: HloInstructionProto
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    is_root: bool
    values: tuple[int, ...] | None

    @property
    def name(self) -> str:
        return self.proto.name

    @property
    def shape(self) -> ShapeProto:
        return self.proto.shape

    @property
    def scope(self) -> str:
        """Return JAX's op_name path; "" where the compiler made the op."""
        return self.proto.metadata.op_name


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A scheduled module.

    Attributes:
      entry: name of the entry computation.
      computations: ops by computation, in the order that the core runs them.
    """

    entry: str
    computations: dict[str, tuple[HloOp, ...]]

    @classmethod
    def parse(cls, text: str) -> "HloModule":
        """Read the text form.

        Raises:
          UnknownDumpFormatError: XLA's parser refuses the text, or this jaxlib does not have it.
        """
        proto = _parse(text)
        by_id = {computation.id: computation for computation in proto.computations}
        elided = frozenset(_ELIDED.findall(text))
        return cls(
            by_id[proto.entry_computation_id].name,
            {
                computation.name: _ops(computation, by_id, proto.schedule.sequences[number].instruction_ids, elided)
                for number, computation in by_id.items()
            },
        )

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, HloOp]]:
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def op(self, computation: str, name: str) -> HloOp:
        """Return an op by name."""
        return self._by_name[computation][name]

    def root(self, computation: str) -> HloOp:
        """Return the op that is a computation's result."""
        return next(op for op in self.computations[computation] if op.is_root)

    def inside(self, op: HloOp) -> list[HloOp]:
        """Return the ops of everything that an op calls, transitively."""
        found = []
        for name in op.called:
            for inner in self.computations[name]:
                found.append(inner)
                found.extend(self.inside(inner))
        return found

    def signature(self, computation: str, op: HloOp) -> bytes:
        """Return what decides the program that the compiler makes of an op: two ops with the same one share it."""
        operands = [_bytes(self.op(computation, name).shape) for name in op.operands]
        return b"\n".join([*operands, _content(op), *(self._body(name) for name in op.called)])

    def _body(self, computation: str) -> bytes:
        numbers = {op.name: index for index, op in enumerate(self.computations[computation])}
        parts = []
        for op in self.computations[computation]:
            parts += [_content(op), str([numbers[name] for name in op.operands]).encode()]
            parts += [self._body(name) for name in op.called]
        return b"\n".join(parts)


def array_bytes(shape: ShapeProto, *, hbm_only: bool = False) -> int:
    """Return the bytes of a shape's arrays, without padding; `hbm_only`: of those that are not in VMEM."""
    if shape.tuple_shapes:
        return sum(array_bytes(element, hbm_only=hbm_only) for element in shape.tuple_shapes)
    if hbm_only and shape.layout.memory_space == _VMEM_SPACE:
        return 0
    return (math.prod(shape.dimensions) * _bits(shape.element_type) + 7) // 8


def _bits(element_type: int) -> int:
    name = PrimitiveType.Name(element_type) if element_type in PrimitiveType.values() else str(element_type)
    match = re.match(r"(?:[USFC]|BF)(\d+)", name)
    if name not in _BITS and match is None:
        raise UnknownDumpFormatError(f"element type {name}: expected one of an array.")
    return _BITS[name] if match is None else int(match[1])


#: A custom call that a SparseCore runs beside the core, as on v7x. libtpu writes its phases as XLA's own parser does
#: not take them: as calls of these targets they can be read.
_SPARSE_CORE_TARGET = "sparsecore-"
_METADATA = r", metadata=\{(?:\"(?:\\.|[^\"\\])*\"|[^\"}])*\}"  # a name may itself hold braces, in quotes
_CALLED = r", called_computations=\{[^}]*\}"
_SPARSE_CORE_PHASE = re.compile(r" custom-call-(start|update|done)(\([^()]*\))(.*)$", re.M)


def _parse(text: str) -> HloModuleProto:
    try:
        from jaxlib._hlo import hlo_module_from_text  # type: ignore[import-not-found]

        module = hlo_module_from_text(_SPARSE_CORE_PHASE.sub(_as_custom_call, text))
        return HloModuleProto.FromString(module.as_serialized_hlo_module_proto())
    except (ImportError, AttributeError) as error:
        raise UnknownDumpFormatError(f"this jaxlib does not read HLO as the pinned one does ({error}).") from error
    except RuntimeError as error:  # XlaRuntimeError
        raise UnknownDumpFormatError(f"XLA does not read the HLO text: {' '.join(str(error).split())[:300]}") from error


def _as_custom_call(phase: re.Match[str]) -> str:
    kept = "".join(found[0] for pattern in (_CALLED, _METADATA) if (found := re.search(pattern, phase[3])))
    return f' custom-call{phase[2]}, custom_call_target="{_SPARSE_CORE_TARGET}{phase[1]}"{kept}'


def _ops(
    computation: HloComputationProto,
    computations: dict[int, HloComputationProto],
    schedule: Sequence[int],
    elided: frozenset[str],
) -> tuple[HloOp, ...]:
    """Return the ops of a computation in the order of its schedule; of a fusion, which has none, operands first."""
    by_id = {proto.id: proto for proto in computation.instructions}
    return tuple(
        HloOp(
            proto,
            opcode=_opcode(proto, by_id, computations),
            operands=tuple(by_id[number].name for number in proto.operand_ids),
            called=tuple(computations[number].name for number in proto.called_computation_ids),
            is_root=proto.id == computation.root_id,
            values=_values(proto) if proto.opcode == "constant" and proto.name not in elided else None,
        )
        for proto in (by_id[number] for number in schedule or by_id)
    )


def _opcode(
    proto: HloInstructionProto,
    siblings: dict[int, HloInstructionProto],
    computations: dict[int, HloComputationProto],
) -> str:
    if proto.custom_call_target.startswith(_SPARSE_CORE_TARGET):
        return f"custom-call-{proto.custom_call_target.removeprefix(_SPARSE_CORE_TARGET)}"
    prefix, _, phase = proto.opcode.partition("-")
    if prefix != "async":
        return proto.opcode
    start = proto
    while start.opcode != "async-start":
        start = siblings[start.operand_ids[0]]
    inner = [op for op in computations[start.called_computation_ids[0]].instructions if op.opcode != "parameter"]
    return f"{inner[0].opcode}-{phase}" if len(inner) == 1 else proto.opcode


def _values(proto: HloInstructionProto) -> tuple[int, ...]:
    literal = proto.literal
    return (*map(int, literal.preds), *literal.s32s, *literal.u32s, *literal.s64s, *literal.u64s)


def _content(op: HloOp) -> bytes:
    proto = HloInstructionProto()
    proto.CopyFrom(op.proto)
    for name in _NAMES:
        proto.ClearField(name)
    return _bytes(proto)


def _bytes(proto: HloInstructionProto | ShapeProto) -> bytes:
    return proto.SerializeToString(deterministic=True)
