"""The kernel, interpreted on the CPU, against float64. Memory that was never written reads as NaN there."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attn import BlockSizes, Variant, attention, attention_reference, gates

pytestmark = pytest.mark.compile

SMALL = BlockSizes(block_q=256, block_kv=256, block_kv_compute=128)
ONLINE = Variant(softmax="online", block_q_compute=128, lookahead=2)
FIXED = Variant(softmax="fixed_bound", block_q_compute=128, lookahead=2)
SOFTMAXES = pytest.mark.parametrize("variant", [ONLINE, FIXED], ids=["online", "fixed_bound"])
#: Where the softmax is not what is tested, and the kernel is one that no other test compiles.
ONE_SOFTMAX = pytest.mark.parametrize(
    "variant", [ONLINE, pytest.param(FIXED, marks=pytest.mark.slow("8 s"))], ids=["online", "fixed_bound"]
)


def by_turns(*cases: tuple, slow: tuple[tuple, ...] = ()) -> list:
    """Return each case with one softmax, by turns ONLINE and FIXED, and with the other one marked slow.

    Each is a kernel of its own to compile, which takes most of a test's time: cases that are like others are `slow`.
    """
    both = itertools.product(enumerate(cases), enumerate((ONLINE, FIXED)))
    return [
        pytest.param(
            *case,
            variant,
            marks=[] if (row + column) % 2 == 0 and case not in slow else pytest.mark.slow("4 s"),
            id=f"{'-'.join(map(str, case))}-{variant.softmax}",
        )
        for (row, case), (column, variant) in both
    ]


#: The same sums in bfloat16 operands: probabilities and outputs are each rounded by up to 2^-8 of themselves (half a
#: unit in the last of 8 significant bits), and a row averages over v: errors stay under 2^-7 of max|v|.
BF16_TOLERANCE = 2**-7


def inputs(
    q_seq_len: int, kv_seq_len: int, head_dim: int, *, heads: int = 2, batch: int = 1, dtype: object = jnp.bfloat16
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng([q_seq_len, kv_seq_len, head_dim])
    shapes = [(batch, heads, n, head_dim) for n in (q_seq_len, kv_seq_len, kv_seq_len)]
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)  # type: ignore[return-value]


def error(actual: jax.Array, expected: np.ndarray, v: jax.Array) -> float:
    """Largest absolute error relative to the largest value."""
    actual64 = np.asarray(actual).astype(np.float64)
    return float(np.abs(actual64 - expected).max() / np.abs(np.asarray(v, np.float64)).max())


def check(q: jax.Array, k: jax.Array, v: jax.Array, **options: object) -> None:
    options = {"block_sizes": SMALL} | options
    actual = attention(q, k, v, interpret=True, **options)  # type: ignore[arg-type]
    assert actual.dtype == q.dtype and actual.shape == q.shape
    scale = options.get("scale")
    expected = attention_reference(q, k, v, scale=scale, dtype=np.float64)  # type: ignore[arg-type]
    assert error(actual, expected, v) < BF16_TOLERANCE


@pytest.mark.parametrize(
    ("q_seq_len", "kv_seq_len", "head_dim", "variant"),
    by_turns(
        (1, 1, 64),
        (127, 127, 128),
        (129, 129, 64),
        (1009, 1009, 128),
        (7, 1009, 64),
        (1009, 7, 128),
        (257, 385, 64),
        slow=((129, 129, 64), (1009, 1009, 128), (257, 385, 64)),  # as 131 x 263 and 401 x 523 below
    ),
)
def test_odd_lengths(q_seq_len: int, kv_seq_len: int, head_dim: int, variant: Variant) -> None:
    check(*inputs(q_seq_len, kv_seq_len, head_dim), variant=variant)


@pytest.mark.parametrize(("head_dim", "variant"), by_turns((8,), (40,), (72,), (256,), slow=((8,), (40,))))
def test_other_head_dims(head_dim: int, variant: Variant) -> None:
    check(*inputs(131, 263, head_dim), variant=variant)


@ONE_SOFTMAX
def test_batch_and_float32_inputs(variant: Variant) -> None:
    check(*inputs(67, 139, 64, heads=3, batch=2, dtype=jnp.float32), variant=variant)


@pytest.mark.parametrize(
    ("block_sizes", "lookahead", "variant"),
    by_turns(
        (BlockSizes(128, 512, 256), 0),
        (BlockSizes(384, 256, 256), 1),
        (BlockSizes(256, 128, 128), 5),
        (BlockSizes(128, 512, 256), 5),
        slow=((BlockSizes(128, 512, 256), 5),),
    ),
)
def test_block_sizes_and_lookahead(block_sizes: BlockSizes, lookahead: int, variant: Variant) -> None:
    variant = Variant(softmax=variant.softmax, block_q_compute=256, lookahead=lookahead)
    check(*inputs(401, 523, 64), variant=variant, block_sizes=block_sizes)


@pytest.mark.parametrize(("scale", "variant"), by_turns((0.01,), (1.0,), (-0.3,), slow=((0.01,), (1.0,))))
def test_scale(scale: float, variant: Variant) -> None:
    check(*inputs(131, 149, 64), variant=variant, scale=scale)


@SOFTMAXES
def test_large_logits(variant: Variant) -> None:
    q, k, v = inputs(131, 263, 64)
    check(q * 30, k, v, variant=variant)


@SOFTMAXES
def test_one_key_dominates_by_2_to_the_100(variant: Variant) -> None:
    q, k, v = inputs(131, 263, 64)
    q = q.at[..., 0].set(8)
    k = k.at[..., 0].set(0).at[:, :, 200, 0].set(100 / 8 / np.log2(np.e) * 8)  # 100 bits at scale 1/8
    check(q, k, v, variant=variant)


@SOFTMAXES
def test_equal_keys_average_the_values(variant: Variant) -> None:
    q, k, v = inputs(131, 263, 64)
    check(q, jnp.broadcast_to(k[:, :, :1], k.shape), v, variant=variant)


@SOFTMAXES
@pytest.mark.parametrize("k_smooth", [False, True])
def test_common_offset_of_the_keys(k_smooth: bool, variant: Variant) -> None:
    q, k, v = inputs(131, 263, 64)
    check(q, k + 100, v, variant=variant, k_smooth=k_smooth)


@SOFTMAXES
def test_zero_queries(variant: Variant) -> None:
    q, k, v = inputs(131, 263, 64)
    check(q.at[:, :, ::3].set(0), k, v, variant=variant)


@ONE_SOFTMAX
def test_smoothing_changes_nothing_but_rounding(variant: Variant) -> None:
    q, k, v = inputs(131, 263, 64, dtype=jnp.float32)
    smooth, plain = (
        attention(q, k + 3, v, interpret=True, block_sizes=SMALL, variant=variant, k_smooth=on) for on in (True, False)
    )
    expected = attention_reference(q, k + 3, v, dtype=np.float64)
    # Centred before it is rounded, k keeps two more bits: the error must fall, and both stay right.
    assert error(smooth, expected, v) < BF16_TOLERANCE
    assert error(plain, expected, v) < 8 * BF16_TOLERANCE
    assert error(smooth, expected, v) < error(plain, expected, v)


@pytest.mark.parametrize("side", [0.98, 1.02])
@pytest.mark.parametrize("centred", [False, True])
def test_bound_at_the_gate(side: float, centred: bool) -> None:
    """Just inside the limit the fixed bound loses nothing; just outside, the online kernel takes over."""
    q, k, v = inputs(131, 263, 64)
    k32 = np.asarray(k, np.float64)
    centre = k32.mean(axis=2, keepdims=True) if centred else 0.0
    radius = np.sqrt(((k32 - centre) ** 2).sum(-1)).max()
    length = np.sqrt((np.asarray(q, np.float64) ** 2).sum(-1)).max()
    radius += 2**-8 * np.sqrt((np.broadcast_to(centre, k32[:, :, :1].shape) ** 2).sum(-1)).max()
    limit = gates.fixed_bound_limit(263, np.log2(np.abs(np.asarray(v, np.float64)).max()), centred=centred)
    # Queries are made longer, and not the scale larger: one compiled kernel serves both sides.
    amplitude = side * limit / (length * radius * 64**-0.5 * np.log2(np.e))
    check(jnp.asarray(q * amplitude, q.dtype), k, v, variant=FIXED, k_smooth=centred)


def test_heads_within_and_beyond_the_limit_in_one_call() -> None:
    q, k, v = inputs(131, 263, 64, heads=5)
    amplitude = jnp.asarray([1, 200, 2, 300, 1], q.dtype)[None, :, None, None]
    check(q * amplitude, k, v, variant=FIXED)


@pytest.mark.parametrize(("unroll_q", "variant"), by_turns((256,), (128,)))
def test_tiles_in_a_loop(unroll_q: int, variant: Variant) -> None:
    """block_q 384: three turns of 128, or one of 256 and a rest; the last block of keys has loops of its own."""
    variant = dataclasses.replace(variant, unroll_q=unroll_q)
    check(*inputs(401, 523, 64), variant=variant, block_sizes=BlockSizes(384, 256, 128))


@SOFTMAXES
def test_error_is_that_of_bfloat16_operands(variant: Variant) -> None:
    """Root-mean-square error against the plain formula with bfloat16 operands and probabilities: at most 1.5 times.

    1.5, because "fixed_bound" divides by the sum of the float32 probabilities, not of the rounded ones; both kernels
    add block sums in another order.
    """
    for amplitude in (1, 3, 10):
        q, k, v = inputs(131, 263, 64)
        q = q * amplitude
        expected = attention_reference(q, k, v, dtype=np.float64)
        logits = jnp.einsum("bhqd,bhkd->bhqk", *(x.astype(jnp.float32) for x in (q, k)), precision="highest") / 8
        p = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        rounded = p.astype(jnp.bfloat16).astype(jnp.float32)
        plain = jnp.einsum("bhqk,bhkd->bhqd", rounded, v.astype(jnp.float32), precision="highest")
        plain = (plain / p.sum(axis=-1, keepdims=True)).astype(jnp.bfloat16)
        actual = attention(q, k, v, interpret=True, block_sizes=SMALL, variant=variant)
        ours, theirs = (np.sqrt(np.mean((np.asarray(x, np.float64) - expected) ** 2)) for x in (actual, plain))
        assert ours < 1.5 * theirs


#: Each pair of lengths with one variant, by turns; the rest in `make test-slow`.
KEYS_BY_TURNS = [
    pytest.param(
        *lengths,
        variant,
        # int8's program holds that of "fixed_bound" too.
        marks=[] if row == column != 1 else pytest.mark.slow("8 s"),
        id=f"{lengths}-{variant}",
    )
    for row, lengths in enumerate([(300, 277), (768, 700), (400, 331)])
    for column, variant in enumerate([Variant(softmax="online"), Variant(), Variant(qk_dtype="int8")])
]


@pytest.mark.parametrize(("length", "kv_seq_len", "variant"), KEYS_BY_TURNS)
def test_keys_that_do_not_count(length, kv_seq_len, variant):
    """The same as of the keys that count alone, whatever lies behind them."""
    rng = np.random.default_rng(7)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 2, length, 32)), jnp.bfloat16) for _ in range(3))
    behind = jnp.arange(length)[:, None] >= kv_seq_len
    call = functools.partial(attention, variant=variant, block_sizes=SMALL, interpret=True)
    actual = call(q, jnp.where(behind, 3e4, k), jnp.where(behind, -1e30, v), kv_seq_len=kv_seq_len)
    expected = call(q, k[:, :, :kv_seq_len], v[:, :, :kv_seq_len])
    np.testing.assert_allclose(actual.astype(np.float32), expected.astype(np.float32), rtol=0, atol=2**-8)
