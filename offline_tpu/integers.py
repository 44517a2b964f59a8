"""Evaluates the integers that a traced function hands to its Pallas kernels: grid sizes, block indices, group offsets.

Nothing but what they need is computed, op by op on the CPU, from the function's constants and from the arguments that
the caller knows. What depends on anything else is not known.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core

#: Primitives that run one jaxpr on their operands, once.
_CALLS = frozenset(
    "jit pjit closed_call core_call checkpoint remat custom_jvp_call custom_vjp_call custom_vmap_call "  # noqa: SIM905
    "shard_map".split()
)
_BODIES = ("jaxpr", "call_jaxpr", "call")
_MAX_WORDS = 1 << 20

_Words = tuple[int, ...]
_Value = Any  # an array, or None where it is not known


@dataclasses.dataclass(frozen=True)
class Integers:
    """Known 32-bit integers.

    Attributes:
      kernels: by kernel name, then by index of its operand, the operand's words.
      parameters: of the compiled program, by number, their words.
    """

    kernels: Mapping[str, Mapping[int, _Words]] = dataclasses.field(default_factory=dict)
    parameters: Mapping[int, _Words] = dataclasses.field(default_factory=dict)


def find(jaxpr: core.ClosedJaxpr, values: Mapping[int, np.ndarray]) -> Integers:
    """Return the integers that are known of a function.

    Kernels in the body of a loop or in a branch are left out, and operands of kernels of one name that differ.

    Args:
      jaxpr: of the whole function.
      values: known arguments, by position.
    """
    used = {atom for eqn in jaxpr.jaxpr.eqns for atom in eqn.invars if not isinstance(atom, core.Literal)}
    used.update(atom for atom in jaxpr.jaxpr.outvars if not isinstance(atom, core.Literal))
    parameters = [position for position, var in enumerate(jaxpr.jaxpr.invars) if var in used]  # jit drops the others
    return Integers(
        _kernel_words(jaxpr, values),
        {number: _words(values[position]) for number, position in enumerate(parameters) if position in values},
    )


def checked_values(values: Mapping[int, np.ndarray] | None, args: tuple[Any, ...]) -> dict[int, np.ndarray]:
    """Return the values of int32 arguments by their positions in the flattened `args`. Raises ValueError for others."""
    if not isinstance(values, Mapping | None):
        raise ValueError(f"values={values!r:.100}: expected a dict of arrays, by position of the argument.")
    leaves = jax.tree.leaves(args)
    checked = {}
    for position, value in (values or {}).items():
        array = np.asarray(value)
        if position not in range(len(leaves)):
            raise ValueError(f"values={{{position}: ...}}: expected positions below {len(leaves)}, of the arguments.")
        leaf = leaves[position]
        if array.shape != leaf.shape or leaf.dtype != np.int32 or array.dtype.kind not in "iu":
            raise ValueError(
                f"values={{{position}: {array.dtype}{list(array.shape)}}}: expected integers of the shape of an int32 "
                f"argument, and this one is {leaf.dtype}{list(leaf.shape)}."
            )
        checked[position] = array.astype(np.int32)
    return checked


def _words(array: Any) -> _Words:
    return tuple(np.asarray(array).astype(np.int32).ravel().tolist())


def _kernel_words(jaxpr: core.ClosedJaxpr, values: Mapping[int, np.ndarray]) -> dict[str, dict[int, _Words]]:
    known = [values.get(position) for position in range(len(jaxpr.jaxpr.invars))]
    names: list[str] = []

    def compute() -> list[dict[int, jax.Array]]:
        kernels = list(_Frame(jaxpr, known.__getitem__).kernels())
        names.extend(name for name, _ in kernels)
        return [words for _, words in kernels]

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        arrays = jax.jit(compute)()  # one compilation: op by op takes ten times as long
    found: dict[str, dict[int, _Words]] = {}
    for name, by_index in zip(names, arrays, strict=True):
        words = {i: _words(array) for i, array in by_index.items()}
        before = found.setdefault(name, words)
        found[name] = {i: before[i] for i in before.keys() & words.keys() if before[i] == words[i]}
    return found


@dataclasses.dataclass(eq=False)
class _Frame:
    """One run of a jaxpr, whose inputs are asked for by number."""

    closed: Any
    input_value: Callable[[int], _Value]

    def __post_init__(self) -> None:
        jaxpr = getattr(self.closed, "jaxpr", self.closed)  # the body of a shard_map has no constants
        self.jaxpr = jaxpr
        self._values: dict[Any, _Value] = dict(zip(jaxpr.constvars, getattr(self.closed, "consts", ()), strict=True))
        self._inputs = {var: number for number, var in enumerate(jaxpr.invars)}
        self._makers = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
        self._inner: dict[int, _Frame] = {}

    def kernels(self) -> Iterator[tuple[str, dict[int, _Value]]]:
        """Yield the name and the known integer operands of each kernel."""
        for eqn in self.jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                integers = {i: atom for i, atom in enumerate(eqn.invars) if atom.aval.dtype in (np.int32, np.uint32)}
                yield eqn.params["name"], {i: x for i, atom in integers.items() if (x := self._value(atom)) is not None}
            elif eqn.primitive.name in _CALLS:
                yield from self._called(eqn).kernels()

    def _called(self, eqn: Any) -> "_Frame":
        if id(eqn) not in self._inner:
            body = next(eqn.params[name] for name in _BODIES if name in eqn.params)
            invars = getattr(body, "jaxpr", body).invars

            def input_value(number: int) -> _Value:
                whole = eqn.invars[number].aval.shape == invars[number].aval.shape  # of a shard only a part is there
                return self._value(eqn.invars[number]) if whole else None

            self._inner[id(eqn)] = _Frame(body, input_value)
        return self._inner[id(eqn)]

    def _value(self, atom: Any) -> _Value:
        if isinstance(atom, core.Literal):
            return atom.val
        if atom not in self._values:
            self._values[atom] = self._compute(atom)
        return self._values[atom]

    def _compute(self, var: Any) -> _Value:
        if var in self._inputs:
            return self.input_value(self._inputs[var])
        eqn = self._makers[var]
        if eqn.primitive.name in _CALLS:
            inner = self._called(eqn)
            return inner._value(inner.jaxpr.outvars[eqn.outvars.index(var)])
        if eqn.primitive.name == "pallas_call" or eqn.effects or any(out.aval.size > _MAX_WORDS for out in eqn.outvars):
            return None
        args = []
        for atom in eqn.invars:
            if (value := self._value(atom)) is None:
                return None
            args.append(value)
        made = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
        self._values.update(zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True))
        return self._values[var]
