"""Arrays between the host and all devices of all processes."""

import abc
import collections
import dataclasses
import functools
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

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


#: Smaller arrays are read whole by every process: exchanging one takes longer than reading it.
_SHARED_BYTES = 2**20
#: What one thread reads at a time, how many threads do, and how many bytes are read before those before are placed.
_PIECE_BYTES, _READERS, _AHEAD_BYTES = 2**24, 8, 2**30
_ALIGNMENT = 64  # bytes; JAX on a CPU uses an array that is so aligned where it lies, without a copy
_arrays_read = 0


class Rows(Protocol):
    """A weight that is read in parts along one axis, from any thread.

    axis: which. divisible: whether a part takes no more work than its share.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def axis(self) -> int: ...
    @property
    def divisible(self) -> bool: ...
    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write the part from start to stop along the axis to `out`: contiguous where the axis is the first."""


@dataclasses.dataclass(frozen=True)
class Changed(abc.ABC):
    """A weight that is read as another one, of the same shape and dtype, by rows: a base of `Rows`."""

    weight: Rows
    axis = 0

    @property
    def divisible(self) -> bool:
        return self.weight.divisible

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weight.dtype

    @abc.abstractmethod
    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write rows to `out`."""


@dataclasses.dataclass(frozen=True)
class Stacked:
    """Weights of one shape as one, behind a leading axis."""

    layers: Sequence[Rows]


def read_whole(weight: Rows) -> np.ndarray:
    """Read all of a weight to the host."""
    out = _empty(weight.shape, weight.dtype)
    weight.read(0, weight.shape[weight.axis] if weight.shape else 1, out)
    return out


def place_all(weights: Iterable[tuple[str, Rows | Stacked, NamedSharding]]) -> Iterator[tuple[str, jax.Array]]:
    """Read weights and place each as one global array, in order. All processes must call it, with the same weights.

    Each process reads what `reading_route` says, straight into what becomes its devices' arrays; devices exchange
    the rest. The next weights are read meanwhile. Raises whatever `Rows.read` raises.
    """
    ahead: collections.deque[tuple[str, _Reading]] = collections.deque()
    pool = ThreadPoolExecutor(_READERS, "read")
    try:
        for name, weight, sharding in weights:
            ahead.append((name, _Reading(weight, sharding, pool)))
            while len(ahead) > 1 and sum(reading.nbytes for _, reading in ahead) > _AHEAD_BYTES:
                yield _place_first(ahead)
        while ahead:
            yield _place_first(ahead)
    finally:
        pool.shutdown(cancel_futures=True)


def _place_first(ahead: "collections.deque[tuple[str, _Reading]]") -> tuple[str, jax.Array]:
    name, reading = ahead.popleft()
    return name, reading.place()  # what was read is freed, where it is not the array itself


def arrays_read() -> int:
    """Return how many arrays this process has read its part of; where others have more, they may wait for it."""
    return _arrays_read


def reading_route(
    shape: Sequence[int], nbytes: int, axes: Sequence[int], sharding: NamedSharding
) -> tuple[NamedSharding, ...]:
    """Return how an array is split over the devices while it is read, then after each exchange; last as `sharding`.

    axes: those along which it can be read in parts. All processes together read the fewest bytes that such splits
    allow. There is no exchange where that gains nothing: with one process, where processes need different parts anyway,
    and for a small array.
    """
    devices: Any = sharding.mesh.devices.ravel()
    if nbytes < _SHARED_BYTES or len({device.process_index for device in devices}) == 1:
        return (sharding,)
    routes: list[tuple[NamedSharding, ...]] = [(sharding,)]
    for axis in axes:
        taken = [name for other, names in enumerate(_spec(sharding, shape)) if other != axis for name in names]
        free = [name for name in sharding.mesh.axis_names if name not in taken]
        moved = _split_by(sharding, shape, axis, taken)
        routes += [(_split_by(sharding, shape, axis, free), sharding)]
        routes += [(_split_by(moved, shape, axis, free), moved, sharding)]

    def rows_read(route: tuple[NamedSharding, ...]) -> int:
        indices: Mapping[Any, Any] = route[0].devices_indices_map(tuple(shape))
        parts = {
            (device.process_index, *(_bounds(index[axis], shape[axis]) for axis in axes))
            for device, index in indices.items()
        }
        return sum(math.prod(stop - start for start, stop in part[1:]) for part in parts)

    return min(routes, key=rows_read)


def _split_by(sharding: NamedSharding, shape: Sequence[int], axis: int, names: Iterable[str]) -> NamedSharding:
    """Return a sharding with one axis of an array split further, by those of these axes of the mesh that divide it.

    Behind those that split it already: to come back, devices gather the parts of one of theirs only.
    """
    spec, mesh = _spec(sharding, shape), sharding.mesh
    for name in names:
        if name not in spec[axis] and shape[axis] % math.prod(mesh.shape[each] for each in (*spec[axis], name)) == 0:
            spec = [tuple(each for each in by if each != name) for by in spec]
            spec[axis] = (*spec[axis], name)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _spec(sharding: NamedSharding, shape: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the axes of the mesh that split each axis of an array."""
    spec = [(names,) if isinstance(names, str) else tuple(names or ()) for names in sharding.spec]
    return [*spec, *[()] * (len(shape) - len(spec))]


class _Reading:
    """One array that is being read."""

    def __init__(self, weight: Rows | Stacked, sharding: NamedSharding, pool: ThreadPoolExecutor):
        layers = weight.layers if isinstance(weight, Stacked) else [weight]
        first, stacked = layers[0], isinstance(weight, Stacked)
        self._shape = (len(layers), *first.shape) if stacked else first.shape
        nbytes = math.prod(self._shape) * first.dtype.itemsize
        axes = [1 + first.axis, 0] if stacked else [first.axis]
        self._route = reading_route(self._shape, nbytes, axes, sharding)
        indices = self._route[0].addressable_devices_indices_map(self._shape)
        self._part_of = {device: self._bounds_of(index) for device, index in indices.items()}
        parts = list(dict.fromkeys(self._part_of.values()))
        shapes = [tuple(stop - start for start, stop in part) for part in parts]
        self._parts = dict(zip(parts, _empty_side_by_side(shapes, first.dtype), strict=True))
        self.nbytes = sum(part.nbytes for part in self._parts.values())
        self._pieces: list[Future[None]] = []
        for number, layer in enumerate(layers):
            takers = []
            for bounds, out in self._parts.items():
                if not stacked:
                    takers.append(_Taker(bounds, out))
                elif bounds[0][0] <= number < bounds[0][1]:
                    takers.append(_Taker(bounds[1:], out[number - bounds[0][0]]))
            self._pieces += [pool.submit(_read, layer, *rows, takers) for rows in _pieces(layer, takers)]

    def _bounds_of(self, index: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...]:
        assert index is not None
        return tuple(map(_bounds, index, self._shape))

    def place(self) -> jax.Array:
        """Wait for it, and return the array where it is wanted."""
        global _arrays_read
        for piece in self._pieces:
            piece.result()
        _arrays_read += 1
        arrays = [jax.device_put(self._parts[part], device) for device, part in self._part_of.items()]
        array = jax.make_array_from_single_device_arrays(self._shape, self._route[0], arrays)
        return jax.block_until_ready(_exchange(self._route)(array) if len(self._route) > 1 else array)


@dataclasses.dataclass(frozen=True)
class _Taker:
    """An array on the host that gets a part of a weight. bounds: of the part, along each axis."""

    bounds: Sequence[tuple[int, int]]
    out: np.ndarray


def _pieces(layer: Rows, takers: Sequence[_Taker]) -> Iterator[tuple[int, int]]:
    """Yield the ranges along a weight's axis to read one by one, for all of its takers."""
    ranges = sorted({taker.bounds[layer.axis] for taker in takers})
    if not layer.divisible and ranges:
        ranges, step = [(ranges[0][0], ranges[-1][1])], layer.shape[layer.axis]
    else:
        row_bytes = math.prod(layer.shape) // layer.shape[layer.axis] * layer.dtype.itemsize
        step = 1 << max(0, (_PIECE_BYTES // row_bytes).bit_length() - 1)  # a power of two: whole heads
    for start, stop in ranges:
        yield from ((piece, min(piece + step, stop)) for piece in range(start, stop, step))


def _read(layer: Rows, start: int, stop: int, takers: Sequence[_Taker]) -> None:
    """Read a range along a weight's axis once: straight to the only taker, where it takes whole rows, or to all."""
    axis, shape = layer.axis, layer.shape
    before = (slice(None),) * axis
    found: list[tuple[_Taker, int, int]] = []
    for taker in takers:
        first, last = taker.bounds[axis]
        if max(first, start) < min(last, stop):
            found.append((taker, max(first, start), min(last, stop)))
    (taker, low, high), *others = found
    columns = [(0, size) for size in shape]
    columns[axis] = taker.bounds[axis]
    if not others and (low, high) == (start, stop) and list(taker.bounds) == columns:
        layer.read(start, stop, taker.out[*before, low - columns[axis][0] : high - columns[axis][0]])
        return
    values = _empty((*shape[:axis], stop - start, *shape[axis + 1 :]), layer.dtype)
    layer.read(start, stop, values)
    for taker, low, high in found:
        part = [slice(*bounds) for bounds in taker.bounds]
        part[axis] = slice(low - start, high - start)
        first = taker.bounds[axis][0]
        taker.out[*before, low - first : high - first] = values[*part]


def _bounds(part: slice, size: int) -> tuple[int, int]:
    start, stop, _ = part.indices(size)
    return start, stop


def _empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """Return an array of any content, so aligned that JAX on a CPU takes it without a copy."""
    (array,) = _empty_side_by_side([shape], dtype)
    return array


def _empty_side_by_side(shapes: Sequence[Sequence[int]], dtype: Any) -> Iterator[np.ndarray]:
    """Yield such arrays, in one piece of memory: of many pieces few pages would be huge."""
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape in shapes]
    room = np.empty(sum(size + _ALIGNMENT for size in sizes), np.uint8)
    start = 0
    for shape, size in zip(shapes, sizes, strict=True):
        start += -(room.ctypes.data + start) % _ALIGNMENT
        yield room[start : start + size].view(dtype).reshape(shape)
        start += size


@functools.cache
def _exchange(route: Sequence[NamedSharding]) -> Any:
    """Return a program that exchanges the parts of an array between devices."""

    def exchange(array: jax.Array) -> jax.Array:
        for sharding in route[1:]:
            array = jax.lax.with_sharding_constraint(array, sharding)
        return array

    return jax.jit(exchange, out_shardings=route[-1])
