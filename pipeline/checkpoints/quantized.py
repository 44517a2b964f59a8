"""A transformer's weights in int8 as one file of safetensors, which `transformer=PATH` reads again.

Names and shapes are those of the denoise step, blocks stacked along layers: no other program reads it.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.checkpoints.stored import StoredWeight, open_stored
from pipeline.checkpoints.weight_files import open_weights
from pipeline.model.placement import to_host
from pipeline.model.torchax_bridge import numpy_to_torch
from pipeline.model.weights import POSITIONS, stacked_shapes
from pipeline.requests.errors import CheckpointError
from splash_workbench.files import atomic_path, remove_leftovers

_METADATA = {"format": "pt", "made_by": "cogvideox-splash", "quantization": "int8"}


def is_quantized(path: Path) -> bool:
    """Return whether a file of safetensors is one of these. Raises CheckpointError where it cannot be read."""
    with open_weights(path, f"transformer={str(path)!r}: ") as file:
        return (file.metadata() or {}).get("quantization") == "int8"


def save_quantized(weights: Mapping[str, Any], positions: np.ndarray | None, path: Path) -> None:
    """Write quantized weights as `place_weights` makes them, whole on the host. positions: learned ones, if any.

    Raises CheckpointError for weights that are not finite, OSError where they cannot be written.
    """
    tensors = {name: numpy_to_torch(np.array(to_host(value))) for name, value in weights.items()}
    if positions is not None:
        tensors[POSITIONS] = numpy_to_torch(positions)
    if damaged := [name for name, x in tensors.items() if x.is_floating_point() and not x.isfinite().all()]:
        raise CheckpointError(f"{damaged[0]} holds NaN or infinity ({len(damaged)} such): the weights are damaged")
    remove_leftovers(path)
    try:
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=_METADATA)
    except SafetensorError as error:  # safetensors' own words for a full disk
        raise OSError(f"{path}: not written ({error}); make room there, or name another file") from error


def check_quantized(path: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError unless a file has the weights of a transformer of these stock shapes, from its header."""
    with open_quantized(path, shapes, torch.float32):
        pass


@contextlib.contextmanager
def open_quantized(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype
) -> Iterator[dict[str, StoredWeight]]:
    """Open a file of weights, to be read in the block; they take `dtype`, but int8 weights and what belongs to them.

    shapes: of the stock weights. Raises CheckpointError.
    """
    where, expected = f"transformer={str(path)!r}: ", stacked_shapes(shapes, quantize=True)
    with open_weights(path, where) as file:
        names = set(file.keys())
        if wrong := sorted(names ^ set(expected)):
            problem = "has" if wrong[0] in names else "lacks"
            raise CheckpointError(f"{where}{problem} {wrong[0]} ({len(wrong)} such): int8 weights of another model")
        for name, (shape, _) in expected.items():
            actual = tuple(file.get_slice(name).get_shape())
            if actual != shape:
                raise CheckpointError(f"{where}{name} has shape {list(actual)}, expected {list(shape)}")
    with open_stored(path, where) as stored:
        kinds = {None: dtype, jnp.float32: torch.float32, jnp.int8: torch.int8}
        yield {name: stored.weight(name, kinds[kind]) for name, (_, kind) in expected.items()}
