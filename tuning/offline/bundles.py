"""Parses one op's dumped VLIW bundles, down to the scalar instructions that control flow and DMAs depend on."""

import dataclasses
import re

from tuning.offline.errors import UnknownDumpFormatError

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +[A-Z]{0,2} *: *[> ]*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_PREDICATE = re.compile(r"\((!?)(%p\w+)(?:, ([^)]*))?\)")
_INSTRUCTION = re.compile(r"^(?:(%\w+) = )?([a-z_][\w.]*)\s*(.*)$", re.DOTALL)
_TARGET = re.compile(r"target = \$region(\d+)")
_MEMORY = re.compile(r"\[smem:(\[#allocation\w+\])\]")
_INDEXED_MEMORY = re.compile(r"\[smem:\[(#allocation\w+)(?: \+ (%\w+|\$0x[0-9a-f]+))?\]\]")
_SCALAR_OPERAND = re.compile(r"(%s\w+) = inlined_call_operand\.<no memory space> \[shape: s32\[\]")
_POINTER = re.compile(r"(%s\w+) = (?:scalar_lea|int_to_ptr|inlined_call_operand)\.(hbm|vmem|smem)\b")
_DMA = re.compile(r"\s*%\w+ = (dma\.(?:(?:hbm|vmem|smem)_to_(?:hbm|vmem|smem)|general))\b(.*)", re.DOTALL)
_WAIT = re.compile(r"\s*%\w+ = dma\.done\.wait\b(.*)", re.DOTALL)
_FIELD = re.compile(r"/\*([\w.]+)=\*/(%?\w+|\[[^\]]*\])")

BRANCH, DMA, WAIT = "sbr.rel", "dma", "dma.done.wait"
LOAD, MOVE, PHI = "sld", "smov.u32", "sphi"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the scalar slice: `result = name operands`, executed where `predicate` holds.

    Attributes:
      operands: registers and constants; of a DMA (size in granules, flag), of a wait (flag, size in granules).
      otherwise: value of the result where the predicate does not hold.
      target: region that a branch jumps to.
      spaces: memory spaces of a DMA, (from, to); None where the dump does not say.
    """

    name: str
    result: str | None = None
    operands: tuple[str | int, ...] = ()
    predicate: str | None = None
    predicate_negated: bool = False
    otherwise: str | int | None = None
    target: str | None = None
    spaces: tuple[str | None, str | None] = (None, None)

    @property
    def reads(self) -> list[str]:
        return [x for x in (*self.operands, self.otherwise, self.predicate) if isinstance(x, str)]


class Program:
    """The bundles of one op, reduced to branches, DMAs, waits and what they depend on.

    Attributes:
      length: bundles.
      labels: bundle that each region starts at.
      events: instructions by bundle, in the order of execution.
      grid_size_name: register of a traced grid size, None where the op has none.

    Raises:
      UnknownDumpFormatError: the text is not in the known form.
    """

    def __init__(self, text: str) -> None:
        starts = list(_BUNDLE.finditer(text))
        if not starts:
            raise UnknownDumpFormatError("no VLIW bundles found in the dump; it may come from another libtpu.")
        self.length = len(starts)
        self.labels: dict[str, int] = {}
        scalar_operand = _SCALAR_OPERAND.search(text, 0, starts[min(8, self.length - 1)].start())
        self.grid_size_name = scalar_operand[1] if scalar_operand else None
        spaces = dict(_POINTER.findall(text))
        parsed: list[tuple[int, Instruction]] = []
        for index, match in enumerate(starts):
            if int(match[1], 16) != index:
                raise UnknownDumpFormatError(f"bundle {match[1]}: expected address {index:#x}.")
            end = starts[index + 1].start() if index + 1 < self.length else len(text)
            body = text[match.end() : end]
            if " region " in body:
                for comment in _COMMENT.findall(body):
                    for label in _LABEL.findall(comment):
                        self.labels.setdefault(label, index)
            parsed.extend((index, instruction) for instruction in _parse_bundle(body, spaces))
        self.events = _slice(parsed)
        for address, bundle in self.events.items():
            for instruction in bundle:
                if instruction.name == BRANCH and instruction.target not in self.labels:
                    raise UnknownDumpFormatError(f"branch at {address:#x} to an unknown region {instruction.target}.")


def _slice(parsed: list[tuple[int, Instruction]]) -> dict[int, list[Instruction]]:
    """Keeps branches, DMAs, waits and what they read, transitively; by bundle, phis first and branches last."""
    writers: dict[str, list[Instruction]] = {}
    for _, instruction in parsed:
        if instruction.result is not None:
            writers.setdefault(instruction.result, []).append(instruction)
    wanted: set[int] = set()
    stack = [i for _, i in parsed if i.name in (BRANCH, DMA, WAIT)]
    while stack:
        instruction = stack.pop()
        if id(instruction) not in wanted:
            wanted.add(id(instruction))
            for name in instruction.reads:
                stack.extend(writers.get(name, ()))
    events: dict[int, list[Instruction]] = {}
    for index, instruction in parsed:
        if id(instruction) in wanted:
            events.setdefault(index, []).append(instruction)
    for bundle in events.values():
        bundle.sort(key=lambda i: (i.name != PHI, i.name == BRANCH))
    return events


def _parse_bundle(body: str, spaces: dict[str, str]) -> list[Instruction]:
    instructions = []
    for raw in body.split(";;"):
        # Vector instructions are the bulk of a dump; only what makes a scalar, a predicate or a transfer counts.
        if raw.lstrip().startswith("%v") and "= " in raw:
            continue
        if "dma." in raw and (dma := _DMA.match(raw)):
            instruction: Instruction | None = _parse_dma(dma[1], dma[2], spaces)
        elif "dma.done.wait" in raw and (wait := _WAIT.match(raw)):
            instruction = _parse_wait(_COMMENT.sub("", wait[1]))
        else:
            instruction = _parse_scalar(_COMMENT.sub("", raw))
        if instruction is not None:
            instructions.append(instruction)
    return instructions


def _parse_scalar(raw: str) -> Instruction | None:
    match = _INSTRUCTION.match(raw.strip().rstrip("}").strip())
    if match is None:
        return None
    result, name, rest = match.groups()
    if name == BRANCH:
        target = _TARGET.search(rest)
        guard = _PREDICATE.search(rest)
        return Instruction(
            BRANCH,
            predicate=guard[2] if guard else None,
            predicate_negated=bool(guard and guard[1]),
            target=target[1] if target else None,
        )
    if name in ("sst", LOAD):
        return _parse_memory(name, result, rest)
    if result is None or not result.startswith(("%s", "%p")) or name.startswith("inlined_call_operand"):
        return None
    guard = _PREDICATE.match(rest)
    if guard:
        rest = rest[guard.end() :].lstrip(", ")
    return Instruction(
        name,
        result,
        tuple(_operand(part) for part in rest.split(",")) if rest else (),
        predicate=guard[2] if guard else None,
        predicate_negated=bool(guard and guard[1]),
        otherwise=_operand(guard[3]) if guard and guard[3] else None,
    )


def _parse_memory(name: str, result: str | None, rest: str) -> Instruction | None:
    """Scalars spilled to SMEM keep their value; what else is loaded from SMEM is known by its address only."""
    memory = _MEMORY.search(rest)
    indexed = _INDEXED_MEMORY.search(rest)
    if name == LOAD and indexed and "_spill" not in indexed[1]:
        index = indexed[2] or "$0x0"
        return Instruction(LOAD, result, (indexed[1], index if index.startswith("%") else int(index[1:], 16)))
    if memory is None:
        return None
    if name == LOAD:
        return Instruction(MOVE, result, (memory[1],))
    stored = rest[memory.end() :].split(",")[0].strip()
    return Instruction(MOVE, memory[1], (_operand(stored.split()[0]),))


def _parse_dma(name: str, rest: str, spaces: dict[str, str]) -> Instruction:
    fields = dict(_FIELD.findall(rest))
    guard = _PREDICATE.search(rest.split("/*", 1)[0])
    if name == "dma.general":
        ends = spaces.get(fields.get("src", "")), spaces.get(fields.get("dst", ""))
    else:
        source, _, destination = name.removeprefix("dma.").partition("_to_")
        ends = source, destination
    size, flag = fields.get("size_in_granules"), fields.get("dst_syncflagno")
    if size is None or flag is None:
        raise UnknownDumpFormatError(f"{name}: expected size_in_granules and dst_syncflagno, got {sorted(fields)}.")
    return Instruction(
        DMA,
        operands=(_operand(size), _operand(flag)),
        predicate=guard[2] if guard else None,
        predicate_negated=bool(guard and guard[1]),
        spaces=ends,
    )


def _parse_wait(rest: str) -> Instruction:
    guard = _PREDICATE.match(rest.strip())
    operands = rest.strip()[guard.end() if guard else 0 :].strip(" ,}\n").split(",")
    if len(operands) != 2:
        raise UnknownDumpFormatError(f"dma.done.wait {rest.strip()!r}: expected a flag and a size.")
    return Instruction(
        WAIT,
        operands=tuple(_operand(part) for part in operands),
        predicate=guard[2] if guard else None,
        predicate_negated=bool(guard and guard[1]),
    )


def _operand(text: str) -> str | int:
    text = text.strip()
    if re.fullmatch(r"-?\d+", text):
        value = int(text) & 0xFFFFFFFF
        return value - 2**32 if value >= 2**31 else value
    return text
