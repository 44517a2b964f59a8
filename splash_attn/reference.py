"""The oracle: attention written out, with nothing clever in it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def attention_reference(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch heads kv_seq head_dim"],
    v: Float[Array, "batch heads kv_seq head_dim"],
    *,
    scale: float | None = None,
    dtype: type = np.float32,
) -> Float[np.ndarray, "batch heads q_seq head_dim"] | Float[Array, "batch heads q_seq head_dim"]:
    """`softmax(scale * q k^T) v`, holding the whole score matrix.

    Args:
      scale: multiplies the logits; None means head_dim ** -0.5.
      dtype: np.float32 computes with JAX at full float32 precision and returns a JAX array;
        np.float64 computes with NumPy and returns a NumPy array.

    Raises:
      ValueError: dtype is neither, or the shapes are not those of one call.
    """
    if q.ndim != 4 or k.shape != v.shape or k.shape != (*q.shape[:2], *k.shape[2:3], q.shape[3]):
        raise ValueError(
            f"q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape}: expected [batch, heads, seq, head_dim], alike "
            "but for q's seq."
        )
    if scale is None:
        scale = q.shape[-1] ** -0.5
    if dtype == np.float64:
        q64, k64, v64 = (np.asarray(x).astype(np.float64) for x in (q, k, v))
        scores = np.einsum("bhqd,bhkd->bhqk", q64, k64, optimize=True) * scale
        scores -= scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores, out=scores)
        return np.einsum("bhqk,bhkd->bhqd", weights, v64, optimize=True) / weights.sum(axis=-1, keepdims=True)
    if dtype == np.float32:
        q32, k32, v32 = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
        exact = jax.lax.Precision.HIGHEST
        scores32 = jnp.einsum("bhqd,bhkd->bhqk", q32, k32, precision=exact) * scale
        return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores32, axis=-1), v32, precision=exact)
    raise ValueError(f"dtype={dtype!r}: expected numpy.float32 or numpy.float64.")
