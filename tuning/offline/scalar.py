"""Arithmetic of the scalar unit, on values of which some are not known."""

import operator
from collections.abc import Callable

from tuning.offline.bundles import LOAD, PHI, Instruction

_INT32 = 2**32

#: A scalar: an int; a string for one loaded from a known SMEM address ("load ..."), for a difference of two such
#: (_NONZERO), or for a sync flag ("flag ..."); None where nothing is known.
Scalar = int | str | None
_NONZERO = "nonzero"
_FLAG = "flag "
Values = dict[str | int, Scalar]


def signed(value: int) -> int:
    """As the unit's 32-bit registers hold it."""
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


def value_of(operand: str | int, values: Values) -> Scalar:
    """Of a register, a constant or a sync flag named directly."""
    if isinstance(operand, int):
        return operand
    if operand.startswith("[#allocation") and "_spill" not in operand:
        return _flag(operand)
    return values.get(operand)


def is_flag(value: Scalar) -> bool:
    """Whether the value names a sync flag."""
    return isinstance(value, str) and value.startswith(_FLAG)


def holds(instruction: Instruction, values: Values) -> bool | None:
    """Whether the instruction's predicate lets it run; None where that is not known."""
    if instruction.predicate is None:
        return True
    condition = values.get(instruction.predicate)
    return None if condition is None else bool(condition) != instruction.predicate_negated


def assign(instruction: Instruction, values: Values, from_back_edge: bool) -> None:
    """Runs one instruction that makes a scalar or a predicate."""
    if instruction.result is None:
        return
    runs = holds(instruction, values)
    if runs is None:
        values[instruction.result] = None
    elif not runs:
        otherwise = instruction.otherwise
        values[instruction.result] = None if otherwise is None else value_of(otherwise, values)
    else:
        values[instruction.result] = _evaluate(instruction, values, from_back_edge)


def _evaluate(instruction: Instruction, values: Values, from_back_edge: bool) -> Scalar:
    name = instruction.name.split(".")[0]
    if name == PHI:
        return value_of(instruction.operands[1 if from_back_edge else 0], values)
    if name == LOAD:
        memory, offset = instruction.operands
        index = value_of(offset, values)
        return f"load {memory} {index}" if isinstance(index, int) else None
    if instruction.name == "scalar_lea.sflag":
        return _flag_at(instruction, values)
    args = [value_of(x, values) for x in instruction.operands]
    if name == "scalar_select":
        condition, on_true, on_false = args
        return None if condition is None else on_true if condition else on_false
    if name in ("smov", "pmov"):
        return args[0]
    if name == "pneg":
        return None if args[0] is None else int(not args[0])
    if len(args) != 2:
        return None
    return _binary(name, instruction.name, args[0], args[1])


def _binary(name: str, full_name: str, left: Scalar, right: Scalar) -> Scalar:
    if name in ("por", "pand", "pnand") and (left is None) != (right is None):
        known = left if right is None else right  # one operand is enough where it decides
        return None if bool(known) != (name == "por") else int(name != "pand")
    if isinstance(left, str) or isinstance(right, str):
        return _on_loaded(name, full_name, left, right)
    if left is None or right is None:
        return None
    if name == "scmp":
        _, relation, kind = full_name.split(".")[:3]
        convert = _unsigned if kind == "u32" else signed
        return int(_COMPARE[relation](convert(left), convert(right)))
    if name in _BINARY:
        return signed(int(_BINARY[name](left, right)))
    return None


def _on_loaded(name: str, full_name: str, left: Scalar, right: Scalar) -> Scalar:
    """Scalars that were loaded are equal where their address is the same, and assumed different elsewhere."""
    if is_flag(left) or is_flag(right):
        return None
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


def _flag(name: str, index: int = 0) -> str:
    """A flag by allocation and index: "[#allocation7 + $0x1]" and index 1 of "[#allocation7]" are the same."""
    allocation, _, offset = name.strip("[]").partition(" + ")
    return f"{_FLAG}{allocation} {index + (int(offset.lstrip('$'), 16) if offset else 0)}"


def _flag_at(instruction: Instruction, values: Values) -> Scalar:
    base = instruction.operands[0]
    index = value_of(instruction.operands[1], values)
    if not isinstance(index, int):
        return None
    if isinstance(base, str) and base.startswith("["):
        return _flag(base, index)
    pointer = value_of(base, values)
    if not is_flag(pointer):
        return None
    assert isinstance(pointer, str)
    _, allocation, offset = pointer.split(" ")
    return f"{_FLAG}{allocation} {int(offset) + index}"
