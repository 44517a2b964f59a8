"""int8 q and k: the error that is predicted, the heads that are refused, and the kernel that runs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attn import BlockSizes, Variant, attention, attention_reference, gates
from splash_attn.quantize import quantize_qk

SMALL = BlockSizes(block_q=256, block_kv=256, block_kv_compute=128)
INT8 = Variant(qk_dtype="int8", block_q_compute=128, lookahead=2)
EXACT = Variant(block_q_compute=128, lookahead=2)
LOG2_E = float(np.log2(np.e))


def layer_normed(
    rng: np.random.Generator, seq_len: int, head_dim: int, outlier: float, channels: slice = slice(3, None, 16)
) -> np.ndarray:
    """Rows as CogVideoX's query and key norms leave them: of mean 0 and deviation 1, some channels scaled up."""
    shared = rng.standard_normal((seq_len, 8)) @ np.random.default_rng(0).standard_normal((8, head_dim))
    x = shared + rng.standard_normal((seq_len, head_dim))
    x = (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)
    x[:, channels] *= outlier
    return x


def realistic(
    seq_len: int, head_dim: int = 64, *, q_outlier: float = 1, k_outlier: float = 1, offset: float = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng([seq_len, head_dim])
    q = layer_normed(rng, seq_len, head_dim, q_outlier)
    k = layer_normed(rng, seq_len, head_dim, k_outlier, slice(5, None, 16)) + offset * rng.standard_normal(head_dim)
    arrays = q, k, rng.standard_normal((seq_len, head_dim))
    return tuple(jnp.asarray(x[None, None], jnp.bfloat16) for x in arrays)  # type: ignore[return-value]


def rms_error(actual: jax.Array, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def predicted_error(q: jax.Array, k: jax.Array) -> float:
    scale = q.shape[-1] ** -0.5 * LOG2_E
    found = quantize_qk(q[0].swapaxes(1, 2), k[0], scale)
    return float(
        gates.int8_error(found.q_length, found.k_length, found.q_step, found.k_step, exponent_scale=scale).max()
    )


def four_heads(of: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    """Return q, k and v of four heads: the tests share the program of this size."""
    assert len(of) == 4
    return [jnp.concatenate(arrays, axis=1) for arrays in zip(*of, strict=True)]


@pytest.mark.compile
def test_error_is_within_what_is_predicted() -> None:
    """Of a plain head, of keys with an offset, with outliers, and of outliers in both."""
    options: list[dict[str, float]] = [{}, {"offset": 8}, {"k_outlier": 6}, {"q_outlier": 4, "k_outlier": 4}]
    q, k, v = four_heads([realistic(523, **each) for each in options])
    expected = attention_reference(q, k, v, dtype=np.float64)
    actual = attention(q, k, v, variant=INT8, block_sizes=SMALL, interpret=True)
    exact = attention(q, k, v, variant=EXACT, block_sizes=SMALL, interpret=True)
    for head, name in enumerate(map(str, options)):
        one = slice(head, head + 1)
        error = rms_error(actual[:, one], expected[:, one])
        assert error < 1.2 * predicted_error(q[:, one], k[:, one]) < 1.2 * gates.INT8_ERROR_BUDGET, name
        assert error > 2 * rms_error(exact[:, one], expected[:, one]), name  # it did run in int8


@pytest.mark.compile
def test_heads_over_the_budget_run_exactly() -> None:
    """Of four heads two are refused: one for its error, one for its range, which the online kernel gets."""
    q, k, v = (jnp.tile(x, (1, 4, 1, 1)) for x in realistic(523))
    q = q * jnp.asarray([1, 6, 1, 60], q.dtype)[None, :, None, None]
    int8, exact = (attention(q, k, v, variant=it, block_sizes=SMALL, interpret=True) for it in (INT8, EXACT))
    same = np.asarray((int8 == exact).all((0, 2, 3)))
    assert same.tolist() == [False, True, False, True]
    expected = attention_reference(q, k, v, dtype=np.float64)
    for head in range(4):
        limit = 2**-7 if same[head] else gates.INT8_ERROR_BUDGET
        assert rms_error(int8[:, head], expected[:, head]) < limit


@pytest.mark.compile
@pytest.mark.parametrize(
    ("q_seq_len", "kv_seq_len"), [(1, 1), (129, 257), pytest.param(300, 385, marks=pytest.mark.slow("5 s"))]
)
def test_odd_lengths_mask_what_is_past_the_end(q_seq_len: int, kv_seq_len: int) -> None:
    q, k, v = realistic(max(q_seq_len, kv_seq_len), head_dim=128)
    q, k, v = q[:, :, :q_seq_len], k[:, :, :kv_seq_len], v[:, :, :kv_seq_len]
    actual = attention(q, k, v, variant=INT8, block_sizes=SMALL, interpret=True)
    assert rms_error(actual, attention_reference(q, k, v, dtype=np.float64)) < gates.INT8_ERROR_BUDGET


@pytest.mark.compile
def test_zeros_and_equal_keys() -> None:
    q, k, v = realistic(523)
    some, equal = q.at[:, :, ::3].set(0), jnp.broadcast_to(k[:, :, :1], k.shape)
    heads = four_heads([(some, k, v), (q * 0, k * 0, v), (q, equal, v), (some, equal, v)])
    actual, expected = (
        attention(*heads, variant=INT8, block_sizes=SMALL, interpret=True),
        attention_reference(*heads, dtype=np.float64),
    )
    for head in range(4):
        assert rms_error(actual[:, head], expected[:, head]) < gates.INT8_ERROR_BUDGET, head


def test_balanced_channels_keep_the_products() -> None:
    q, k, _ = realistic(211, q_outlier=4, k_outlier=6, offset=3)
    found = quantize_qk(q[0].swapaxes(1, 2), k[0], 1.0)
    q64, k64 = np.asarray(q[0, 0], np.float64), np.asarray(k[0, 0], np.float64)
    expected = q64 @ (k64 - k64.mean(axis=0)).T
    q8, k8 = np.asarray(found.q[0], np.int64), np.asarray(found.k[0], np.int64)
    actual = np.asarray(found.scale[0])[:, None] * (q8.T @ k8.T)
    assert np.abs(q8).max() == np.abs(k8).max() == 127
    assert np.std(actual - expected) < 0.02 * np.std(expected)


def test_refuses_int8_with_a_running_maximum() -> None:
    with pytest.raises(ValueError, match="expected softmax='fixed_bound' with int8"):
        Variant(softmax="online", qk_dtype="int8")
