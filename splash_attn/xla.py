"""The "xla" implementation: plain JAX in float32 and bounded memory, differentiable, finite for any finite input."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from splash_attn.gates import power_of_two_scale


def attention_xla(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch heads kv_seq head_dim"],
    v: Float[Array, "batch heads kv_seq head_dim"],
    *,
    scale: float,
    k_smooth: bool,
    score_bytes: int,
) -> Float[Array, "batch heads q_seq head_dim"]:
    """Return `softmax(scale * q k^T) v` in q's dtype, holding at most `score_bytes` of scores, or 8 queries of them.

    Powers of two bring each query, and the keys and values of each head, to about 1, so that no sum leaves float32.
    """
    batch_size, num_heads, q_seq_len, head_dim = q.shape
    k32, k_scale = _normalized(k, (2, 3))
    v32, v_scale = _normalized(v, (2, 3))
    if k_smooth:
        k32 -= k32.mean(axis=-2, keepdims=True)

    def rows(q_chunk: jax.Array) -> jax.Array:
        q32, q_scale = _normalized(q_chunk, (3,))
        scores = jnp.einsum("bhqd,bhkd->bhqk", q32 * (-1 if scale < 0 else 1), k32, precision=lax.Precision.HIGHEST)
        scores -= lax.stop_gradient(scores.max(axis=-1, keepdims=True))
        # The reciprocals meet first: where q is tiny and k huge, each times the scale may be out of range.
        factor = jnp.minimum((1 / q_scale) * (1 / k_scale), 2.0**126) * min(abs(scale), 2.0**127)
        weights = jnp.exp(scores * jnp.minimum(factor, 2.0**126))
        weights /= weights.sum(axis=-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights, v32, precision=lax.Precision.HIGHEST) / v_scale
        return saturate(out, q.dtype)

    chunk = max(8, score_bytes // (4 * batch_size * num_heads * k.shape[2]))
    if chunk >= q_seq_len:
        return rows(q)
    num_chunks = -(-q_seq_len // chunk)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, num_chunks * chunk - q_seq_len), (0, 0)))
    chunks = padded.reshape(batch_size, num_heads, num_chunks, chunk, head_dim)
    out = lax.map(rows, jnp.moveaxis(chunks, 2, 0))
    return jnp.moveaxis(out, 0, 2).reshape(padded.shape)[:, :, :q_seq_len]


def saturate(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return x in a narrower dtype, what rounding would make infinite as the largest finite number."""
    largest = jnp.finfo(dtype).max.astype(x.dtype)
    return jnp.clip(x, -largest, largest).astype(dtype)


def _normalized(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """x in float32 with its largest over `axes` in [1, 2), and the powers of two, constant to gradients, that do it."""
    x32 = x.astype(jnp.float32)
    scale = power_of_two_scale(jnp.abs(lax.stop_gradient(x32)).max(axis=axes, keepdims=True))
    return x32 * scale, scale
