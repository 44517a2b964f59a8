"""What an image or a video becomes before the first denoising step, on the host, as in diffusers' pipelines."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.model.latents import LatentGeometry
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.requests.media import open_image, read_video
from pipeline.requests.request import GenerateRequest

logger = logging.getLogger(__name__)

_STRETCH = 1.05  # of an image's sides against one another, from where on it is said


def source_frames(request: GenerateRequest, pictures: Sequence[Any] | None = None) -> np.ndarray:
    """Return the frames of a request's image or video as the encoder takes them, float32 [frames, height, width, 3].

    Resized as diffusers' pipelines resize, to the request's size whatever the sides were, in [-1, 1]; an image with
    the request's noise on it. pictures: PIL images instead of the file. Raises RequestError.
    """
    from diffusers.video_processor import VideoProcessor

    if pictures is None and request.video is not None:
        pictures = read_video(request.video, request.num_frames)
    elif pictures is None:
        pictures = [open_image(request.image or "")]
    width, height = pictures[0].size
    stretch = (request.width / width) / (request.height / height)
    if max(stretch, 1 / stretch) > _STRETCH:
        size = f"{width}x{height} is stretched to {request.width}x{request.height}"
        logger.warning("%s: %s; crop it before to keep its shape", "image" if request.video is None else "video", size)
    frames = VideoProcessor().preprocess(list(pictures), height=request.height, width=request.width)
    if request.noise_aug_strength:
        # Other numbers than the initial noise, which is drawn from the seed itself.
        seed = int.from_bytes(hashlib.sha256(f"noise_aug {request.seed}".encode()).digest()[:7])
        noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))
        frames = frames + request.noise_aug_strength * noise
    return torch_to_numpy(frames.permute(0, 2, 3, 1))


def sample_posterior(moments: np.ndarray, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    """Draw latents [1, frames, channels, height, width], not scaled, in `dtype`.

    moments: means and log variances, float32 [1, 2 channels, frames, height, width].
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    posterior = DiagonalGaussianDistribution(torch.from_numpy(np.array(moments)).to(dtype))
    return posterior.sample(generator).transpose(1, 2)


def image_condition(encoded: torch.Tensor, geometry: LatentGeometry, vae: Mapping[str, Any]) -> torch.Tensor:
    """Return what stands beside the noise, of the geometry's shape: the image in the first frame, zeros in the others.

    encoded: of `sample_posterior`, of one frame. vae: its configuration.
    """
    scale = vae["scaling_factor"]
    condition = torch.zeros(geometry.shape, dtype=encoded.dtype)
    condition[:, :1] = 1 / scale * encoded if vae["invert_scale_latents"] else scale * encoded
    return condition


def noisy_video(
    encoded: torch.Tensor,
    noise: torch.Tensor,
    geometry: LatentGeometry,
    vae: Mapping[str, Any],
    scheduler: Any,
    timesteps: np.ndarray,
) -> torch.Tensor:
    """Return the sample of the first of `timesteps`: a video's latents with noise, of the geometry's shape.

    encoded: of `sample_posterior`. Padding frames, for which diffusers refuses a video, repeat the first.
    """
    latents = vae["scaling_factor"] * encoded
    latents = torch.cat([latents[:, :1]] * geometry.padding_frames + [latents], dim=1)
    return scheduler.add_noise(latents, noise, torch.from_numpy(timesteps[:1]))
