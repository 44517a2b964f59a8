"""Reads the compiler's scheduled HLO: computations, their ops in order, shapes, calls and scopes."""

import dataclasses
import functools
import re

from offline_tpu.machine.errors import UnknownDumpFormatError

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OP = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$", re.DOTALL)
_NAME = re.compile(r"%([\w.\-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLED = re.compile(
    r"\b(?:calls|to_apply|condition|body|true_computation|false_computation)=%([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{[^}]*?(?:S\((\d+)\))?\})?")
_COMMENT = re.compile(r"/\*[^*]*\*/")
_DESCRIPTION = re.compile(
    r"\b(?:metadata|frontend_attributes|sharding)=\{(?:[^{}\"]|\"(?:[^\"\\]|\\.)*\"|\{[^{}]*\})*\}"
)
_VMEM_SPACE = "1"

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class HloOp:
    """One op of a computation.

    Attributes:
      name, opcode, shape: as in the text; the shape with its layout.
      operands: names of ops of the same computation.
      attributes: everything behind the operands.
      is_root: whether the op is its computation's result.
    """

    name: str
    opcode: str
    shape: str
    operands: tuple[str, ...]
    arguments: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def scope(self) -> str:
        """JAX's op_name path; "" where the compiler made the op."""
        match = _OP_NAME.search(self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """Computations that the op calls, in the order of the text."""
        names: list[str] = []
        for one, several in _CALLED.findall(self.attributes):
            names.extend([one] if one else _NAME.findall(several))
        return tuple(names)

    def attribute(self, name: str) -> str | None:
        """The text of `name={...}` or `name=word`."""
        match = re.search(rf"\b{name}=(\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}|\"[^\"]*\"|[^,\s]+)", self.attributes)
        return match[1] if match else None


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
        """Reads the text form.

        Raises:
          UnknownDumpFormatError: there is no entry computation, or an op is not in the known form.
        """
        lines: dict[str, list[str]] = {}
        entry = current = ""
        for line in text.splitlines():
            header = _HEADER.match(line)
            if header:
                current = header[2]
                lines[current] = []
                entry = current if header[1] else entry
            elif line.startswith("}"):
                # kernel metadata may put a line of its own that begins with a brace inside an op
                if line.strip() == "}":
                    current = ""
                elif current:
                    lines[current][-1] += "\n" + line
            elif current and _OP.match(line):
                lines[current].append(line)
            elif current and lines[current]:
                lines[current][-1] += "\n" + line
        if not entry:
            raise UnknownDumpFormatError("the HLO text has no entry computation.")
        return cls(entry, {name: tuple(map(_parse_op, ops)) for name, ops in lines.items()})

    @functools.cached_property
    def _by_name(self) -> dict[str, dict[str, HloOp]]:
        return {name: {op.name: op for op in ops} for name, ops in self.computations.items()}

    def op(self, computation: str, name: str) -> HloOp:
        """An op by name."""
        return self._by_name[computation][name]

    def root(self, computation: str) -> HloOp:
        """The op that a computation returns."""
        return next(op for op in self.computations[computation] if op.is_root)

    def inside(self, op: HloOp) -> list[HloOp]:
        """The ops of everything that an op calls, transitively."""
        found = []
        for name in op.called:
            for inner in self.computations.get(name, ()):
                found.append(inner)
                found.extend(self.inside(inner))
        return found

    def signature(self, computation: str, op: HloOp) -> str:
        """What decides the program that the compiler makes of an op: two ops with the same one share it."""
        operands = [self.op(computation, name).shape for name in op.operands]
        return "\n".join([op.shape, op.opcode, *operands, _plain(op), *(self._body(name) for name in op.called)])

    def _body(self, computation: str) -> str:
        numbers = {op.name: f"%{i}" for i, op in enumerate(self.computations.get(computation, ()))}
        lines = []
        for op in self.computations.get(computation, ()):
            arguments = _NAME.sub(lambda match: numbers.get(match[1], match[0]), op.arguments)
            lines.append(f"{op.shape} {op.opcode}({arguments}){_plain(op)}")
            lines.extend(self._body(name) for name in op.called)
        return "\n".join(lines)


def array_bytes(shape: str, *, hbm_only: bool = False) -> int:
    """Bytes of the arrays in a shape, without padding; `hbm_only`: of those that are not in VMEM."""
    total = 0
    for kind, dims, space in _ARRAY.findall(_COMMENT.sub("", shape)):
        if hbm_only and space == _VMEM_SPACE:
            continue
        count = 1
        for dim in filter(None, dims.split(",")):
            count *= int(dim)
        total += (count * _bits(kind) + 7) // 8
    return total


def tuple_elements(shape: str) -> list[str]:
    """The shapes in a tuple's; the shape itself where it is no tuple."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, begin = [], 0, 1
    for index, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(shape[begin:index].strip())
            begin = index + 1
    return parts


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    match = re.match(r"(?:[usfc]|bf)(\d+)", kind)
    if match is None:
        raise UnknownDumpFormatError(f"{kind=}: expected an element type of HLO.")
    return int(match[1])


def _parse_op(line: str) -> HloOp:
    match = _OP.match(line)
    assert match is not None
    rest = match[3]
    shape_end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opened = rest.find("(", shape_end)
    if opened < 0:
        raise UnknownDumpFormatError(f"HLO op {match[2]}: expected operands, got {rest[:80]!r}.")
    closed = _closing(rest, opened)
    arguments = rest[opened + 1 : closed]
    opcode = rest[shape_end:opened].strip()
    return HloOp(
        name=match[2],
        opcode=opcode,
        shape=rest[:shape_end],
        operands=() if opcode in ("constant", "parameter") else tuple(_NAME.findall(arguments)),
        arguments=arguments,
        attributes=rest[closed + 1 :],
        is_root=bool(match[1]),
    )


def _closing(text: str, opened: int) -> int:
    depth = 0
    for index in range(opened, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise UnknownDumpFormatError(f"HLO op: unbalanced parentheses in {text[:80]!r}.")


def _plain(op: HloOp) -> str:
    """Attributes without what only names or describes."""
    text = _DESCRIPTION.sub("", op.attributes)
    text = re.sub(r"\bchannel_id=\d+", "", text)
    return _NAME.sub("%", text)
