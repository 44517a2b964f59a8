"""Weights where they lie, in files of safetensors: each is read in parts, by rows, from any thread.

All weights that go to devices are read here, and their bytes counted.
"""

import contextlib
import dataclasses
import json
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkpoints.weight_files import open_weights
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.requests.errors import CheckpointError

#: The names of dtypes in a file's header.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: Work that takes all cores by itself is done for one weight at a time.
ONE_AT_A_TIME = threading.Lock()


@dataclasses.dataclass
class Reads:
    """Bytes that this process has read from storage, and those of all weights that it has opened."""

    read_bytes: int = 0
    stored_bytes: int = 0


_reads, _lock = Reads(), threading.Lock()


def reads_so_far() -> Reads:
    """Return the bytes that this process has read by now."""
    with _lock:
        return dataclasses.replace(_reads)


def _count(read_bytes: int = 0, stored_bytes: int = 0) -> None:
    with _lock:
        _reads.read_bytes += read_bytes
        _reads.stored_bytes += stored_bytes


def dtype_of(stored: str, wanted: torch.dtype, weight: str) -> torch.dtype:
    """Return the dtype of this name in a file's header. weight: begins the message of CheckpointError.

    Raises CheckpointError where it cannot become the dtype wanted: of numbers of no floating point the scales are lost.
    """
    fits = {
        name: dtype
        for name, dtype in _DTYPES.items()
        if dtype == wanted or (dtype.is_floating_point and wanted.is_floating_point)
    }
    if stored in fits:
        return fits[stored]
    expected = f"expected {'a floating one, ' if wanted.is_floating_point else ''}{', '.join(fits)}"
    raise CheckpointError(
        f"{weight} has dtype {stored}, {expected}; of int8 weights only those that python -m pipeline.quantize makes "
        "run here, as transformer=FILE"
    )


class StoredFile:
    """An open file of safetensors, for any thread. where: begins the messages of CheckpointError."""

    def __init__(self, path: Path, where: str, descriptor: int):
        self._name, self._descriptor = f"{where}{path.name}", descriptor
        self._begin = 8 + int.from_bytes(os.pread(descriptor, 8, 0), "little")
        self._header: dict[str, Any] = json.loads(os.pread(descriptor, self._begin - 8, 8))

    def weight(self, key: str, dtype: torch.dtype) -> "StoredWeight":
        """Return a weight to be read as `dtype`. Raises CheckpointError as `dtype_of` does."""
        entry = self._header[key]
        stored = dtype_of(entry["dtype"], dtype, f"{self._name}: {key}")
        start, stop = entry["data_offsets"]
        _count(stored_bytes=stop - start)
        return StoredWeight(self, self._begin + start, tuple(entry["shape"]), stored, dtype)

    def read(self, offset: int, out: np.ndarray) -> None:
        """Fill an array of bytes with those at an offset. Raises CheckpointError where they cannot be read."""
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self._descriptor, [out[done:].data], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self._name} cannot be read ({error.strerror})") from error
            if count == 0:
                raise CheckpointError(f"{self._name} ends early; download it again")
            done += count
        _count(read_bytes=done)


@contextlib.contextmanager
def open_stored(path: Path, where: str) -> Iterator[StoredFile]:
    """Open a file of safetensors to read weights in the block. Raises CheckpointError. where: begins its message."""
    with open_weights(path, where):  # checks that it is whole
        descriptor = os.open(path, os.O_RDONLY)
    try:
        yield StoredFile(path, where, descriptor)
    finally:
        os.close(descriptor)


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight in a file, see `pipeline.model.placement.Rows`. stored: its dtype there; kind: the one that it takes."""

    file: StoredFile
    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype
    kind: torch.dtype
    axis = 0
    divisible = True

    @property
    def dtype(self) -> np.dtype[Any]:
        return torch_to_numpy(torch.empty(0, dtype=self.kind)).dtype

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write rows to `out`, contiguous. Raises CheckpointError."""
        row_bytes = math.prod(self.shape[1:]) * self.stored.itemsize
        offset = self.offset + start * row_bytes
        if self.stored == self.kind:
            self.file.read(offset, out.reshape(-1).view(np.uint8))
            return
        raw = np.empty((stop - start) * row_bytes, np.uint8)
        self.file.read(offset, raw)
        with ONE_AT_A_TIME:
            # As from_pretrained(dtype=...) does.
            out[...] = torch_to_numpy(torch.from_numpy(raw).view(self.stored).to(self.kind)).reshape(out.shape)

    def layers(self) -> "list[StoredWeight]":
        """Return its parts along the first axis, without that axis."""
        each = math.prod(self.shape[1:]) * self.stored.itemsize
        offsets = range(self.offset, self.offset + self.shape[0] * each, each)
        return [dataclasses.replace(self, offset=offset, shape=self.shape[1:]) for offset in offsets]
