"""Computes as the scalar unit does, on values of which some are not known."""

import dataclasses
import enum
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from offline_tpu.schedule.bundles import CORE_ID, LOAD, OPERAND, PHI, STORE, Instruction

#: Key, among the operands of an op, of the words that its vector unit writes to a table in SMEM: no scalar code says
#: what they are. The op finds the table at an address that it loads from a table of addresses.
SMEM_TABLE = -1
_ADDRESS = "address in "

_INT32, _HALF = 2**32, 2**31


class Flag(NamedTuple):
    """A sync flag: number 1 of "[#allocation7]" is "[#allocation7 + $0x1]". is_shared: each core's of that name."""

    allocation: str
    number: int
    is_shared: bool = False


@dataclasses.dataclass(frozen=True)
class Pointer:
    """An address: its memory and what it is in (an allocation, "operand N" of the op, where it was loaded from); None
    where not known. `offset`: in words, of an address in SMEM."""

    space: str | None
    name: str | None
    offset: int | None = 0


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A word loaded from an SMEM address whose content is not known."""

    name: str | None
    index: int


class _Difference(enum.Enum):
    NONZERO = "of two Loaded from different addresses"


Scalar = int | Flag | Pointer | Loaded | _Difference | None
#: Runs one instruction; told whether phis of its bundle have their second value.
Step = Callable[[bool], None]

_Binary = Callable[[int, int], int]


def _signed(value: int) -> int:
    value &= _INT32 - 1
    return value - _INT32 if value >= _INT32 // 2 else value


def _unsigned(value: int) -> int:
    return value & (_INT32 - 1)


_MOVES = ("smov", "pmov", "reloc")
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
    "smulhi": lambda a, b: (_unsigned(a) * _unsigned(b)) >> 32,
    "sdiv": lambda a, b: _unsigned(a) // _unsigned(b) if b else 0,
    "srem": lambda a, b: _unsigned(a) % _unsigned(b) if b else 0,
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


def _operation(full_name: str) -> _Binary | None:
    """Return the operation on two integers; None for what is not that simple. The result may be wider than 32 bits."""
    name, _, kind = full_name.partition(".")
    if name != "scmp":
        return _BINARY.get(name)
    relation, _, kind = kind.partition(".")
    compare = _COMPARE[relation]
    convert = _unsigned if kind.startswith("u32") else _signed
    return lambda a, b: int(compare(convert(a), convert(b)))


@functools.cache
def _named_flag(name: str) -> Flag:
    allocation, _, offset = name.partition(" + ")
    return Flag(allocation, int(offset.lstrip("$"), 16) if offset else 0)


class Scalars:
    """The scalar registers and SMEM of a core.

    Args:
      operands: by index, the words of the op's operands that the caller knows. core: which of a chip's it is.
    """

    def __init__(self, operands: Mapping[int, Sequence[int]], core: int = 0) -> None:
        self._operands = operands
        self._values: dict[str, Scalar] = {CORE_ID: core}
        self._memory: dict[str, dict[int, Scalar]] = {}
        self._table: dict[int, Scalar] = dict(enumerate(operands.get(SMEM_TABLE, ())))

    def value(self, operand: str | int) -> Scalar:
        """Return the value of a register, a spill slot, a constant, or an allocation named directly."""
        if isinstance(operand, int):
            return operand
        if operand.startswith("[#allocation") and not operand.endswith("_spill]"):
            return Pointer(None, operand[1:-1])
        return self._values.get(operand)

    def flag(self, operand: str | int) -> Flag | None:
        """Return the sync flag that an operand stands for; None where that is not known."""
        value = self.value(operand)
        if isinstance(value, Pointer) and value.name is not None:
            return _named_flag(value.name)
        return value._replace(is_shared=False) if isinstance(value, Flag) else None

    def holds(self, instruction: Instruction) -> bool | None:
        """Return whether the instruction's predicate lets it run; None where that is not known."""
        if instruction.predicate is None:
            return True
        condition = self._values.get(instruction.predicate)
        return None if condition is None else bool(condition) != instruction.predicate_negated

    def step(self, instruction: Instruction) -> Step:
        """Return what runs an instruction that makes a scalar or a predicate; it is told which value phis have.

        Most of an op's instructions are moves, phis and arithmetic on two integers, and run some hundred thousand
        times: for these the step is a closure that looks at nothing twice. The rest goes to `assign`.
        """
        values, result = self._values, instruction.result
        get, predicate, negated = values.get, instruction.predicate, instruction.predicate_negated
        name, operands = instruction.name.partition(".")[0], instruction.operands
        operation = _operation(instruction.name)

        def general(second_phi: bool) -> None:
            self.assign(instruction, second_phi)

        if result is None or name == OPERAND:
            return general
        if name == PHI:
            entered, repeated = map(self._known_name, operands)

            def phi(second_phi: bool) -> None:
                values[result] = get(repeated if second_phi else entered)

            return phi if predicate is None else general
        if name in _MOVES:
            source = self._known_name(operands[0])

            def move(second_phi: bool) -> None:
                if predicate is None or ((condition := get(predicate)) is not None and bool(condition) != negated):
                    values[result] = get(source)
                else:
                    general(second_phi)

            return move
        if operation is None or len(operands) != 2:
            return general
        left, right = map(self._known_name, operands)

        def arithmetic(second_phi: bool) -> None:
            if predicate is not None and ((condition := get(predicate)) is None or bool(condition) == negated):
                general(second_phi)
                return
            a, b = get(left), get(right)
            if type(a) is int and type(b) is int:
                value = operation(a, b)
                values[result] = value if -_HALF <= value < _HALF else _signed(value)
            else:
                values[result] = _binary(name, instruction.name, a, b)

        return arithmetic

    def _known_name(self, operand: str | int) -> str:
        """Return a name that has the operand's value: its own, or one for a constant."""
        if isinstance(operand, str) and self.value(operand) is None:
            return operand
        name = f"constant {operand}"
        self._values[name] = self.value(operand)
        return name

    def copy_to_smem(self, source: Scalar, destination: Scalar, word_count: int) -> None:
        """Fill an allocation in SMEM, as a DMA does. What a DMA takes of only a part of an operand is not known."""
        if isinstance(destination, Pointer) and destination.name is not None:
            self._memory.pop(destination.name, None)
            if isinstance(source, Pointer) and source.name is not None and destination.offset is not None:
                words = self._operands.get(_operand_index(source.name))
                if words is not None and len(words) <= word_count:
                    self._memory[destination.name] = dict(enumerate(words, destination.offset))

    def assign(self, instruction: Instruction, second_phi: bool) -> None:
        """Run one instruction that makes a scalar or a predicate, or stores one."""
        if instruction.result is None:
            return
        if instruction.name == STORE:
            self._store(instruction)
            return
        runs = self.holds(instruction)
        if runs is None:
            value: Scalar = None
        elif not runs:
            value = None if instruction.otherwise is None else self.value(instruction.otherwise)
        else:
            value = self._evaluate(instruction, second_phi)
        self._values[instruction.result] = value

    def _evaluate(self, instruction: Instruction, second_phi: bool) -> Scalar:
        name, _, kind = instruction.name.partition(".")
        if name == PHI:
            return self.value(instruction.operands[1 if second_phi else 0])
        if name == OPERAND:
            return self._operand(instruction)
        args = [self.value(x) for x in instruction.operands]
        if name == LOAD:
            return self._load(args[0], args[1])
        if name in ("scalar_lea", "int_to_ptr"):
            if kind == "sflag":
                return self._flag_at(instruction, args)
            return _address(name, kind, args)
        if name == "scalar_select":
            condition, on_true, on_false = args
            return None if condition is None else on_true if condition else on_false
        if name in _MOVES:
            return args[0]
        if name == "pneg":
            return None if args[0] is None else int(not args[0])
        if len(args) != 2:
            return None
        return _binary(name, instruction.name, args[0], args[1])

    def _operand(self, instruction: Instruction) -> Scalar:
        index = instruction.operands[0]
        assert isinstance(index, int)
        if instruction.spaces[0] is None:  # the scalar itself, not its address
            words = self._operands.get(index)
            return words[0] if words else None
        return Pointer(instruction.spaces[0], f"operand {index}")

    def _load(self, base: Scalar, index: Scalar) -> Scalar:
        if not isinstance(index, int) or not isinstance(base, Pointer):
            return None
        if base.offset is None:
            return None
        words = self._memory.get(base.name) if base.name is not None else None
        if self._table and base.name is not None and base.name.startswith(_ADDRESS * 2):
            words = self._table
        return Loaded(base.name, base.offset + index) if words is None else words.get(base.offset + index)

    def _store(self, instruction: Instruction) -> None:
        """Write a word to an allocation; where it is not known which, forget what was there."""
        runs = self.holds(instruction)
        if runs is False:
            return
        value, index = map(self.value, instruction.operands)
        name = str(instruction.result)[1:-1]
        if runs is None or not isinstance(index, int):
            self._memory.pop(name, None)
        else:
            self._memory.setdefault(name, {})[index] = value

    def _flag_at(self, instruction: Instruction, args: list[Scalar]) -> Flag | None:
        base = self.flag(instruction.operands[0])
        index = args[1] if len(args) > 1 else 0
        if base is None or not isinstance(index, int):
            return None
        return Flag(base.allocation, base.number + index)


def _address(name: str, space: str, args: list[Scalar]) -> Pointer:
    """Return the address that an instruction computes from another one, or from a loaded word."""
    base = next((arg for arg in args if isinstance(arg, Pointer)), None)
    if space != "smem":
        return Pointer(space, base.name if base else None)
    if base is None:
        loaded = args[0]
        return Pointer(space, _ADDRESS + loaded.name if isinstance(loaded, Loaded) and loaded.name else None)
    steps = [arg for arg in args if arg is not base]
    known = base.offset is not None and all(isinstance(step, int) for step in steps)
    return Pointer(space, base.name, sum(steps, base.offset) if known else None)  # type: ignore[arg-type]


def _operand_index(name: str) -> int:
    return int(name.removeprefix("operand ")) if name.startswith("operand ") else -1


def _binary(name: str, full_name: str, left: Scalar, right: Scalar) -> Scalar:
    if name in ("por", "pand", "pnand") and (left is None) != (right is None):
        known = left if right is None else right  # one operand is enough where it decides
        return None if bool(known) != (name == "por") else int(name != "pand")
    if isinstance(left, int) and isinstance(right, int):
        operation = _operation(full_name)
        return None if operation is None else _signed(operation(left, right))
    if name == "ssub" and isinstance(left, Pointer) and isinstance(right, Pointer):
        return _distance(left, right)
    if name == "sor" and (flag := next((side for side in (left, right) if isinstance(side, Flag)), None)):
        return flag._replace(is_shared=True)  # the other core's is in the upper half
    for pointer in (left, right):
        if isinstance(pointer, Pointer):
            return pointer if name in ("sshll", "sadd") else None  # an address in another unit, or an offset
    return _on_loaded(name, full_name, left, right)


def _distance(left: Pointer, right: Pointer) -> int | None:
    """Return how far apart two addresses in one allocation are, in the units of its memory."""
    if left.space or right.space or left.name is None or right.name is None:  # computed: only named ones are exact
        return None
    ends = _named_flag(left.name), _named_flag(right.name)
    return ends[0].number - ends[1].number if ends[0].allocation == ends[1].allocation else None


def _on_loaded(name: str, full_name: str, left: Scalar, right: Scalar) -> Scalar:
    """Compare scalars that were loaded: equal where their address is the same, and assumed different elsewhere."""
    loaded = isinstance(left, Loaded) and isinstance(right, Loaded)
    if name == "ssub" and loaded:
        return 0 if left == right else _Difference.NONZERO
    if name == "sor" and _Difference.NONZERO in (left, right):
        return _Difference.NONZERO
    if name == "scmp" and full_name.startswith(("scmp.eq", "scmp.ne")):
        wants_equal = full_name.startswith("scmp.eq")
        if loaded:
            return int((left == right) == wants_equal)
        if {left, right} == {_Difference.NONZERO, 0}:
            return int(not wants_equal)
    return None
