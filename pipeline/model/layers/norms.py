"""Norms of a block: of tokens with their modulation, and of queries and keys with rotary embedding."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from pipeline.model.layers.int8 import Quantized
from pipeline.model.layers.norm_kernel import modulate_in_xla, modulate_on_tpu
from pipeline.model.layers.qk_kernel import norm_rotary_on_tpu

QK_NORM_EPS = 1e-6  # fixed in diffusers' CogVideoXBlock
Weights = Mapping[str, jax.Array]
#: Cosines and sines, float32 [head_dim / 2, rows] each, 1 and 0 where the row is no video token; None without rotation.
Rotary = tuple[jax.Array, jax.Array] | None


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Normalize over the last axis in float32, whatever the dtypes. Returns float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + eps) * weight.astype(jnp.float32) + bias.astype(jnp.float32)


def modulate(
    x: jax.Array, weights: Weights, name: str, modulation: jax.Array, is_text: jax.Array, eps: float, quantize: bool
) -> tuple[jax.Array | Quantized, jax.Array]:
    """Normalize, shift and scale by kind of row. Returns that, and the gate, float32 [rows, channels].

    In x's dtype; or, to `quantize`, turned and in int8. is_text: of the first rows, or of none.
    """
    shift, scale, gate, text_shift, text_scale, text_gate = jnp.split(modulation.astype(jnp.float32), 6)

    def by_row(text: jax.Array, video: jax.Array) -> jax.Array:
        return jnp.where(is_text[:, None], text, video)

    norm_weight, norm_bias = (weights[f"{name}.norm.{part}"].astype(jnp.float32) for part in ("weight", "bias"))
    scales = 1 + jnp.stack([text_scale, scale])
    shifts = norm_bias * scales + jnp.stack([text_shift, shift])
    arguments = x, norm_weight * scales, shifts, is_text.sum(dtype=jnp.int32)
    on_tpu, elsewhere = (
        functools.partial(function, eps=eps, quantize=quantize) for function in (modulate_on_tpu, modulate_in_xla)
    )
    modulated = lax.platform_dependent(*arguments, tpu=on_tpu, default=elsewhere)
    return modulated, by_row(text_gate, gate)


def norm_rotary(x: jax.Array, weights: Weights, name: str, rotary: Rotary) -> jax.Array:
    """Join the parts of the rows; apply LayerNorm over head_dim, then rotary embedding of the halves.

    x: [parts, batch, heads, head_dim, rows of a part]; rotary: of all rows. Returns [batch, heads, head_dim, rows].
    """
    weight, bias = (weights[f"{name}.{part}"].astype(jnp.float32) for part in ("weight", "bias"))
    on_tpu, elsewhere = (
        functools.partial(function, eps=QK_NORM_EPS) for function in (norm_rotary_on_tpu, norm_rotary_in_xla)
    )
    return lax.platform_dependent(x, weight, bias, rotary, tpu=on_tpu, default=elsewhere)


def join_rows(x: jax.Array) -> jax.Array:
    """[parts, batch, heads, head_dim, rows of a part] -> [batch, heads, head_dim, rows]."""
    return jnp.concatenate(list(x), axis=3)


def norm_rotary_in_xla(x: jax.Array, weight: jax.Array, bias: jax.Array, rotary: Rotary, eps: float) -> jax.Array:
    """Return what `norm_rotary_on_tpu` does, on any device."""
    x = lax.optimization_barrier(join_rows(x))
    normed = x.astype(jnp.float32)
    mean = normed.mean(2, keepdims=True)
    variance = jnp.square(normed - mean).mean(2, keepdims=True)
    normed = (normed - mean) * lax.rsqrt(variance + eps) * weight[:, None] + bias[:, None]
    if rotary is None:
        return normed.astype(x.dtype)
    cos, sin = rotary
    even, odd = jnp.split(normed, 2, axis=2)
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=2).astype(x.dtype)
