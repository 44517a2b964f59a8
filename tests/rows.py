"""Weights on the host that are read as those of a file are."""

import dataclasses
import threading
from typing import Any

import numpy as np


@dataclasses.dataclass
class HostRows:
    """See `pipeline.model.placement.Rows`. read_bytes: of all parts that were read."""

    values: np.ndarray
    divisible: bool = True
    axis = 0
    read_bytes: int = 0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        assert out.flags.c_contiguous and 0 <= start < stop <= len(self.values)
        out[...] = self.values[start:stop].reshape(out.shape)
        with self._lock:
            self.read_bytes += out.nbytes
