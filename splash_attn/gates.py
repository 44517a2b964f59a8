"""Which heads may run without a running maximum, and which with int8 q and k: decided by head, on the device.

Let x_ij = c q_i . k_j be the base-2 logits (c = |scale| log2(e)), S keys, and u any vector. The "fixed_bound" kernel
takes p_ij = 2^(x_ij - b_i) with b_i = c q_i . u rounded to bfloat16. Softmax does not change when a number that is the
same for all j is subtracted from a row, so any b_i is exact in real arithmetic, rounded or not; what remains is the
range of float32. By Cauchy-Schwarz, and with 2^-8 for the rounding of b_i,

    |x_ij - b_i| <= B := c max_i |q_i| (max_j |k_j - u| + 2^-8 |u|),

so that 2^-B <= p_ij <= 2^B. By the same inequality no partial sum of q_i . k_j or q_i . u leaves float32 while
|q_i| (max_j |k_j - u| + |u|) <= 2^125. Lengths are taken as 2^-45 at least: what underflows in their squares is less,
and with them c 2^-90 <= B, so that products of q and k under 2^-126 come to less than 2^-20 of an exponent together.
With max |v| = 2^w:

  - no overflow: a row sums to at most S 2^B, and |O_i| to at most that times 2^w. Both stay under 2^127 if
        B <= 126 - log2(S) - max(w, 0).                                                          (overflow)
    The 1 that is missing pays for the rounding of the probabilities and of the sums.
  - no loss, u the mean key (K-smooth): a row's x_ij - c q_i . u average to 0, so the largest is at least 0, and the
    row sum at least 2^(-2^-8 B) > 1/2: as large as where the maximum is subtracted. What falls under float32's 2^-126
    weighs as little as it does there; S products with v under 2^-126 stay under 2^-24 of 2^w times the row sum, if
        w >= log2(S) - 101.                                                                      (small v)
  - no loss, u = 0: the row sum is at least 2^-B. The probabilities under 2^-126 come to S 2^-126 at most; that is less
    than 2^-24 of the sum, half a unit in the last place of float32, and products with v stay normal too, if
        B <= 102 - log2(S) + min(w, 0).                                                          (underflow)

A head that fails goes to "online", which takes any finite input. There a power of two scales each query to at most
2^-11 a component, so that no score overflows, and another scales the values of a head to 2^60: S of them sum to less
than 2^127, and products with probabilities are normal down to 2^-126 relative to the largest. A probability is
2^((s_ij - max_j s_ij) c_i), c_i being what is left of c and the power of two: an exponent of -inf is a probability of
0, and one key has 1. Results are clipped to the largest of their dtype, which rounding alone may pass. Numbers under
2^-126 are 0 to float32 arithmetic on the TPU, and here.

With int8 the kernel takes 2^(x_ij) of quantised and centred q and k, whose lengths are at most 1 + sqrt(d)/254 times
those of q and k (each of d components is off by half a step, a step is 1/127 of the largest): the case u = 0.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

#: Largest predicted error of a head's probabilities, rms relative to themselves, with which int8 is used. bfloat16's
#: own is 0.002. `python -m pipeline.quality` shows what it does to a picture.
INT8_ERROR_BUDGET = 0.05


def fixed_bound_limit(kv_seq_len: int, log2_max_v: jax.Array | float, *, centred: bool) -> jax.Array:
    """Largest B (base-2 exponents) with which the fixed-bound softmax is exact. log2_max_v: w above."""
    overflow = 126 - math.log2(kv_seq_len) - jnp.maximum(log2_max_v, 0)
    if centred:
        return jnp.where(log2_max_v >= math.log2(kv_seq_len) - 101, overflow, -jnp.inf)
    return jnp.minimum(overflow, 102 - math.log2(kv_seq_len) + jnp.minimum(log2_max_v, 0))


def max_length(x: Float[Array, "heads head_dim seq"]) -> Float[Array, " heads"]:
    """Return the length of the longest vector of each head, in float32, and 2^-45 at least; inf where it overflows."""
    return jnp.maximum(jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(axis=1).max(axis=1)), 2.0**-45)


def power_of_two_scale(x: Float[Array, "..."], log2_target: int = 0) -> Float[Array, "..."]:
    """Return the power of two, from 2^-126 to 2^100, that brings x >= 0 into [1, 2) times 2^log2_target, or nearest."""
    exponent = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 23
    return lax.bitcast_convert_type(jnp.clip(254 + log2_target - exponent, 1, 227) << 23, jnp.float32)


def fixed_bound_exact(
    q_length: Float[Array, " heads"],
    k_radius: Float[Array, " heads"],
    centre_length: Float[Array, " heads"],
    log2_max_v: Float[Array, " heads"],
    *,
    exponent_scale: float,
    kv_seq_len: int,
    centred: bool,
) -> Bool[Array, " heads"]:
    """Return whether "fixed_bound" is exact, by max |q_i|, max |k_j - u|, |u| and max log2 |v| of each head.

    False for NaN, and for v of zeros.
    """
    bound = abs(exponent_scale) * q_length * (k_radius + 2**-8 * centre_length)
    scores_fit = q_length * (k_radius + centre_length) <= 2.0**125
    return scores_fit & (bound <= fixed_bound_limit(kv_seq_len, log2_max_v, centred=centred))


def int8_accurate(
    q_length: Float[Array, " heads"],
    k_length: Float[Array, " heads"],
    q_step: Float[Array, " heads"],
    k_step: Float[Array, " heads"],
    log2_max_v: Float[Array, " heads"],
    *,
    exponent_scale: float,
    kv_seq_len: int,
    head_dim: int,
) -> Bool[Array, " heads"]:
    """Whether int8 is within range and budget: the longest q and k, and the largest steps, of each head.

    Predicted is the error of a logit, which is that of its probability relative to itself. Rounding errors are taken as
    independent and uniform, of deviation step / sqrt(12): those of q meet the length of k, those of k the length of q;
    and the exponent, at most B, is rounded to bfloat16.
    """
    c = abs(exponent_scale)
    bound = c * q_length * k_length * (1 + math.sqrt(head_dim) / 254) ** 2
    error = int8_error(q_length, k_length, q_step, k_step, exponent_scale=exponent_scale)
    in_range = bound <= fixed_bound_limit(kv_seq_len, log2_max_v, centred=False)
    return jnp.logical_and(in_range, error <= INT8_ERROR_BUDGET)


def int8_error(
    q_length: jax.Array, k_length: jax.Array, q_step: jax.Array, k_step: jax.Array, *, exponent_scale: float
) -> jax.Array:
    """The predicted error that `int8_accurate` holds against the budget."""
    c = abs(exponent_scale)
    terms = jnp.square(c * q_step * k_length) + jnp.square(c * k_step * q_length)
    terms += jnp.square(c * q_length * k_length * 2**-8)
    return math.log(2) * jnp.sqrt(terms / 12)
