"""Find results that a Pallas kernel leaves partly unwritten, which a check of smaller sizes does not see."""

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental import pallas as pl
from jax.extend import core

#: What hands on a kernel's result as it is.
_SHAPE_ONLY = frozenset({"reshape", "transpose", "squeeze", "broadcast_in_dim", "convert_element_type", "copy"})
#: Grids of more steps are not followed.
_MOST_STEPS = 2**20


def unwritten(traced: core.ClosedJaxpr) -> list[str]:
    """Return what a program's kernels do not write of its results, in words.

    Only results that are a kernel's own, reshaped or converted at most, and whose blocks depend on the grid alone; of
    others nothing is said.
    """
    return _follow(traced.jaxpr, range(len(traced.jaxpr.outvars)))[0]


def _follow(jaxpr: core.Jaxpr, positions: Iterable[int]) -> tuple[list[str], list[int]]:
    """Return what is not written of some results, and which arguments they are, reshaped at most, by position."""
    wanted = {jaxpr.outvars[position] for position in positions if isinstance(jaxpr.outvars[position], core.Var)}
    found: list[str] = []
    for eqn in reversed(jaxpr.eqns):
        of_it = [position for position, variable in enumerate(eqn.outvars) if variable in wanted]
        if not of_it:
            continue
        if eqn.primitive.name == "pallas_call":
            found += _of_kernel(eqn, of_it)
        elif eqn.primitive.name in _SHAPE_ONLY:
            wanted |= {variable for variable in eqn.invars if isinstance(variable, core.Var)}
        elif (body := _body(eqn)) is not None:
            inner, reached = _follow(body, of_it)
            found += inner
            wanted |= {x for position in reached if isinstance(x := eqn.invars[position], core.Var)}
    return found, [position for position, variable in enumerate(jaxpr.invars) if variable in wanted]


def _body(eqn: core.JaxprEqn) -> core.Jaxpr | None:
    """Return the program that an equation stands for, such as jit's."""
    values = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
    bodies = [value for value in values if isinstance(value, core.Jaxpr)]
    alike = len(bodies) == 1 and len(bodies[0].outvars) == len(eqn.outvars) and len(bodies[0].invars) == len(eqn.invars)
    return bodies[0] if alike and eqn.primitive.name not in ("while", "scan") else None


def _of_kernel(eqn: core.JaxprEqn, positions: Iterable[int]) -> list[str]:
    grid_mapping = eqn.params["grid_mapping"]
    continued = {result for _, result in eqn.params["input_output_aliases"]}
    blocks = list(grid_mapping.block_mappings_output)
    found = []
    for position in positions:
        counts = None if position in continued else _blocks_written(blocks[position], grid_mapping.grid)
        if counts is not None and counts[0] < counts[1]:
            found.append(f"{counts[0]} of the {counts[1]} blocks of {eqn.outvars[position].aval.str_short()}")
    return found


def _blocks_written(mapping: Any, grid: tuple[Any, ...]) -> tuple[int, int] | None:
    """Return how many blocks of a result are written, and how many it has; None where that is not known."""
    closed, shape = mapping.index_map_jaxpr, mapping.array_aval.shape
    sizes = [1 if isinstance(b, pl.Squeezed) else getattr(b, "block_size", None) for b in mapping.block_shape]
    blocked = all(isinstance(b, pl.Blocked | pl.Squeezed) for b in mapping.block_shape)
    known = all(isinstance(size, int) for size in grid) and len(grid) > 0 and math.prod(grid) <= _MOST_STEPS
    if not shape or not blocked or not known:
        return None
    prefetched = set(closed.jaxpr.invars[len(grid) :])
    used = {x for eqn in closed.jaxpr.eqns for x in eqn.invars if isinstance(x, core.Var)}
    if prefetched & (used | {x for x in closed.jaxpr.outvars if isinstance(x, core.Var)}):
        return None
    counts = [-(-length // size) for length, size in zip(shape, sizes, strict=True)]
    steps = np.indices(grid, np.int32).reshape(len(grid), -1)
    index_map = core.jaxpr_as_fun(closed)

    def block_of(*ids: Any) -> list[Any]:
        return index_map(*ids, *[0] * len(prefetched))

    indices = np.stack([np.asarray(x) for x in jax.vmap(block_of)(*steps)], axis=-1)
    inside = indices[((indices >= 0) & (indices < counts)).all(axis=-1)]
    return len(np.unique(inside, axis=0)), math.prod(counts)
