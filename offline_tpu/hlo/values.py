"""Evaluates integers that scheduled HLO fixes at compile time: operands of kernels, trip counts of loops."""

import math
from collections.abc import Callable, Sequence

from offline_tpu.hlo.module import HloModule, HloOp, PrimitiveType

_MAX_TRIPS = 1_000_000
_MAX_WORDS = 1 << 20
_COPIES = ("copy", "copy-start", "copy-done", "bitcast")
_PASS_THROUGH = (*_COPIES, "convert", "reshape", "optimization-barrier", "broadcast")
_TRACED = ("fusion", "call", "compare", "get-tuple-element", "tuple")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "minimum": min,
    "maximum": max,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
}

#: Elements of a loop's state, or parameters of a fusion; None where not known.
Environment = Sequence[int | None]


def source(module: HloModule, computation: str, op: HloOp) -> HloOp:
    """Return the op whose result an op copies, through any number of copies."""
    while op.opcode in _COPIES and op.operands:
        op = module.op(computation, op.operands[0])
    return op


def constant_words(module: HloModule, computation: str, op: HloOp) -> tuple[int, ...] | None:
    """Return the 32-bit words of a constant or a broadcast one, through copies; None of another op."""
    op = source(module, computation, op)
    if op.shape.element_type not in (PrimitiveType.S32, PrimitiveType.U32):
        return None
    count = math.prod(op.shape.dimensions)
    if op.opcode == "broadcast" and count <= _MAX_WORDS:
        words = constant_words(module, computation, module.op(computation, op.operands[0]))
        return words * count if words is not None and len(words) == 1 else None
    return op.values if op.values is not None and len(op.values) <= _MAX_WORDS else None


def trip_count(module: HloModule, computation: str, loop: HloOp, environment: Environment) -> int | None:
    """Return how often the body of a `while` op runs, by running its counter; None where that depends on data.

    Args:
      environment: state of the loop that `computation` is the body of, as far as it is known; () outside of one.
    """
    body, condition = loop.called
    state = initial_state(module, computation, loop, environment)
    root = module.root(body)
    needed = _needed(module, condition, body, root)
    for trips in range(_MAX_TRIPS):
        proceed = evaluate(module, condition, module.root(condition), state)
        if proceed is None:
            return None
        if not proceed:
            return trips
        state = [
            evaluate(module, body, module.op(body, root.operands[i]), state) if i in needed else None
            for i in range(len(state))
        ]
    return None


def initial_state(module: HloModule, computation: str, loop: HloOp, environment: Environment) -> list[int | None]:
    """Return the state that a `while` op starts with."""
    source = module.op(computation, loop.operands[0])
    if source.opcode != "tuple":
        return [None] * len(loop.shape.tuple_shapes)
    return [evaluate(module, computation, module.op(computation, name), environment) for name in source.operands]


def invariant_state(module: HloModule, computation: str, loop: HloOp, environment: Environment) -> list[int | None]:
    """Return the elements of a loop's state that every trip leaves as they were."""
    body, _ = loop.called
    root = module.root(body)
    if root.opcode != "tuple":
        return []
    state = initial_state(module, computation, loop, environment)
    return [value if _is_element(module, body, root.operands[i], i) else None for i, value in enumerate(state)]


def evaluate(module: HloModule, computation: str, op: HloOp, environment: Environment) -> int | None:
    """Return a scalar integer; None where it depends on data."""
    if op.opcode == "constant":
        return op.values[0] if op.values is not None and len(op.values) == 1 else None
    if op.opcode == "get-tuple-element":
        source = module.op(computation, op.operands[0])
        index = op.proto.tuple_index
        if source.opcode == "parameter":
            return environment[index] if index < len(environment) else None
        return (
            evaluate(module, computation, module.op(computation, source.operands[index]), environment)
            if (source.opcode == "tuple")
            else None
        )
    if op.opcode == "parameter":
        index = op.proto.parameter_number
        return environment[index] if index < len(environment) else None
    if op.opcode not in ("fusion", "call", "compare", *_PASS_THROUGH, *_ARITHMETIC):
        return None
    values = [evaluate(module, computation, module.op(computation, name), environment) for name in op.operands]
    if op.opcode in _PASS_THROUGH:
        return values[0]
    if op.opcode in ("fusion", "call"):
        return evaluate(module, op.called[0], module.root(op.called[0]), values)
    left, right = values
    if left is None or right is None:
        return None
    if op.opcode == "compare":
        return int(_COMPARE[op.proto.comparison_direction](left, right))
    return _ARITHMETIC[op.opcode](left, right)


def _is_element(module: HloModule, body: str, name: str, index: int) -> bool:
    op = module.op(body, name)
    return (
        op.opcode == "get-tuple-element"
        and op.proto.tuple_index == index
        and module.op(body, op.operands[0]).opcode == "parameter"
    )


def _needed(module: HloModule, condition: str, body: str, root: HloOp) -> set[int]:
    """Return the elements of the state that the condition depends on, over any number of trips."""
    needed: set[int] = set()
    wanted = _elements_read(module, condition, module.root(condition))
    while wanted - needed:
        needed |= wanted
        wanted = {
            i
            for element in needed
            if element < len(root.operands)
            for i in _elements_read(module, body, module.op(body, root.operands[element]))
        }
    return needed


def _elements_read(module: HloModule, computation: str, op: HloOp) -> set[int]:
    found: set[int] = set()
    stack, seen = [op], {op.name}
    while stack:
        current = stack.pop()
        if current.opcode == "get-tuple-element" and module.op(computation, current.operands[0]).opcode == "parameter":
            found.add(current.proto.tuple_index)
            continue
        if current.opcode not in (*_TRACED, *_PASS_THROUGH, *_ARITHMETIC):
            continue
        for name in current.operands:
            if name not in seen:
                seen.add(name)
                stack.append(module.op(computation, name))
    return found
