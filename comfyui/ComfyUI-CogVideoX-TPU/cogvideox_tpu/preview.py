"""A picture of latents, without a decoder."""

from typing import Any

import numpy as np
from PIL import Image

_SCALE = 8  # pixels a latent, as in the video
_PERCENTILES = (1, 99)


def latent_picture(latents: np.ndarray, max_side: int) -> Any:
    """The middle frame of latents [1, frames, channels, height, width] as a PIL image.

    Red, green and blue are the three directions in which its channels vary most (principal components): shapes and
    motion are the video's, colours are not. Each keeps its sign by its largest part, so that colours do not flip from
    step to step.
    """
    _, num_frames, channels, height, width = latents.shape
    pixels = latents[0, num_frames // 2].reshape(channels, -1).astype(np.float32)
    pixels = pixels - pixels.mean(axis=1, keepdims=True)
    _, directions = np.linalg.eigh(pixels @ pixels.T)
    directions = directions[:, :-4:-1]  # the last are the largest
    largest = np.abs(directions).argmax(axis=0)
    directions = directions * np.sign(directions[largest, range(directions.shape[1])])
    rgb = directions.T @ pixels
    low, high = np.percentile(rgb, _PERCENTILES, axis=1, keepdims=True)
    rgb = np.clip((rgb - low) / np.maximum(high - low, 1e-6), 0, 1)
    picture = Image.fromarray((rgb * 255).astype(np.uint8).T.reshape(height, width, -1))
    scale = min(_SCALE, max_side / max(height, width))
    return picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR)
