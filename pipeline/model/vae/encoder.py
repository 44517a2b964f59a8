"""CogVideoX's VAE encoder as a function of arrays, written for one device's share of the columns.

It computes what the encoder of diffusers' AutoencoderKLCogVideoX computes on a batch of frames, from the same weights.
How, and in which layout, is said in `pipeline.model.vae.layers`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pipeline.model.vae.decoder import DecoderShape
from pipeline.model.vae.layers import MAX_STRIPS, Activations, Cache, Layer, Network, Weights, cut, join


def encode(
    weights: Weights,
    frames: Float[Array, "frames rows columns rgb"],
    cache: Cache | None,
    shape: DecoderShape,
    num_shards: int,
) -> tuple[Float[Array, "latent_frames latent_rows latent_columns moments"], Cache]:
    """Return one batch's means and log variances, float32, and the cache for the next. cache: None for the first batch.

    weights: by their stock names, see `arrange`. frames: in [-1, 1], in the weights' dtype, this device's columns of
    `num_shards` devices along the mesh axis SPLIT, as many as make whole latents.
    """
    network = Network(weights, cache, lambda weights, cache: EncoderLayer(weights, cache, shape.num_groups, num_shards))
    apply = network.apply
    x = frames.swapaxes(1, 2)
    # As many strips as stay whole when the columns are halved.
    x = cut(x, math.gcd(x.shape[1] // shape.spatial_factor, MAX_STRIPS))
    x = apply(["encoder."], x, lambda layer, x: layer.causal_conv("conv_in", x))
    for level in range(shape.num_levels):
        block = f"encoder.down_blocks.{level}"
        with jax.named_scope(f"level_{level}"):
            resnets = [f"{block}.resnets.{index}." for index in range(shape.num_resnets - 1)]
            if f"{resnets[0]}conv_shortcut.weight" in weights:  # to another number of channels
                x = apply([resnets.pop(0)], x, EncoderLayer.resnet)
            if resnets:
                x = apply(resnets, x, EncoderLayer.resnet)
            if level < shape.num_levels - 1:
                downsample = functools.partial(EncoderLayer.downsample, halve_frames=level < shape.time_levels)
                x = apply([f"{block}.downsamplers.0."], x, downsample)
    x = apply([f"encoder.mid_block.resnets.{index}." for index in range(2)], x, EncoderLayer.resnet)
    x = apply(["encoder."], x, lambda layer, x: layer.norm_silu("norm_out", x))
    moments = apply(["encoder."], x, lambda layer, x: layer.causal_conv("conv_out", x, dtype=jnp.float32))
    moments = join(moments).swapaxes(1, 2)
    if "quant_conv.weight" in weights:
        kernel, bias = (weights[f"quant_conv.{name}"].astype(jnp.float32) for name in ("weight", "bias"))
        moments = moments @ kernel.reshape(moments.shape[-1], -1) + bias
    return moments, network.next_cache


class EncoderLayer(Layer):
    """One layer of the encoder at work."""

    def downsample(self, x: Activations, halve_frames: bool) -> Activations:
        """Convolve each frame by itself in steps of two rows and columns, after averaging pairs of frames.

        An odd frame is the first, and stays by itself.
        """
        with jax.named_scope("downsample"):
            if halve_frames:
                odd = x.shape[0] % 2
                pairs = x[odd:].reshape(-1, 2, *x.shape[1:]).astype(jnp.float32).mean(1).astype(x.dtype)
                x = jnp.concatenate([x[:odd], pairs])
            x = jnp.concatenate([x, self._from_beside(x[:, :1], 1)], axis=1)  # stock pads on the right and below only
            return self._conv("conv", x, x.dtype, strides=(1, 2, 2), row_padding=(0, 1))
