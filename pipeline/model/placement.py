"""Arrays between the host and all devices of all processes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

SPLIT, COPIES = "split", "copies"


def split_mesh(devices: Sequence[jax.Device], size: int) -> Mesh:
    """Return a mesh ("copies", "split") of all devices whose second axis is the longest that divides `size`."""
    split = math.gcd(len(devices), size)
    return Mesh(np.array(devices).reshape(-1, split), (COPIES, SPLIT))


def put(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Place a host array, the same in every process, as one global array. Only the parts of devices here are copied."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def to_host(array: jax.Array) -> np.ndarray:
    """Fetch a whole global array to every process. All processes must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
