"""Pictures of latents in about the video's colours, without a decoder."""

import functools
import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image
from skimage.util import montage

from pipeline.checkpoints.loading import Checkpoint, load_module
from pipeline.stages.progress import Progress, StageEvent
from splash_workbench.files import atomic_path
from splash_workbench.provenance import stable_hash, user_cache_dir

logger = logging.getLogger(__name__)

PREVIEW_NAME = "preview.png"
_SCALE = 8  # pixels a latent, as in the video
_FIT_SIDE, _FIT_FRAMES = 128, 9  # pixels and frames of each still that the factors are fitted on
_FIT_STILLS = ((Image.Resampling.BICUBIC, 5), (Image.Resampling.NEAREST, 8)) * 2  # gradients, and edges


def latent_rgb(checkpoint: Checkpoint) -> np.ndarray:
    """Return factors [channels + 1, 3] from latents (and a 1) to RGB in 0 to 1, kept in the user's cache by weights.

    They are the least squares fit of stills in random colours to what the checkpoint's VAE encodes them to: seconds of
    CPU, once. Raises CheckpointError.
    """
    path = user_cache_dir() / "latent_rgb" / f"{stable_hash(checkpoint.identity('vae'))}.npy"
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError):  # not there yet, or spoilt
        factors = _fit(checkpoint)
    try:
        with atomic_path(path) as temporary:
            np.save(temporary, factors)
    except OSError as error:
        logger.warning("previews: their colours cannot be kept in %s (%s)", path.parent, error.strerror)
    return factors


def _fit(checkpoint: Checkpoint) -> np.ndarray:
    loaded = load_module(checkpoint, "vae", torch.float32, place=lambda value: torch.from_numpy(value.copy()))
    vae: Any = loaded.module
    vae.load_state_dict(loaded.weights, assign=True, strict=False)  # load_module has checked the names
    rng = np.random.default_rng(0)
    latents, colours = [], []
    for resample, colours_a_side in _FIT_STILLS:
        palette = Image.fromarray(rng.integers(0, 256, (colours_a_side, colours_a_side, 3), dtype=np.uint8))
        still = np.asarray(palette.resize((_FIT_SIDE, _FIT_SIDE), resample), np.float32) / 255
        video = torch.from_numpy(still.transpose(2, 0, 1) * 2 - 1)[None, :, None].repeat(1, 1, _FIT_FRAMES, 1, 1)
        with torch.inference_mode(False), torch.no_grad():
            encoded = vae.encode(video).latent_dist.mode()[0].numpy() * vae.config.scaling_factor
        channels, frames, height, width = encoded.shape
        tiles = still.reshape(height, _FIT_SIDE // height, width, _FIT_SIDE // width, 3).mean((1, 3))
        latents.append(encoded.reshape(channels, -1).T)
        colours.append(np.tile(tiles.reshape(-1, 3), (frames, 1)))
    return np.linalg.lstsq(_with_ones(np.concatenate(latents)), np.concatenate(colours))[0]


def _with_ones(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones_like(latents[..., :1])], axis=-1)


def contact_sheet(latents: np.ndarray, factors: np.ndarray, max_frames: int = 9, max_side: int = 1536) -> Image.Image:
    """Return frames, spread evenly over latents [1, frames, channels, height, width], in one picture.

    factors: of `latent_rgb`. max_side: of the picture, in pixels.
    """
    chosen = np.unique(np.linspace(0, latents.shape[1] - 1, max_frames).round().astype(int))
    rgb = _with_ones(np.moveaxis(latents[0, chosen].astype(np.float32), 1, -1)) @ factors
    frames = (np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    columns = math.ceil(math.sqrt(len(frames)))
    grid = (math.ceil(len(frames) / columns), columns)
    sheet = montage(frames, fill=(0, 0, 0), grid_shape=grid, channel_axis=-1)
    scale = min(_SCALE, max_side / max(sheet.shape))
    size = (round(sheet.shape[1] * scale), round(sheet.shape[0] * scale))
    return Image.fromarray(sheet).resize(size, Image.Resampling.BILINEAR)


class Previews:
    """Contact sheets of one checkpoint's latents. A failure is one warning, then there are no more pictures."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._failed = False

    @functools.cached_property
    def _factors(self) -> np.ndarray:
        return latent_rgb(self._checkpoint)

    def sheet(self, latents: np.ndarray, **limits: int) -> Image.Image | None:
        """Return the `contact_sheet` of latents, None after a failure."""
        if not self._failed:
            try:
                return contact_sheet(latents, self._factors, **limits)
            except Exception as error:  # a picture is not worth a run, whatever was wrong
                self._failed = True
                logger.warning("denoise: no previews (%s)", error)
        return None


class PreviewWriter:
    """A `Progress` that keeps a contact sheet of what the video would be if the step just done were the last.

    It is replaced in `folder` every `every` denoising steps. A picture that fails is a warning.
    """

    def __init__(self, folder: Path, every: int, progress: Progress, checkpoint: Checkpoint):
        self._path, self._every, self._progress = folder / PREVIEW_NAME, every, progress
        self._previews = Previews(checkpoint)

    def __call__(self, event: StageEvent) -> None:
        if event.preview is not None and event.step % self._every == 0:
            latents = event.preview()  # takes all processes, where there are several
            if jax.process_index() == 0 and (picture := self._previews.sheet(latents)):
                try:
                    with atomic_path(self._path) as temporary:
                        picture.save(temporary)
                except OSError as error:
                    logger.warning("denoise: no preview (%s)", error)
        self._progress(event)
