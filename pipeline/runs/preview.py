"""Pictures of latents, without a decoder."""

import logging
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from pipeline.stages.progress import Progress, StageEvent
from splash_workbench.files import atomic_path

logger = logging.getLogger(__name__)

PREVIEW_NAME = "preview.png"
_SCALE = 8  # pixels a latent, as in the video
_SHEET_FRAMES = 9  # at most
_SHEET_SIDE = 1536  # pixels, at most
_PERCENTILES = (1, 99)


def latent_picture(latents: np.ndarray, max_side: int) -> Any:
    """Return the middle frame of latents [1, frames, channels, height, width] as a PIL image.

    Red, green and blue are the three directions in which its channels vary most (principal components): shapes and
    motion are the video's, colours are not. Each keeps its sign by its largest part, so that colours do not flip from
    step to step.
    """
    middle = latents.shape[1] // 2
    rgb = _project(latents[0, middle : middle + 1])
    height, width = rgb.shape[1:3]
    return _scaled(Image.fromarray(rgb[0]), min(_SCALE, max_side / max(height, width)))


def contact_sheet(latents: np.ndarray) -> Any:
    """Return up to 9 frames, spread evenly over latents [1, frames, channels, height, width], as one PIL image.

    Colours are as in `latent_picture`, the same in all frames.
    """
    chosen = np.unique(np.linspace(0, latents.shape[1] - 1, _SHEET_FRAMES).round().astype(int))
    frames = _project(latents[0, chosen])
    columns = math.ceil(math.sqrt(len(frames)))
    rows = math.ceil(len(frames) / columns)
    height, width = frames.shape[1:3]
    tiles = np.zeros((rows * columns, height, width, 3), np.uint8)
    tiles[: len(frames)] = frames
    sheet = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    return _scaled(Image.fromarray(sheet), min(_SCALE, _SHEET_SIDE / max(sheet.shape)))


def _project(frames: np.ndarray) -> np.ndarray:
    """Project latents [frames, channels, height, width] to uint8 [frames, height, width, 3]."""
    num_frames, channels, height, width = frames.shape
    pixels = frames.swapaxes(0, 1).reshape(channels, -1).astype(np.float32)
    pixels = pixels - pixels.mean(axis=1, keepdims=True)
    _, directions = np.linalg.eigh(pixels @ pixels.T)
    directions = directions[:, :-4:-1]  # the last are the largest
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, range(directions.shape[1])])
    rgb = directions.T @ pixels
    low, high = np.percentile(rgb, _PERCENTILES, axis=1, keepdims=True)
    rgb = np.clip((rgb - low) / np.maximum(high - low, 1e-6), 0, 1)
    return (rgb * 255).astype(np.uint8).T.reshape(num_frames, height, width, -1)


def _scaled(picture: Any, scale: float) -> Any:
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BILINEAR)


class PreviewWriter:
    """A `Progress` that keeps a contact sheet of what the video would be if the step just done were the last.

    It is replaced in `folder` every `every` denoising steps. A picture that fails is a warning.
    """

    def __init__(self, folder: Path, every: int, progress: Progress):
        self._path = folder / PREVIEW_NAME
        self._every = every
        self._progress = progress

    def __call__(self, event: StageEvent) -> None:
        if event.preview is not None and event.step % self._every == 0:
            latents = event.preview()  # takes all processes, where there are several
            if jax.process_index() == 0:
                self._write(latents, event.step)
        self._progress(event)

    def _write(self, latents: np.ndarray, step: int) -> None:
        try:
            picture = contact_sheet(latents)
            with atomic_path(self._path) as temporary:
                picture.save(temporary)
        except Exception as error:  # a picture is not worth a run, whatever was wrong
            logger.warning("denoise: no preview of step %d (%s)", step, error)
