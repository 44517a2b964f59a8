"""Reads the TPU compiler's final schedule of one op and counts how often each bundle runs.

The compiler dumps every VLIW bundle of an op as text. All control flow of a TPU core runs on its scalar unit, so the
few scalar instructions that branches depend on are executed here: loops, nested loops, software-pipeline prologues and
`pl.when` regions are counted by running them, not by guessing. What depends on data is unknown: a branch on it is
taken as not skipping its region, a DMA under it as running, and both are listed in `Schedule.unresolved`. Two things
are assumed instead: a traced grid size has the value that the caller names, and scalars loaded from different SMEM
addresses (block indices that are prefetched) differ.
"""

import dataclasses
import operator
import re
from collections.abc import Callable
from pathlib import Path

BRANCH_DELAY_SLOTS = 4
HBM_GRANULE_BYTES = 32
MAX_EXECUTED_INSTRUCTIONS = 20_000_000

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +[A-Z]{0,2} *: *[> ]*\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_LABEL = re.compile(r"Start(?:/End empty)? region (\d+)")
_PREDICATE = re.compile(r"\((!?)(%p\w+)(?:, ([^)]*))?\)")
_INSTRUCTION = re.compile(r"^(?:(%\w+) = )?([a-z_][\w.]*)\s*(.*)$", re.DOTALL)
_TARGET = re.compile(r"target = \$region(\d+)")
_MEMORY = re.compile(r"\[smem:(\[#allocation\w+\])\]")
_INDEXED_MEMORY = re.compile(r"\[smem:\[(#allocation\w+)(?: \+ (%\w+|\$0x[0-9a-f]+))?\]\]")
_SCALAR_OPERAND = re.compile(r"(%s\w+) = inlined_call_operand\.<no memory space> \[shape: s32\[\]")
# Copies between memories of the chip (vmem_to_vmem, vmem_to_smem, ...) are not HBM traffic.
_DMA = re.compile(r"\s*%\w+ = (dma\.(?:hbm_to_vmem|vmem_to_hbm|hbm_to_hbm|general))\b(.*)", re.DOTALL)
_FIELD = re.compile(r"/\*([\w.]+)=\*/(%?\w+)")

_INT32 = 2**32

# A scalar is an int, a string for one loaded from a known SMEM address ("load ...") or for a difference of two such
# (_NONZERO), or None where nothing is known.
_Scalar = int | str | None
_NONZERO = "nonzero"


class UnknownDumpFormatError(RuntimeError):
    """The dump is not in the form that this version of the reader knows."""


def _signed(value: int) -> int:
    value &= _INT32 - 1
    return value - _INT32 if value >= _INT32 // 2 else value


def _unsigned(value: int) -> int:
    return value & (_INT32 - 1)


_Binary = Callable[[int, int], int]
_COMPARE: dict[str, _Binary] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_BINARY: dict[str, _Binary] = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "smin": min,
    "smax": max,
    "sshll": lambda a, b: a << b if 0 <= b < 32 else 0,
    "sshrl": lambda a, b: _unsigned(a) >> b if 0 <= b < 32 else 0,
    "sshra": lambda a, b: a >> min(_unsigned(b), 31),
    "por": operator.or_,
    "pand": operator.and_,
    "pxor": operator.xor,
    "pnand": lambda a, b: int(not (a and b)),
    "pnor": lambda a, b: int(not (a or b)),
}


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One scalar instruction: `result = name operands`, executed where `predicate` holds."""

    name: str
    result: str | None
    operands: tuple[str | int, ...]
    predicate: str | None
    predicate_negated: bool
    otherwise: str | int | None
    target: str | None

    @property
    def reads(self) -> list[str]:
        names = [x for x in (*self.operands, self.otherwise, self.predicate) if isinstance(x, str)]
        return names


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What one op costs on its core, from the compiler's schedule.

    Attributes:
      name: the HLO op's name.
      bundles: static length of the op, in VLIW bundles.
      cycles: bundles executed; one bundle is one cycle, stalls on memory not included.
      unit_uses: executed slots by unit (MATMUL, MATPUSH, XLU, VALU, VPOP, EUP, VLOAD, VSTORE, SALU, ...).
      unit_capacity: slots a cycle by unit.
      spill_count, fill_count: executed vector register spills (stores) and fills (loads).
      static_spill_count: spill slots in the static schedule.
      hbm_bytes: bytes moved between HBM and VMEM by the op's own DMAs.
      unresolved: branches and DMAs that depend on data, which are counted as run (a loop: one trip), and DMAs whose
        size is not known, which are not counted.
    """

    name: str
    bundles: int
    cycles: int
    unit_uses: dict[str, int]
    unit_capacity: dict[str, int]
    spill_count: int
    fill_count: int
    static_spill_count: int
    hbm_bytes: int
    unresolved: tuple[str, ...]

    def utilization(self, unit: str) -> float:
        """Fraction of the unit's slots that the executed bundles fill."""
        return self.unit_uses[unit] / (self.unit_capacity[unit] * self.cycles) if self.cycles else 0.0


def read_schedule(
    name: str, bundles_path: Path, utilization_path: Path, *, grid_size: int | None = None
) -> Schedule:
    """Reads the two dump files of one op.

    Args:
      grid_size: the value of a Pallas kernel's traced grid dimension, where it has one.

    Raises:
      UnknownDumpFormatError: the files are not in the known form, or they disagree in length.
    """
    program = _Program(bundles_path.read_text())
    capacity, table = _read_utilization(utilization_path)
    if len(table) != program.length:
        raise UnknownDumpFormatError(
            f"{utilization_path.name}: {len(table)} bundles, expected the {program.length} of {bundles_path.name}."
        )
    counts, hbm_bytes, unresolved = program.execute(grid_size)
    uses = dict.fromkeys(capacity, 0)
    static_spills = 0
    units = list(capacity)
    for count, row in zip(counts, table, strict=True):
        for unit, used in zip(units, row, strict=True):
            if used:
                uses[unit] += used * count
                if unit == "VSTORE:SPILL":
                    static_spills += used
    return Schedule(
        name=name,
        bundles=program.length,
        cycles=sum(counts),
        unit_uses=uses,
        unit_capacity=capacity,
        spill_count=uses.get("VSTORE:SPILL", 0),
        fill_count=uses.get("VLOAD:FILL", 0),
        static_spill_count=static_spills,
        hbm_bytes=hbm_bytes,
        unresolved=tuple(unresolved),
    )


def _read_utilization(path: Path) -> tuple[dict[str, int], list[list[int]]]:
    lines = path.read_text().splitlines()
    if len(lines) < 4 or not lines[0].startswith("== CAPA") or not lines[3].startswith("== UTILIZATION"):
        raise UnknownDumpFormatError(f"{path.name}: expected a capacity header, got {lines[:1]!r}.")
    units = [unit.strip() for unit in lines[1].split(",")]
    capacity = dict(zip(units, map(int, lines[2].split()), strict=True))
    return capacity, [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]


class _Program:
    """The bundles of one op, reduced to the scalar instructions that control flow and DMA sizes depend on."""

    def __init__(self, text: str) -> None:
        starts = list(_BUNDLE.finditer(text))
        if not starts:
            raise UnknownDumpFormatError("no VLIW bundles found in the dump; it may come from another libtpu.")
        self.length = len(starts)
        self.labels: dict[str, int] = {}
        scalar_operand = _SCALAR_OPERAND.search(text, 0, starts[min(8, self.length - 1)].start())
        self.grid_size_name = scalar_operand[1] if scalar_operand else None
        parsed: list[tuple[int, _Instruction]] = []
        for index, match in enumerate(starts):
            if int(match[1], 16) != index:
                raise UnknownDumpFormatError(f"bundle {match[1]}: expected address {index:#x}.")
            end = starts[index + 1].start() if index + 1 < self.length else len(text)
            body = text[match.end() : end]
            if " region " in body:
                for comment in _COMMENT.findall(body):
                    for label in _LABEL.findall(comment):
                        self.labels.setdefault(label, index)
            parsed.extend((index, instruction) for instruction in _parse_bundle(body))
        self.events = self._slice(parsed)

    @staticmethod
    def _slice(parsed: list[tuple[int, _Instruction]]) -> dict[int, list[_Instruction]]:
        """Keeps branches, DMAs and what they read, transitively; by bundle, phis first."""
        writers: dict[str, list[_Instruction]] = {}
        for _, instruction in parsed:
            if instruction.result is not None:
                writers.setdefault(instruction.result, []).append(instruction)
        wanted: set[int] = set()
        stack = [i for _, i in parsed if i.name in ("sbr.rel", "sbr.abs") or i.name.startswith("dma.")]
        while stack:
            instruction = stack.pop()
            if id(instruction) not in wanted:
                wanted.add(id(instruction))
                for name in instruction.reads:
                    stack.extend(writers.get(name, ()))
        events: dict[int, list[_Instruction]] = {}
        for index, instruction in parsed:
            if id(instruction) in wanted:
                events.setdefault(index, []).append(instruction)
        for bundle in events.values():
            bundle.sort(key=lambda i: (i.name != "sphi", i.name.startswith("sbr")))
        return events

    def execute(self, grid_size: int | None = None) -> tuple[list[int], int, list[str]]:
        """Runs the scalar slice.

        Returns:
          How often each bundle runs, the bytes its HBM DMAs move, and what was not resolved.

        Raises:
          UnknownDumpFormatError: the program does not end within a large number of steps.
        """
        delta = [0] * (self.length + 1)
        values: dict[str | int, _Scalar] = {}
        if grid_size is not None and self.grid_size_name is not None:
            values[self.grid_size_name] = grid_size
        hbm_bytes = 0
        unresolved: dict[str, None] = {}  # an ordered set
        addresses = sorted(self.events)
        next_event = {address: position for position, address in enumerate(addresses)}
        start, from_back_edge, steps = 0, False, 0
        while True:
            jump: int | None = None
            branch_at = -1
            position = _first_at_or_after(addresses, next_event, start)
            end = self.length - 1
            while position < len(addresses):
                address = addresses[position]
                if jump is not None and address > branch_at + BRANCH_DELAY_SLOTS:
                    break
                for instruction in self.events[address]:
                    steps += 1
                    if instruction.name == "sbr.rel":
                        taken = self._branch_taken(instruction, address, values, unresolved)
                        if taken and jump is None:
                            jump, branch_at = self.labels[instruction.target or ""], address
                    elif instruction.name.startswith("dma."):
                        hbm_bytes += _dma_bytes(instruction, address, values, unresolved)
                    else:
                        _assign(instruction, values, from_back_edge and address == start)
                position += 1
            if steps > MAX_EXECUTED_INSTRUCTIONS:
                raise UnknownDumpFormatError(f"the schedule did not end within {MAX_EXECUTED_INSTRUCTIONS} steps.")
            if jump is not None:
                end = min(branch_at + BRANCH_DELAY_SLOTS, self.length - 1)
            delta[start] += 1
            delta[end + 1] -= 1
            if jump is None:
                break
            from_back_edge = jump <= branch_at
            start = jump
        counts, running = [], 0
        for change in delta[: self.length]:
            running += change
            counts.append(running)
        return counts, hbm_bytes, list(unresolved)

    def _branch_taken(
        self,
        instruction: _Instruction,
        address: int,
        values: dict[str | int, _Scalar],
        unresolved: dict[str, None],
    ) -> bool:
        if instruction.target not in self.labels:
            raise UnknownDumpFormatError(f"branch at {address:#x} to an unknown region {instruction.target}.")
        if instruction.predicate is None:
            return True
        condition = values.get(instruction.predicate)
        if condition is None:
            unresolved[f"branch at {address:#x}"] = None
            return False
        return bool(condition) != instruction.predicate_negated


def _first_at_or_after(addresses: list[int], next_event: dict[int, int], start: int) -> int:
    if start in next_event:
        return next_event[start]
    low, high = 0, len(addresses)
    while low < high:
        middle = (low + high) // 2
        if addresses[middle] < start:
            low = middle + 1
        else:
            high = middle
    return low


def _parse_bundle(body: str) -> list[_Instruction]:
    instructions = []
    for raw in body.split(";;"):
        # Vector instructions are the bulk of a dump; only scalar and predicate results, stores, branches and DMAs count.
        if "%v" in raw and "= " in raw and raw.lstrip().startswith("%v"):
            continue
        dma = _DMA.match(raw) if "dma." in raw else None
        instruction = _parse_dma(*dma.groups()) if dma else _parse_scalar(_COMMENT.sub("", raw))
        if instruction is not None:
            instructions.append(instruction)
    return instructions


def _parse_scalar(raw: str) -> _Instruction | None:
    match = _INSTRUCTION.match(raw.strip().rstrip("}").strip())
    if match is None:
        return None
    result, name, rest = match.groups()
    if name == "sbr.rel":
        target = _TARGET.search(rest)
        guard = _PREDICATE.search(rest)
        return _Instruction(
            name=name,
            result=None,
            operands=(),
            predicate=guard[2] if guard else None,
            predicate_negated=bool(guard and guard[1]),
            otherwise=None,
            target=target[1] if target else None,
        )
    if name in ("sst", "sld"):
        memory = _MEMORY.search(rest)
        indexed = _INDEXED_MEMORY.search(rest)
        if name == "sld" and indexed and "_spill" not in indexed[1]:
            index = indexed[2] or "$0x0"
            offset: str | int = index if index.startswith("%") else int(index[1:], 16)
            return _Instruction("sld", result, (indexed[1], offset), None, False, None, None)
        if memory is None:
            return None
        if name == "sst":
            stored = rest[memory.end() :].split(",")[0].strip()
            return _Instruction("smov.u32", memory[1], (_operand(stored.split()[0]),), None, False, None, None)
        return _Instruction("smov.u32", result, (memory[1],), None, False, None, None)
    if result is None or not result.startswith(("%s", "%p")) or name.startswith("inlined_call_operand"):
        return None
    guard = _PREDICATE.match(rest)
    predicate = otherwise = None
    negated = False
    if guard:
        predicate, negated = guard[2], bool(guard[1])
        otherwise = _operand(guard[3]) if guard[3] else None
        rest = rest[guard.end() :].lstrip(", ")
    operands = tuple(_operand(part.strip()) for part in rest.split(",")) if rest else ()
    return _Instruction(name, result, operands, predicate, negated, otherwise, None)


def _parse_dma(name: str, rest: str) -> _Instruction:
    fields = dict(_FIELD.findall(rest))
    guard = _PREDICATE.search(rest.split("/*", 1)[0])
    size = fields.get("size_in_granules")
    return _Instruction(
        name=name,
        result=None,
        operands=(_operand(size),) if size else (),
        predicate=guard[2] if guard else None,
        predicate_negated=bool(guard and guard[1]),
        otherwise=None,
        target=None,
    )


def _operand(text: str) -> str | int:
    if re.fullmatch(r"-?\d+", text):
        return _signed(int(text))
    return text


def _value(operand: str | int, values: dict[str | int, _Scalar]) -> _Scalar:
    return operand if isinstance(operand, int) else values.get(operand)


def _dma_bytes(
    instruction: _Instruction, address: int, values: dict[str | int, _Scalar], unresolved: dict[str, None]
) -> int:
    if instruction.predicate is not None:
        condition = values.get(instruction.predicate)
        if condition is None:
            unresolved[f"DMA at {address:#x}"] = None
        elif bool(condition) == instruction.predicate_negated:
            return 0
    size = _value(instruction.operands[0], values) if instruction.operands else None
    if not isinstance(size, int):
        unresolved[f"size of the DMA at {address:#x}"] = None
        return 0
    return size * HBM_GRANULE_BYTES


def _assign(instruction: _Instruction, values: dict[str | int, _Scalar], from_back_edge: bool) -> None:
    if instruction.result is None:
        return
    if instruction.predicate is not None:
        condition = values.get(instruction.predicate)
        if condition is None:
            values[instruction.result] = None
            return
        if bool(condition) == instruction.predicate_negated:
            otherwise = instruction.otherwise
            values[instruction.result] = None if otherwise is None else _value(otherwise, values)
            return
    values[instruction.result] = _evaluate(instruction, values, from_back_edge)


def _evaluate(instruction: _Instruction, values: dict[str | int, _Scalar], from_back_edge: bool) -> _Scalar:
    name = instruction.name.split(".")[0]
    if name == "sphi":
        return _value(instruction.operands[1 if from_back_edge else 0], values)
    if name == "sld":
        memory, offset = instruction.operands
        index = _value(offset, values)
        return f"load {memory} {index}" if isinstance(index, int) else None
    args = [_value(x, values) for x in instruction.operands]
    if name == "scalar_select":
        condition, on_true, on_false = args
        return None if condition is None else on_true if condition else on_false
    if name in ("smov", "pmov"):
        return args[0]
    if name == "pneg":
        return None if args[0] is None else int(not args[0])
    if len(args) != 2:
        return None
    left, right = args
    if name in ("por", "pand", "pnand") and (left is None) != (right is None):
        known = left if right is None else right  # one operand is enough where it decides
        return None if bool(known) != (name == "por") else int(name != "pand")
    if isinstance(left, str) or isinstance(right, str):
        return _evaluate_loaded(name, instruction.name, left, right)
    if left is None or right is None:
        return None
    if name == "scmp":
        _, relation, kind = instruction.name.split(".")[:3]
        convert = _unsigned if kind == "u32" else _signed
        return int(_COMPARE[relation](convert(left), convert(right)))
    if name in _BINARY:
        return _signed(int(_BINARY[name](left, right)))
    return None


def _evaluate_loaded(name: str, full_name: str, left: _Scalar, right: _Scalar) -> _Scalar:
    """Arithmetic on scalars that were loaded: equal where the address is the same, different elsewhere."""
    if name == "sor" and _NONZERO in (left, right):
        return _NONZERO
    loaded = isinstance(left, str) and isinstance(right, str) and _NONZERO not in (left, right)
    if name == "ssub" and loaded:
        return 0 if left == right else _NONZERO
    if name == "scmp" and full_name.startswith(("scmp.eq", "scmp.ne")):
        if loaded:
            return int((left == right) == full_name.startswith("scmp.eq"))
        if {left, right} == {_NONZERO, 0}:
            return int(full_name.startswith("scmp.ne"))
    return None
