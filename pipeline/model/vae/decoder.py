"""CogVideoX's VAE decoder as a function of arrays, written for one device's share of the columns.

It computes what the decoder of diffusers' AutoencoderKLCogVideoX computes on a batch of latent frames, from the same
weights. How, and in which layout, is said in `pipeline.model.vae.layers`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pipeline.model.vae.layers import (
    Activations,
    Cache,
    Layer,
    Network,
    Weights,
    cut,
    join,
    num_strips,
    pair,
    pair_weights,
    unpair,
    weights_to_pairs,
)
from pipeline.requests.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The fields of vae/config.json in use. time_levels: upsamplings, from the first, that double the frames, too."""

    num_levels: int
    num_resnets: int
    num_groups: int
    time_levels: int
    scaling_factor: float

    @property
    def spatial_factor(self) -> int:
        """Return the pixels a latent, along height and width."""
        return 2 ** (self.num_levels - 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the shape of a whole configuration. Raises CheckpointError for another architecture."""
        levels = len(config["block_out_channels"])
        for name, expected in (
            ("act_fn", ("silu",)),
            ("out_channels", (3,)),
            ("temporal_compression_ratio", tuple(2**level for level in range(levels))),
        ):
            if config[name] not in expected:
                raise CheckpointError(
                    f"vae/config.json: {name}={config[name]!r}, expected {' or '.join(map(repr, expected))}"
                )
        scaling_factor = config["scaling_factor"]
        if not isinstance(scaling_factor, int | float) or not 0 < scaling_factor < math.inf:
            raise CheckpointError(f"vae/config.json: {scaling_factor=}, expected a number above 0")
        return cls(
            num_levels=levels,
            num_resnets=config["layers_per_block"] + 1,
            num_groups=config["norm_num_groups"],
            time_levels=int(math.log2(config["temporal_compression_ratio"])),
            scaling_factor=float(scaling_factor),
        )


def decode(
    weights: Weights,
    latents: Float[Array, "frames rows columns channels"],
    cache: Cache | None,
    shape: DecoderShape,
    num_shards: int,
    paired: bool = False,
    layer: Callable[..., Any] | None = None,
) -> tuple[Float[Array, "frames rows columns rgb"], Cache]:
    """Return one batch's video in [-1, 1], float32, and the cache for the next. cache: None for the first batch.

    paired: the last level, of most of the work, computes two frames at a time; see `pair_weights`. layer: makes a layer
    as `DecoderLayer` does, the default; `pipeline.model.vae.fused.FusedLayer` does it with a TPU kernel.

    weights: by their stock names, see `arrange`. latents: this device's columns of `num_shards` devices along the mesh
    axis SPLIT, scaled already, in the weights' dtype.
    """
    make, in_place = layer or DecoderLayer, layer is not None
    z = latents.swapaxes(1, 2)
    if "post_quant_conv.weight" in weights:
        z = (z @ weights["post_quant_conv.weight"].reshape(z.shape[-1], -1)) + weights["post_quant_conv.bias"]
    resnets = [
        [f"decoder.up_blocks.{level}.resnets.{index}." for index in range(shape.num_resnets)]
        for level in range(shape.num_levels)
    ]
    middle, last = [f"decoder.mid_block.resnets.{index}." for index in range(2)], shape.num_levels - 1
    narrowing = [f"{names[0]}conv_shortcut.weight" in weights for names in resnets]
    if paired:
        weights = {**weights, **_last_level_in_pairs(weights, resnets[last][0])}
    network = Network(
        weights,
        cache,
        lambda weights, cache, **which: make(weights, cache, shape.num_groups, num_shards, z, **which),
        in_place,
    )
    apply = network.apply
    x: Any = cut(z, num_strips(z.shape[1]))
    x = apply(["decoder."], x, lambda layer, x: layer.input(x))
    if narrowing[0]:
        x = apply(middle, x, _resnet)
    else:  # alike, so compiled once
        resnets[0] = [*middle, *resnets[0]]
    for level, names in enumerate(resnets):
        in_pairs = paired and level == last
        with jax.named_scope(f"level_{level}"):
            if narrowing[level]:  # to another number of channels
                x = apply([names.pop(0)], x, _resnet_to_pairs if in_pairs else _resnet)
            elif in_pairs:
                x = pair(x)
            x = apply(names, x, _in_pairs(_resnet) if in_pairs else _resnet)
            if level < last:
                upsample = functools.partial(_upsample, double_frames=level < shape.time_levels)
                x = apply([f"decoder.up_blocks.{level}.upsamplers.0."], x, upsample)
    video = apply(["decoder."], x, _in_pairs(_output) if paired else _output)
    video = unpair(video, z.shape[0] % 2) if paired else video
    return join(video).swapaxes(1, 2), network.next_cache


def _last_level_in_pairs(weights: Weights, first: str) -> dict[str, jax.Array]:
    """Return the weights of the last level and the output as they are on frames in pairs, by their stock names.

    first: the level's first resnet, whose results are the first pairs where it changes the number of channels.
    """
    level = (first.removesuffix("resnets.0."), "decoder.norm_out.", "decoder.conv_out.")
    paired = pair_weights(weights, level)
    if f"{first}conv_shortcut.weight" in weights:
        norm = {name: x for name, x in weights.items() if name.startswith(f"{first}norm1.")}
        paired |= norm | weights_to_pairs(weights, (f"{first}conv1.", f"{first}conv_shortcut."))
    return paired


# x: Activations, or what the layers of `pipeline.model.vae.fused` hand on.


def _resnet(layer: "DecoderLayer", x: Any) -> Any:
    return layer.resnet(x)


def _resnet_to_pairs(layer: "DecoderLayer", x: Any) -> Any:
    return layer.resnet_to_pairs(x)


def _upsample(layer: "DecoderLayer", x: Any, double_frames: bool) -> Any:
    return layer.upsample(x, double_frames)


def _output(layer: "DecoderLayer", x: Any) -> Any:
    return layer.output(x)


def _in_pairs(layer: Callable[["DecoderLayer", Any], Any]) -> Callable[["DecoderLayer", Any], Any]:
    """Return `layer` for frames in pairs."""
    return lambda state, x: layer(state.in_pairs(), x)


@dataclasses.dataclass
class DecoderLayer(Layer):
    """One layer of the decoder at work. z: latents [frames, columns, rows, channels]."""

    z: jax.Array

    def in_pairs(self) -> Self:
        """Return this layer for frames in pairs."""
        return dataclasses.replace(self, paired=True, odd=len(self.z) % 2 == 1)

    def input(self, x: Activations) -> Any:
        """Convolve the latents."""
        return self.causal_conv("conv_in", x)

    def output(self, x: Any) -> Activations:
        """Norm and convolve to colours, float32."""
        return self.causal_conv("conv_out", self.norm_silu("norm_out", x), dtype=jnp.float32)

    def resnet_to_pairs(self, x: Activations) -> Activations:
        """Apply a resnet of another number of channels, whose convolutions of x move by two frames: to pairs."""
        odd = len(self.z) % 2
        with jax.named_scope("conv1"):
            h = self.norm_silu("norm1", x)
            before = jnp.concatenate([h[:1]] * (2 + odd)) if self.cache is None else self.cache["conv1"]
            h = jnp.concatenate([before, h])
            self.next_cache["conv1"] = h[-2:]
            h = self._conv("conv1.conv", self._with_neighbours(h), x.dtype, strides=(2, 1, 1))
        pairs = self.in_pairs()
        h = pairs.norm_silu("norm2", h)
        x = self._conv("conv_shortcut", jnp.concatenate([x[:odd], x]), x.dtype, strides=(2, 1, 1))
        return pairs.causal_conv("conv2", h, residual=x)

    def upsample(self, x: Activations, double_frames: bool) -> Activations:
        """Repeat rows and columns (and frames) twice, then convolve each frame by itself."""
        with jax.named_scope("upsample"):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = self._conv("conv", self._with_neighbours(x), x.dtype)
            if double_frames:  # after the convolution, which would do the same twice; an odd frame is the first
                odd = x.shape[0] % 2
                x = jnp.concatenate([x[:odd], jnp.repeat(x[odd:], 2, axis=0)])
            columns = x.shape[1] * x.shape[3]
            strips = num_strips(columns)
            return x if strips == x.shape[3] else cut(join(x), strips)

    def norm_silu(self, name: str, x: Activations) -> Activations:
        """Apply group norm, scaled and shifted by two 1x1x1 convolutions of the latents, and SiLU.

        These work on the latents before the interpolation instead of after it: nearest-neighbour interpolation only
        repeats pixels.
        """
        with jax.named_scope(name):
            factor, offset = self._group_norm(f"{name}.norm_layer", x)
            z = self._latents_like(x)
            scale, shift = (
                self._conv(f"{name}.{conv}.conv", z, jnp.float32).astype(x.dtype)[:, None, :, None, :, None]
                for conv in ("conv_y", "conv_b")
            )
            pairs = zip(x.shape[:3], z.shape[:3], strict=True)
            # Barriers keep the blocks' form: with x's, the compiler writes scales and shifts out for every pixel first
            # (1.64 ms instead of 0.36 for [8, 20, 720, 8, 128], predicted for v6e).
            blocks = lax.optimization_barrier(
                x.reshape(*(n for size, like in pairs for n in (like, size // like)), *x.shape[3:])
            )
            h = (blocks.astype(jnp.float32) * factor + offset) * scale.astype(jnp.float32) + shift.astype(jnp.float32)
            return lax.optimization_barrier(jax.nn.silu(h).astype(x.dtype)).reshape(x.shape)

    def _latents_like(self, x: Activations) -> Activations:
        """Return the latents in the strips of x; each of their pixels is a block of pixels of x."""
        z, frames = self.z, x.shape[0]  # or pairs
        if len(z) % 2 and frames > 1:  # as in stock, the first by itself
            z = jnp.concatenate([z[:1], jnp.repeat(z[1:], (frames - 1) // (z.shape[0] - 1), axis=0)])
        strips, columns = x.shape[3], z.shape[1]
        return cut(jnp.repeat(z, strips // math.gcd(columns, strips), axis=1), strips)
