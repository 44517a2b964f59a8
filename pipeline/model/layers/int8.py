"""Linears in int8: weights by output channel, activations by token, products summed in int32, rescaled in float32.

An outlier, a channel far above the others of its token, would take the steps away from them. No data is needed against
it: where a norm or attention makes the activations, they and the weights' rows are turned by the same orthogonal matrix
(Hadamard's, in blocks of channels, as QuaRot does, arXiv:2404.00456), which spreads a channel over its block. Behind
the feed-forward's activation, where that would be one more pass, channels are balanced with the weights as SmoothQuant
does (arXiv:2211.10438), by the size that norm2 and the up projection give them.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

LEVELS = 127
#: Linears of a block that are computed in int8.
QUANTIZED = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
SCALE, SMOOTHING = "weight_scale", "smoothing"
_MAX_BLOCK = 256  # as wide as the MXU


class Quantized(NamedTuple):
    """Activations: about `values * scale`.

    values: int8, [batch, tokens, channels] or [batch, heads, head_dim, tokens]. scale: float32 [batch, tokens].
    """

    values: jax.Array
    scale: jax.Array


def block_size(channels: int) -> int:
    """Return how many channels are turned together: the greatest power of two that divides them, up to 256."""
    return math.gcd(channels, _MAX_BLOCK)


def signs(size: int) -> np.ndarray:
    """Return Hadamard's matrix of a power of two, float32 [size, size] of 1 and -1. It is symmetric."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotate(x: Float[Array, "*leading channels"], size: int) -> Float[Array, "*leading channels"]:
    """Turn blocks of `size` channels each. Returns float32; the same again inverts it."""
    blocks = x.reshape(*x.shape[:-1], -1, size)
    turned = jnp.einsum(
        "...i,io->...o",
        blocks,
        jnp.asarray(signs(size), x.dtype),
        preferred_element_type=jnp.float32,
        precision=lax.Precision.HIGHEST,
    )
    return turned.reshape(x.shape) / math.sqrt(size)


def to_steps(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Round to int8 steps of `scale`."""
    return jnp.round(x * (1 / scale)).astype(jnp.int8)


def scale_of(largest: jax.Array) -> jax.Array:
    """Return the step for values up to `largest`; 1 where all are 0. NaN stays NaN, or it would become a 0 unseen."""
    return jnp.where(largest == 0, LEVELS, largest) / LEVELS


def quantize_weight(
    weight: Float[Array, "out in"],
    rotation: int | None = None,
    out_rotation: int | None = None,
    smoothing: Float[Array, " in"] | None = None,
) -> tuple[Int[Array, "out in"], Float[Array, " out"]]:
    """Quantize a weight by output channel; its inputs are to be turned, or multiplied by `smoothing`, in the same way.

    rotation, out_rotation: sizes of the blocks of inputs and outputs that are turned.
    """
    weight = weight.astype(jnp.float32)
    if out_rotation is not None:
        weight = rotate(weight.T, out_rotation).T
    if smoothing is not None:
        weight = weight / smoothing
    if rotation is not None:
        weight = rotate(weight, rotation)
    scale = scale_of(jnp.abs(weight).max(1))
    return to_steps(weight, scale[:, None]), scale


def hidden_sizes(
    up: Float[Array, "hidden in"],
    bias: Float[Array, " hidden"],
    norm_weight: Float[Array, " in"],
    norm_bias: Float[Array, " in"],
) -> Float[Array, " hidden"]:
    """Return about how large the feed-forward's hidden channels are: a normalized token's channels have variance 1."""
    up, bias, norm_weight, norm_bias = (x.astype(jnp.float32) for x in (up, bias, norm_weight, norm_bias))
    return jnp.sqrt(jnp.square(up * norm_weight).sum(1) + jnp.square(up @ norm_bias + bias))


def smoothing_of(down: Float[Array, "out hidden"], sizes: Float[Array, " hidden"]) -> Float[Array, " hidden"]:
    """Return what to multiply hidden channels by, and divide the weight by, so that both are of about the same size."""
    largest = jnp.abs(down.astype(jnp.float32)).max(0)
    usable = (sizes > 0) & (largest > 0)
    return jnp.where(usable, jnp.sqrt(jnp.where(usable, largest, 1) / jnp.where(usable, sizes, 1)), 1)


def matmul(subscripts: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """Return an einsum of int8 arrays, its sums in int32, as float32."""
    return jnp.einsum(subscripts, x, weight, preferred_element_type=jnp.int32).astype(jnp.float32)
