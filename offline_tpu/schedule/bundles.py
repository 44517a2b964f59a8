"""Parses one op's dumped VLIW bundles, down to the scalar instructions that control flow and DMAs depend on."""

import dataclasses
import re

from offline_tpu.machine.errors import UnknownDumpFormatError

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +([A-Z]{0,2}) *: *[> ]*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_PREDICATE = re.compile(r"\((!?)(%p\w+)(?:, ([^)]*))?\)")
_INSTRUCTION = re.compile(r"^(?:(%\w+) = )?([a-z_][\w.]*)\s*(.*)$", re.DOTALL)
_TARGET = re.compile(r"target = \$region(\d+)")
_SPILL = re.compile(r"\[smem:(\[#allocation\d+_spill\])\]")
_MEMORY = re.compile(r"\[smem:\[(#allocation\d+|%\w+)(?: \+ (%\w+|\$0x[0-9a-f]+))?\]\]")
_OPERAND = re.compile(r"\s*(%s\w+) = inlined_call_operand\.(<no memory space>|\w+) \[shape: (\S+), index: (\d+),")
_DMA = re.compile(r"\s*%\w+ = (dma\.(?:(?:hbm|vmem|smem)_to_(?:hbm|vmem|smem)|general))\b(.*)", re.DOTALL)
_WAIT = re.compile(r"\s*%\w+ = dma\.done\.wait\b(.*)", re.DOTALL)
#: Of the two cores that share a chip and its grids, each reads which it is; the register that stands for it.
CORE_ID = "core id"
_CORE_ID = re.compile(r"\s*(%s\w+) = sld \[smem:\[[^\]]+\]\](?: \([^)]*\))? /\* (?:megacore )?core id\b")
_MATMUL = re.compile(r"= vmatmul((?:\.\w+)+)")
_HALF = re.compile(r"\.(f32|lmr)\b")
_ATTRIBUTE = re.compile(r"\[resolvable:\$\w+\] ")
_FIELD = re.compile(r"/\*([\w.]+)=\*/(%?\w+|\[[^\]]*\])")

_FALL_THROUGH = "PF"
BRANCH, DMA, WAIT = "sbr.rel", "dma", "dma.done.wait"
LOAD, STORE, MOVE, PHI, OPERAND = "sld", "sst", "smov.u32", "sphi", "inlined_call_operand"
#: The two results of a division wait in a queue.
_DIVISION, _POP = "sdivrem.u32", "spop.drf"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of the scalar slice: `result = name operands`, executed where `predicate` holds.

    Attributes:
      operands: registers and constants; of a DMA (size in granules, flag, from, to), of a wait (flag, size in
        granules), of an operand of the op (its index), of a store (value, index).
      otherwise: value of the result where the predicate does not hold.
      target: region that a branch jumps to.
      spaces: memory spaces of a DMA, (from, to), or of a pointer, (its own,); None where its operand must tell.
    """

    name: str
    result: str | None = None
    operands: tuple[str | int, ...] = ()
    predicate: str | None = None
    predicate_negated: bool = False
    otherwise: str | int | None = None
    target: str | None = None
    spaces: tuple[str | None, ...] = ()

    @property
    def reads(self) -> list[str]:
        return [x for x in (*self.operands, self.otherwise, self.predicate) if isinstance(x, str)]


class Program:
    """The bundles of one op, reduced to branches, DMAs, waits and what they depend on.

    Attributes:
      length: bundles.
      labels: bundle that each region starts at.
      fall_throughs: bundles where what a branch may skip has ended.
      events: instructions by bundle, in the order of execution.
      matmuls: how many matmuls of a whole register start before each bundle; one in float32 counts half, since its
        register holds half as many rows as one of packed bfloat16, int8 or float8. So does one of v5p's `lmr`: as many
        results are popped of it.
      reads_core: whether what it does depends on which of a chip's cores runs it.

    Raises:
      UnknownDumpFormatError: the text is not in the known form.
    """

    def __init__(self, text: str) -> None:
        starts = list(_BUNDLE.finditer(text))
        if not starts:
            raise UnknownDumpFormatError("no VLIW bundles found in the dump; it may come from another libtpu.")
        self.length = len(starts)
        self.labels: dict[str, int] = {}
        self.fall_throughs = {index for index, match in enumerate(starts) if match[2] == _FALL_THROUGH}
        parsed: list[tuple[int, Instruction]] = []
        started = [0.0]
        for index, match in enumerate(starts):
            if int(match[1], 16) != index:
                raise UnknownDumpFormatError(f"bundle {match[1]}: expected address {index:#x}.")
            end = starts[index + 1].start() if index + 1 < self.length else len(text)
            body = text[match.end() : end]
            if " region " in body:
                for comment in _COMMENT.findall(body):
                    for label in _LABEL.findall(comment):
                        self.labels.setdefault(label, index)
            kinds = _MATMUL.findall(body) if "vmatmul" in body else ()
            started.append(started[-1] + sum(0.5 if _HALF.search(kind) else 1.0 for kind in kinds))
            parsed.extend((index, instruction) for instruction in _parse_bundle(body))
        self.events = _slice(_with_divisions(parsed))
        self.reads_core = any(CORE_ID in i.operands for bundle in self.events.values() for i in bundle)
        self.matmuls = started
        targets = {i.target for bundle in self.events.values() for i in bundle if i.name == BRANCH}
        missing = sorted(str(target) for target in targets - self.labels.keys())
        if len(missing) > 1 and "PF:  {} /* exit bundle" not in text:
            raise UnknownDumpFormatError(f"branches to unknown regions {', '.join(missing)}.")
        for exit_region in missing:  # nested regions that end with the op: empty, behind the last bundle, no label
            self.labels[exit_region] = self.length


def _with_divisions(parsed: list[tuple[int, Instruction]]) -> list[tuple[int, Instruction]]:
    """Replace a division and the pops of its results by its quotient, which is popped first, and its remainder."""
    divisions = {i.result: iter(("sdiv.u32", "srem.u32")) for _, i in parsed if i.name == _DIVISION}
    operands = {i.result: i.operands for _, i in parsed if i.name == _DIVISION}
    if not divisions:
        return parsed

    def popped(i: Instruction) -> Instruction:
        division = i.operands[0] if i.name == _POP else None
        return Instruction(next(divisions[division]), i.result, operands[division]) if division in divisions else i

    return [(index, popped(i)) for index, i in parsed if i.name != _DIVISION]


def _slice(parsed: list[tuple[int, Instruction]]) -> dict[int, list[Instruction]]:
    """Keep branches, DMAs, waits and what they read, transitively; by bundle, phis first and branches last."""
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


def _parse_bundle(body: str) -> list[Instruction]:
    instructions = []
    for raw in body.split(";;"):
        # Vector instructions are the bulk of a dump; only what makes a scalar, a predicate or a transfer counts.
        if raw.lstrip().startswith("%v") and "= " in raw:
            continue
        if "dma." in raw and (dma := _DMA.match(raw)):
            instruction: Instruction | None = _parse_dma(dma[1], dma[2])
        elif "dma.done.wait" in raw and (wait := _WAIT.match(raw)):
            instruction = _parse_wait(_COMMENT.sub("", wait[1]))
        elif "core id" in raw and (core := _CORE_ID.match(raw)):
            instruction = Instruction(MOVE, core[1], (CORE_ID,))
        elif OPERAND in raw and (operand := _OPERAND.match(raw)):
            space = operand[2] if operand[2].isidentifier() else None
            instruction = Instruction(OPERAND, operand[1], (int(operand[4]),), spaces=(space,))
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
    if name in (STORE, LOAD):
        return _parse_memory(name, result, rest)
    if result is None or not (result.startswith(("%s", "%p")) or name == _DIVISION):
        return None
    guard = _PREDICATE.match(rest)
    if guard:
        rest = rest[guard.end() :].lstrip(", ")
    rest = _ATTRIBUTE.sub("", rest)
    return Instruction(
        name,
        result,
        tuple(_operand(part) for part in rest.split(",")) if rest else (),
        predicate=guard[2] if guard else None,
        predicate_negated=bool(guard and guard[1]),
        otherwise=_operand(guard[3]) if guard and guard[3] else None,
    )


def _parse_memory(name: str, result: str | None, rest: str) -> Instruction | None:
    """Parse a load or store: what is spilled keeps its value, and a store's result is the allocation that it writes."""
    spill = _SPILL.search(rest)
    if spill is not None:
        if name == LOAD:
            return Instruction(MOVE, result, (spill[1],))
        return Instruction(MOVE, spill[1], (_stored(rest[spill.end() :]),))
    memory = _MEMORY.search(rest)
    if memory is None or (name == STORE and memory[1].startswith("%")):
        return None
    base = memory[1] if memory[1].startswith("%") else f"[{memory[1]}]"
    offset = memory[2] or "$0x0"
    index = offset if offset.startswith("%") else int(offset[1:], 16)
    if name == LOAD:
        return Instruction(LOAD, result, (base, index))
    guard = _PREDICATE.match(rest)
    return Instruction(
        STORE,
        base,
        (_stored(rest[memory.end() :]), index),
        predicate=guard[2] if guard else None,
        predicate_negated=bool(guard and guard[1]),
    )


def _stored(rest: str) -> str | int:
    return _operand(rest.strip(" ,").split(",")[0].split()[0])


def _parse_dma(name: str, rest: str) -> Instruction:
    fields = dict(_FIELD.findall(rest))
    guard = _PREDICATE.search(rest.split("/*", 1)[0])
    source, _, destination = name.removeprefix("dma.").partition("_to_")
    general = name == "dma.general"
    names = ("src", "dst") if general else (source, destination)
    missing = {"size_in_granules", "dst_syncflagno"} - fields.keys()
    if missing:
        raise UnknownDumpFormatError(f"{name}: expected {', '.join(sorted(missing))}, got {sorted(fields)}.")
    # The ends of a transfer between HBM and VMEM are plain from its name: what they point at need not be worked out.
    explained = not general and "smem" not in names
    ends = () if explained else tuple(_operand(fields.get(name, "0")) for name in names)
    return Instruction(
        DMA,
        operands=(
            _operand(fields["size_in_granules"]),
            _operand(fields["dst_syncflagno"]),
            *ends,
        ),
        predicate=guard[2] if guard else None,
        predicate_negated=bool(guard and guard[1]),
        spaces=(None, None) if general else (source, destination),
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
