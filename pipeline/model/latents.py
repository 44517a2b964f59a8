"""Sizes of latents, and their two forms: diffusers' [1, frames, channels, height, width] and the step's token rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.requests.request import GenerateRequest

#: Of the rows of a shard, padded or not, that joins without shifts are worth.
_MOST_PADDED = 1.25


@dataclasses.dataclass(frozen=True)
class LatentGeometry:
    """Sizes of the latents of one video.

    num_frames: latent frames that are decoded. padding_frames: leading ones that only fill the last temporal patch;
    they are denoised along and then dropped. num_channels: of the sample. height, width: in latents. patch: of time,
    height and width, in latents.
    """

    num_frames: int
    padding_frames: int
    num_channels: int
    height: int
    width: int
    patch: tuple[int, int, int]

    @classmethod
    def from_request(cls, request: GenerateRequest, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Self:
        """Return the geometry of a request under the configurations of transformer/ and vae/."""
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        patch_size_t = transformer["patch_size_t"] or 1
        num_frames = (request.num_frames - 1) // int(vae["temporal_compression_ratio"]) + 1
        return cls(
            num_frames=num_frames,
            padding_frames=-num_frames % patch_size_t,
            num_channels=transformer["out_channels"],
            height=request.height // spatial,
            width=request.width // spatial,
            patch=(patch_size_t, transformer["patch_size"], transformer["patch_size"]),
        )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Return [batch, frames with padding, channels, height, width], as diffusers' transformer takes it."""
        return (1, self.num_frames + self.padding_frames, self.num_channels, self.height, self.width)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Return the number of patches along time, height and width."""
        time, height, width = self.patch
        return self.shape[1] // time, self.height // height, self.width // width

    @property
    def num_patches(self) -> int:
        """Return the number of video tokens."""
        return math.prod(self.grid)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Rows of the joint sequence: text, video, padding. padded: up to whole tiles, needed where rows are split."""

    text: int
    video: int
    num_shards: int
    padded: bool = True

    @property
    def tokens(self) -> int:
        return self.text + self.video

    @property
    def rows_per_shard(self) -> int:
        if not self.padded:
            assert self.num_shards == 1, self
            return self.tokens
        rows = -(-self.tokens // self.num_shards)
        lanes = -(-rows // 128) * 128
        # Joined for attention, shards of whole registers need no shifts: 0.6 ms a layer at 1248 rows, predicted.
        return lanes if lanes <= _MOST_PADDED * rows else -(-rows // 8) * 8

    @property
    def rows(self) -> int:
        return self.num_shards * self.rows_per_shard


def to_rows(latents: np.ndarray, geometry: LatentGeometry, layout: TokenLayout) -> np.ndarray:
    """Turn latents [1, frames, channels, height, width] into rows [rows, patch channels], zero for text and padding.

    A patch's channels are ordered (channel, time, height, width), as in diffusers' patch embedding and output.
    """
    (frames, height, width), (p_t, p, _) = geometry.grid, geometry.patch
    patches = latents.reshape(frames, p_t, geometry.num_channels, height, p, width, p)
    patches = patches.transpose(0, 3, 5, 2, 1, 4, 6).reshape(layout.video, -1)
    rows = np.zeros((layout.rows, patches.shape[1]), latents.dtype)
    rows[layout.text : layout.tokens] = patches
    return rows


def from_rows(rows: np.ndarray, geometry: LatentGeometry, layout: TokenLayout) -> np.ndarray:
    """Invert `to_rows`."""
    (frames, height, width), (p_t, p, _) = geometry.grid, geometry.patch
    patches = rows[layout.text : layout.tokens].reshape(frames, height, width, geometry.num_channels, p_t, p, p)
    return patches.transpose(0, 4, 3, 1, 5, 2, 6).reshape(geometry.shape)


def rotary_embedding(geometry: LatentGeometry, transformer: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return cosines and sines, each float32 [video tokens, head_dim], as diffusers'; None for a model without.

    CogVideoX 1.5 numbers rows and columns ("slice"), 1.0 stretches those of its own size over the video ("linspace").
    """
    if not transformer["use_rotary_positional_embeddings"]:
        return None
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    patch_size, (frames, *size) = transformer["patch_size"], geometry.grid
    height, width = (transformer[f"sample_{side}"] // patch_size for side in ("height", "width"))
    grid: dict[str, Any] = {"grid_type": "slice", "crops_coords": None, "max_size": (height, width)}
    if transformer["patch_size_t"] is None:
        grid = {"grid_type": "linspace", "crops_coords": get_resize_crop_region_for_grid(tuple(size), width, height)}
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=transformer["attention_head_dim"], grid_size=tuple(size), temporal_size=frames, **grid
    )
    return torch_to_numpy(cos.float()), torch_to_numpy(sin.float())


def rotary_rows(tables: tuple[np.ndarray, np.ndarray], layout: TokenLayout) -> tuple[np.ndarray, np.ndarray]:
    """Return tables of `rotary_embedding`, one value a pair: float32 [head_dim / 2, rows]; 1 and 0 off the video."""

    def rows(table: np.ndarray, elsewhere: float) -> np.ndarray:
        half = np.full((table.shape[1] // 2, layout.rows), elsewhere, np.float32)
        half[:, layout.text : layout.tokens] = table[:, ::2].T
        return half

    return rows(tables[0], 1.0), rows(tables[1], 0.0)


def position_rows(
    geometry: LatentGeometry, transformer: Mapping[str, Any], layout: TokenLayout, learned: np.ndarray | None
) -> np.ndarray:
    """Return what is added to the embedded tokens, float32 [rows, channels]: sines and cosines as diffusers' CogVideoX.

    learned: the checkpoint's own instead, [1, tokens, channels], for exactly this many tokens.
    """
    from diffusers.models.embeddings import get_3d_sincos_pos_embed

    channels = transformer["num_attention_heads"] * transformer["attention_head_dim"]
    rows = np.zeros((layout.rows, channels), np.float32)
    if learned is not None:
        rows[: layout.tokens] = learned[0]
        return rows
    frames, height, width = geometry.grid
    scales = (transformer[f"{axis}_interpolation_scale"] for axis in ("spatial", "temporal"))
    positions = get_3d_sincos_pos_embed(channels, (width, height), frames, *scales)
    rows[layout.text : layout.tokens] = torch_to_numpy(positions.flatten(0, 1).float())
    return rows
