"""q and k in int8 for the score product, as SageAttention does (arXiv:2410.02367), with channels balanced first."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from splash_attn import gates

LEVELS = 127


class QuantizedQK(NamedTuple):
    """Int8 q and k, and what `splash_attn.gates` wants to know of them.

    q . k in base-2 exponents is `scale` times the int8 product, less what is the same for every key of a row.
    """

    q: Int[Array, "heads head_dim q_seq"]
    k: Int[Array, "heads kv_seq head_dim"]
    scale: Float[Array, "heads q_seq"]
    q_length: Float[Array, " heads"]  # the longest q and k - mean(k), balanced
    k_length: Float[Array, " heads"]
    q_step: Float[Array, " heads"]  # the largest steps
    k_step: Float[Array, " heads"]


def quantize_qk(
    q: Float[Array, "heads head_dim q_seq"], k: Float[Array, "heads kv_seq head_dim"], exponent_scale: float
) -> QuantizedQK:
    """Rounds to 127 steps either way: a step for each query, and one for all keys of a head, which are centred first.

    A channel that is large in k but not in q (or the other way round) would take the steps away from the others. So
    each channel of q is multiplied, and of k divided, by what makes their largest values equal: the products stay.
    """
    q32, k32 = q.astype(jnp.float32), k.astype(jnp.float32)
    k32 -= k32.mean(axis=1, keepdims=True)
    q_largest, k_largest = jnp.abs(q32).max(axis=2), jnp.abs(k32).max(axis=1)  # [heads, head_dim]
    balance = jnp.sqrt(_positive(k_largest) / _positive(q_largest))
    q32, k32 = q32 * balance[:, :, None], k32 / balance[:, None]
    q_step = _positive(jnp.abs(q32).max(axis=1)) / LEVELS  # [heads, q_seq]
    k_step = _positive((k_largest / balance).max(axis=1)) / LEVELS  # [heads]
    return QuantizedQK(
        q=jnp.round(q32 / q_step[:, None]).astype(jnp.int8),
        k=jnp.round(k32 / k_step[:, None, None]).astype(jnp.int8),
        scale=exponent_scale * q_step * k_step[:, None],
        q_length=gates.max_length(q32),
        k_length=gates.max_length(k32.swapaxes(1, 2)),
        q_step=q_step.max(axis=1),
        k_step=k_step,
    )


def _positive(x: jax.Array) -> jax.Array:
    """x, or 1 where it is 0: what is to be divided by it is 0 too."""
    return jnp.where(x > 0, x, 1)
