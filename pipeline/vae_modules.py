"""Changes to a stock VAE decoder's modules that leave its results alone and its compiled program smaller."""

import functools
from typing import Any

import torch


def adapt(vae: torch.nn.Module) -> None:
    """Apply the changes below to a module of our own (weights and their names stay)."""
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d, CogVideoXSpatialNorm3D

    for module in vae.modules():
        if isinstance(module, CogVideoXSafeConv3d):
            # Stock splits inputs of over 2 GB in time, for cuDNN; here that would go by the size over all devices.
            module.forward = functools.partial(torch.nn.Conv3d.forward, module)  # type: ignore[method-assign]
        elif isinstance(module, CogVideoXSpatialNorm3D):
            module.forward = functools.partial(_spatial_norm, module)


def _spatial_norm(module: Any, f: torch.Tensor, zq: torch.Tensor, conv_cache: Any = None) -> tuple[torch.Tensor, dict]:
    """CogVideoXSpatialNorm3D.forward with its 1x1x1 convolutions before the interpolation instead of after it.

    They work on each pixel by itself, and nearest-neighbour interpolation only repeats pixels: the same numbers, from a
    few thousandths of the work at full resolution.
    """
    del conv_cache  # of a convolution without extent in time
    scale, shift = (_interpolate_like(conv(zq)[0], f) for conv in (module.conv_y, module.conv_b))
    return module.norm_layer(f) * scale + shift, {}


def _interpolate_like(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """As in stock: of an odd number of frames, the first by itself."""
    if f.shape[2] > 1 and f.shape[2] % 2 == 1:
        first, rest = (_nearest(part, like) for part, like in ((x[:, :, :1], f[:, :, :1]), (x[:, :, 1:], f[:, :, 1:])))
        return torch.cat([first, rest], dim=2)
    return _nearest(x, f)


def _nearest(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, size=like.shape[-3:])
