"""Sizes of latents, and their two forms: diffusers' [1, frames, channels, height, width] and the step's token rows."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.model.transformer import TokenLayout, TransformerShape
from pipeline.requests.request import GenerateRequest


@dataclasses.dataclass(frozen=True)
class LatentGeometry:
    """Sizes of the latents of one video.

    num_frames: latent frames that are decoded. padding_frames: leading ones that only fill the last temporal patch;
    they are denoised along and then dropped. height, width: in latents.
    """

    num_frames: int
    padding_frames: int
    num_channels: int
    height: int
    width: int

    @classmethod
    def from_request(cls, request: GenerateRequest, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Self:
        """Return the geometry of a request under the configurations of transformer/ and vae/."""
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        num_frames = (request.num_frames - 1) // int(vae["temporal_compression_ratio"]) + 1
        return cls(
            num_frames=num_frames,
            padding_frames=-num_frames % (transformer.get("patch_size_t") or 1),
            num_channels=transformer["in_channels"],
            height=request.height // spatial,
            width=request.width // spatial,
        )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Return [batch, frames with padding, channels, height, width], as diffusers' transformer takes it."""
        return (1, self.num_frames + self.padding_frames, self.num_channels, self.height, self.width)

    def patch_grid(self, shape: TransformerShape) -> tuple[int, int, int]:
        """Return the number of patches along time, height and width."""
        return (self.shape[1] // shape.patch_size_t, self.height // shape.patch_size, self.width // shape.patch_size)

    def num_patches(self, shape: TransformerShape) -> int:
        """Return the number of video tokens."""
        frames, height, width = self.patch_grid(shape)
        return frames * height * width


def to_rows(latents: np.ndarray, geometry: LatentGeometry, shape: TransformerShape, layout: TokenLayout) -> np.ndarray:
    """Turn latents [1, frames, channels, height, width] into rows [rows, patch channels], zero for text and padding.

    A patch's channels are ordered (channel, time, height, width), as in diffusers' patch embedding and output.
    """
    frames, height, width = geometry.patch_grid(shape)
    p, p_t = shape.patch_size, shape.patch_size_t
    patches = latents.reshape(frames, p_t, geometry.num_channels, height, p, width, p)
    patches = patches.transpose(0, 3, 5, 2, 1, 4, 6).reshape(layout.video, shape.patch_channels)
    rows = np.zeros((layout.rows, shape.patch_channels), latents.dtype)
    rows[layout.text : layout.tokens] = patches
    return rows


def from_rows(rows: np.ndarray, geometry: LatentGeometry, shape: TransformerShape, layout: TokenLayout) -> np.ndarray:
    """Invert `to_rows`."""
    frames, height, width = geometry.patch_grid(shape)
    p, p_t = shape.patch_size, shape.patch_size_t
    patches = rows[layout.text : layout.tokens].reshape(frames, height, width, geometry.num_channels, p_t, p, p)
    return patches.transpose(0, 4, 3, 1, 5, 2, 6).reshape(geometry.shape)


def rotary_embedding(geometry: LatentGeometry, transformer: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines, each float32 [video tokens, head_dim], as diffusers' for CogVideoX 1.5 ("slice")."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    patch_size = transformer["patch_size"]
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=transformer["attention_head_dim"],
        crops_coords=None,
        grid_size=(geometry.height // patch_size, geometry.width // patch_size),
        temporal_size=geometry.shape[1] // transformer["patch_size_t"],
        grid_type="slice",
        max_size=(transformer["sample_height"] // patch_size, transformer["sample_width"] // patch_size),
    )
    return torch_to_numpy(cos.float()), torch_to_numpy(sin.float())


def rotary_rows(tables: tuple[np.ndarray, np.ndarray], layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
    """Return tables of `rotary_embedding`, one value a pair: float32 [head_dim / 2, rows]; 1 and 0 off the video."""

    def rows(table: np.ndarray, elsewhere: float) -> np.ndarray:
        half = np.full((table.shape[1] // 2, layout.rows), elsewhere, np.float32)
        half[:, layout.text : layout.tokens] = table[:, ::2].T
        return half

    return rows(tables[0], 1.0), rows(tables[1], 0.0)
