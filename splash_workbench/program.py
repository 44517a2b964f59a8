"""Describes a program apart from its data: what is compiled, predicted, or run with random data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Program:
    """A function and the arrays that it is called with.

    Attributes:
      jitted: under jit.
      arguments: a tree for each argument: ShapeDtypeStructs, with shardings where there is a mesh, or arrays where the
        values count.
      mesh: to be set while it is traced; None for one device.
      carried: donated argument -> the place of its successor in what the program returns.
      scale: deviation of random floating-point data with which it gives finite results.
    """

    jitted: Any
    arguments: tuple[Any, ...]
    mesh: Mesh | None = None
    carried: Mapping[int, int] = dataclasses.field(default_factory=dict)
    scale: float = 1.0
