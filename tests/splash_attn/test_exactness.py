"""Thousands of random and adversarial heads against float64, drawn by hypothesis, many heads in one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splash_attn import BlockSizes, Variant, attention
from splash_attn.gates import fixed_bound_limit

HEADS, Q_SEQ_LEN, KV_SEQ_LEN, HEAD_DIM = 32, 24, 129, 64  # a tail of one key
BLOCK_SIZES = BlockSizes(128, 128, 128)
CASES_PER_SOFTMAX = 1024

#: bfloat16 has 8 significant bits: it rounds the probabilities and the output each by up to 2^-8 of itself (half a unit
#: in the last place), which is at most 2^-7 of max|v| in all. The plain formula in bfloat16 comes as near to that.
TOLERANCE = 2**-7


@functools.cache
def compiled(softmax: str, k_smooth: bool):
    variant = Variant(softmax=softmax, block_q_compute=128, lookahead=1)
    return jax.jit(
        functools.partial(
            attention,
            scale=1 / np.log2(np.e),
            k_smooth=k_smooth,
            variant=variant,
            block_sizes=BLOCK_SIZES,
            interpret=True,
        )
    )


@st.composite
def heads(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head, [seq, head_dim] each, in bfloat16 values. With scale 1 / log2(e), logits are base-2 exponents q . k."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q = rng.standard_normal((Q_SEQ_LEN, HEAD_DIM)) * 2.0 ** draw(st.integers(-8, 3))
    k = rng.standard_normal((KV_SEQ_LEN, HEAD_DIM))
    v = rng.standard_normal((KV_SEQ_LEN, HEAD_DIM)) * 2.0 ** draw(st.integers(-20, 40))
    kind = draw(
        st.sampled_from(["plain", "dominating", "equal", "offset", "zero rows", "at the gate", "outlier channel"])
    )
    if kind == "dominating":  # one key, anywhere and also last, ahead of the others by up to 2^120
        k[draw(st.sampled_from([0, 1, 63, 127, KV_SEQ_LEN - 1]))] += (
            q[0] / np.square(q[0]).sum() * draw(st.integers(1, 120))
        )
    elif kind == "equal":
        k[:] = k[0]
    elif kind == "offset":
        k += 2.0 ** draw(st.integers(0, 10))
    elif kind == "zero rows":
        q[:: draw(st.integers(1, 5))] = 0
    elif kind == "at the gate":
        centre = k.mean(axis=0) if draw(st.booleans()) else 0
        bound = np.sqrt(np.square(q).sum(1).max() * np.square(k - centre).sum(1).max())
        limit = fixed_bound_limit(KV_SEQ_LEN, np.log2(np.abs(v).max()), centred=not np.isscalar(centre))
        q *= float(limit) / bound * draw(st.floats(0.97, 1.03))
    elif kind == "outlier channel":
        k[:, 3] *= 2.0 ** draw(st.integers(3, 8))
    return q, k, v


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    s = np.einsum("hqd,hkd->hqk", q, k)
    p = np.exp2(s - s.max(axis=-1, keepdims=True))
    return np.einsum("hqk,hkd->hqd", p / p.sum(axis=-1, keepdims=True), v)


@pytest.mark.parametrize("k_smooth", [True, False], ids=["k_smooth", "plain_k"])
@pytest.mark.parametrize("softmax", ["online", "fixed_bound"])
@settings(
    max_examples=CASES_PER_SOFTMAX // HEADS,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    derandomize=True,
)
@given(case=st.lists(heads(), min_size=HEADS, max_size=HEADS))
def test_random_heads(softmax: str, k_smooth: bool, case: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
    q, k, v = (jnp.asarray(np.stack(arrays), jnp.bfloat16) for arrays in zip(*case, strict=True))
    actual = np.asarray(compiled(softmax, k_smooth)(q[None], k[None], v[None])[0], np.float64)
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    error = np.abs(actual - exact(q64, k64, v64)).max(axis=(1, 2)) / np.abs(v64).max(axis=(1, 2))
    # float32 holds a logit of size x to x 2^-24 times a few, whichever way it is summed.
    logits = np.abs(np.einsum("hqd,hkd->hqk", np.abs(q64), np.abs(k64))).max(axis=(1, 2))
    assert (error <= TOLERANCE + logits * 2**-21).all()


def test_the_error_is_the_plain_formulas() -> None:
    """Where nothing is subtracted no probability is exactly 1, and the largest is rounded too, as it is by hand."""
    rng = np.random.default_rng(0)
    shapes = [(Q_SEQ_LEN, HEAD_DIM), (KV_SEQ_LEN, HEAD_DIM), (KV_SEQ_LEN, HEAD_DIM)]
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    q = q / 2
    actual = np.asarray(compiled("fixed_bound", False)(*(jnp.tile(x, (1, HEADS, 1, 1)) for x in (q, k, v)))[0, 0])
    q64, k64, v64 = (np.asarray(x, np.float64) for x in (q, k, v))
    p = np.exp2(q64 @ k64.T)
    rounded = np.asarray(jnp.asarray(p, jnp.bfloat16), np.float64)
    plain = jnp.asarray(rounded @ v64 / p.sum(axis=1, keepdims=True), jnp.bfloat16)
    expected = exact(q64[None], k64[None], v64[None])[0]
    ours, theirs = (np.abs(np.asarray(x, np.float64) - expected).max() for x in (actual, plain))
    assert theirs / np.abs(v64).max() > 2**-9 and ours < 1.1 * theirs
