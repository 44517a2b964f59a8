"""Linears of a block in the layouts that it needs, of activations in the weights' dtype or in int8."""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pipeline.model.layers import int8
from pipeline.model.layers.int8 import Quantized

Weights = Mapping[str, jax.Array]


class Waves(NamedTuple):
    """Sines and cosines of diffusers' Timesteps."""

    number: int
    cosines_first: bool
    freq_shift: int


def scalar_embedding(weights: Weights, name: str, waves: Waves, value: jax.Array, dtype: Any) -> jax.Array:
    """Embed a number, [time_embed_dim], as diffusers' Timesteps (float32) and TimestepEmbedding (in dtype)."""
    half = waves.number // 2
    exponent = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - waves.freq_shift)
    angles = value.astype(jnp.float32) * jnp.exp(exponent)
    both = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(both[::-1] if waves.cosines_first else both).astype(dtype)
    embedding = jax.nn.silu(linear(embedding, weights, f"{name}.linear_1"))
    return linear(embedding, weights, f"{name}.linear_2")


def linear(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """Return x @ weight^T + bias, where there is one, in x's dtype. x: [..., in]."""
    out, bias = jnp.einsum("...i,oi->...o", x, weights[f"{name}.weight"]), weights.get(f"{name}.bias")
    return out if bias is None else out + bias


def product(x: jax.Array | Quantized, weights: Weights, name: str) -> jax.Array:
    """Return x @ weight^T of [batch, rows, in], without bias: in x's dtype, of int8 in float32."""
    weight = weights[f"{name}.weight"]
    if not isinstance(x, Quantized):
        return jnp.einsum("...i,oi->...o", x, weight)
    out = int8.matmul("bsi,oi->bso", x.values, weight)
    return out * x.scale[:, :, None] * weights[f"{name}.{int8.SCALE}"]


def project_heads(x: jax.Array | Quantized, weights: Weights, name: str, head_dim: int, dtype: jnp.dtype) -> jax.Array:
    """Project [batch, rows, channels] to [batch, heads, head_dim, rows], the bias added, in `dtype`."""
    weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
    weight = weight.reshape(-1, head_dim, weight.shape[1])
    if isinstance(x, Quantized):
        scale = weights[f"{name}.{int8.SCALE}"].reshape(-1, head_dim)[:, :, None]
        out = int8.matmul("bsc,hdc->bhds", x.values, weight) * x.scale[:, None, None] * scale
    else:
        out = jnp.einsum("bsc,hdc->bhds", x, weight)
    return (out if bias is None else out + bias.reshape(-1, head_dim)[:, :, None]).astype(dtype)


def join_heads(x: jax.Array | Quantized, weights: Weights, name: str) -> jax.Array:
    """Project [batch, heads, head_dim, rows] to [batch, rows, channels], without bias: of int8 in float32."""
    weight = weights[f"{name}.weight"]
    values = x.values if isinstance(x, Quantized) else x
    weight = weight.reshape(weight.shape[0], -1, values.shape[2])
    if not isinstance(x, Quantized):
        return jnp.einsum("bhds,chd->bsc", x, weight)
    out = int8.matmul("bhds,chd->bsc", x.values, weight)
    return out * x.scale[:, :, None] * weights[f"{name}.{int8.SCALE}"]


def group_of_heads(weights: Weights, group: int, groups: int) -> Weights:
    """Return a layer's weights, of those of q, k and v only the rows of one group of heads."""

    def rows(value: jax.Array) -> jax.Array:
        size = value.shape[0] // groups
        if value.dtype == jnp.int8:  # else XLA copies the stack of all layers in each of them, for another layout
            value = lax.optimization_barrier(value)
        return value[group * size : (group + 1) * size]

    return {name: rows(each) if re.match(r"attn1\.to_[qkv]\.", name) else each for name, each in weights.items()}
