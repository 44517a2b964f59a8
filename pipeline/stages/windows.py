"""Overlapping windows over the frames of a video that is longer than the model's: it sees one of them at a time.

A scheduler's step is linear in the model's output, so that blending the steps of all windows is the step of the blended
outputs: the program of a step is the window's own, and nothing is approximated beyond what the model does not see.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from pipeline.model.latents import LatentGeometry
from pipeline.requests.request import GenerateRequest


@dataclasses.dataclass(frozen=True)
class Windows:
    """whole: sizes of the video's latents. seen: of a window's. starts: the first latent frame of each window."""

    whole: LatentGeometry
    seen: LatentGeometry
    starts: tuple[int, ...]

    @classmethod
    def from_request(cls, request: GenerateRequest, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Self:
        """Return the windows of a request under the configurations of transformer/ and vae/: one where it has none."""
        whole = LatentGeometry.from_request(request, transformer, vae)
        if request.context_frames is None or request.context_frames >= request.num_frames:
            return cls(whole, whole, (0,))
        window = dataclasses.replace(request, num_frames=request.context_frames, context_frames=None)
        seen = LatentGeometry.from_request(window, transformer, vae)
        size, total = seen.shape[1], whole.shape[1]
        # Whole patches in time: windows begin where the video's patches do.
        step = size - request.context_overlap // int(vae["temporal_compression_ratio"])
        seen = dataclasses.replace(seen, num_frames=size, padding_frames=0)
        return cls(whole, seen, (*range(0, total - size, step), total - size))

    @property
    def several(self) -> bool:
        return len(self.starts) > 1

    def cut(self, latents: np.ndarray) -> list[np.ndarray]:
        """Return each window's part of latents [1, frames, channels, height, width]."""
        return [latents[:, start : start + self.seen.shape[1]] for start in self.starts]

    def blend(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Invert `cut` for parts that differ, float32: each counts less towards its ends, where others overlap it."""
        size = self.seen.shape[1]
        ramp = np.minimum(np.arange(size) + 1, size - np.arange(size)).astype(np.float32)[:, None, None, None]
        total = np.zeros(self.whole.shape, np.float32)
        weight = np.zeros((self.whole.shape[1], 1, 1, 1), np.float32)
        for start, part in zip(self.starts, parts, strict=True):
            total[0, start : start + size] += ramp * part[0].astype(np.float32)
            weight[start : start + size] += ramp
        return total / weight
