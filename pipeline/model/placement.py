"""Arrays between the host and all devices of all processes."""

import math
import pickle
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

SPLIT, COPIES = "split", "copies"
T = TypeVar("T")


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


def from_first_process(data: bytes) -> bytes:
    """Return the bytes that the first process has, on every process. All processes must call it."""
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    padded = np.frombuffer(data[:length].ljust(length, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes() if length else b""


def on_first_process(compute: Callable[[], T]) -> T:
    """Call on the first process only; return there and on all others what it returned, or raise what it raised.

    All processes must call it. What is returned must be something that can be pickled: it comes from a process of the
    same job, which runs the same program.
    """
    if jax.process_count() == 1:
        return compute()
    outcome: tuple[T | None, Exception | None] = None, None
    if jax.process_index() == 0:
        try:
            outcome = compute(), None
        except Exception as error:
            outcome = None, error
    result, failure = pickle.loads(from_first_process(pickle.dumps(outcome)))
    if failure is not None:
        raise failure
    return result
