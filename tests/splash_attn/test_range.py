"""Finite whenever the exact result is, and no further off than bfloat16 explains: heads at the ends of the range."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attn import BlockSizes, Variant, attention, gates

Q_SEQ_LEN, KV_SEQ_LEN, HEAD_DIM = 37, 1021, 16
BLOCKS = BlockSizes(128, 512, 256)
WAYS: dict[str, dict[str, Any]] = {
    "xla": {"implementation": "xla"},
    "online": {"interpret": True, "variant": Variant("online", block_q_compute=128, lookahead=1)},
    "fixed_bound": {"interpret": True, "variant": Variant(block_q_compute=128, lookahead=1)},
    "int8": {"interpret": True, "variant": Variant(qk_dtype="int8", block_q_compute=128, lookahead=1)},
}
#: Of max|v|: probabilities and outputs rounded to bfloat16, as in test_kernel; int8 has its budget.
TOLERANCE = {"xla": 2**-8, "online": 2**-6, "fixed_bound": 2**-6, "int8": 0.1}


def one_hot(seq_len: int) -> np.ndarray:
    """Rows of the identity, over and over: scores that are 0 or as large as can be, exactly."""
    return np.eye(HEAD_DIM)[np.arange(seq_len) % HEAD_DIM]


def heads(largest: float, smallest: float) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """q, k and v by what is out of the ordinary, for a dtype with this range."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, HEAD_DIM)) for n in (Q_SEQ_LEN, KV_SEQ_LEN, KV_SEQ_LEN))
    unit_v = v / np.abs(v).max()
    q1, k1, ones = one_hot(Q_SEQ_LEN), one_hot(KV_SEQ_LEN), np.ones_like(v)
    root = np.sqrt(largest)
    return {
        "ordinary": (q, k, v),
        "largest v": (q, k, ones * largest),
        "largest v of both signs": (q * 4, k, unit_v * largest),
        "v that overflows a sum": (q, k, ones * largest / 340),
        "smallest v": (q * 4, k, unit_v * smallest * 2**10),
        "zero v": (q, k, v * 0),
        "one huge value": (q, k, np.where(np.arange(KV_SEQ_LEN)[:, None] == 1020, largest, v)),
        "scores that just overflow": (q1 * root * 2, k1 * root * 2, v),
        "largest q and k": (q1 * largest, k1 * largest, v),
        "largest q": (q1 * largest, k1, v),
        "largest k": (q1, k1 * largest, v),
        "large q, small k": (q * root, k / root, v),
        "small q, large k": (q / root, k * root, v),
        "squares underflow, scores do not": (q1 / root, k1 * root * 2**10, v),
        "smallest q and k": (q * smallest * 2**8, k * smallest * 2**8, v),
        "largest equal keys": (q, ones * largest, v),
        "keys whose mean is far from them": (q1, np.where(k1 > 0, largest, -largest), v),
        "queries of all sizes": (q1 * np.geomspace(smallest, largest, Q_SEQ_LEN)[:, None], k1, v),
    }


def exact(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> np.ndarray:
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))  # type: ignore[assignment]
    s = np.einsum("bhqd,bhkd->bhqk", q, k) * scale
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return np.einsum("bhqk,bhkd->bhqd", p / p.sum(axis=-1, keepdims=True), v)


def errors(q: jax.Array, k: jax.Array, v: jax.Array, way: str, scale: float) -> np.ndarray:
    """By head, relative to the largest value."""
    options = {"block_sizes": BLOCKS, "scale": scale} | WAYS[way]
    actual = np.asarray(attention(q, k, v, **options)).astype(np.float64)
    assert np.isfinite(actual).all(axis=(0, 2, 3)).tolist() == [True] * q.shape[1]
    largest = np.abs(np.asarray(v).astype(np.float64)).max(axis=(0, 2, 3))
    return np.abs(actual - exact(q, k, v, scale)).max(axis=(0, 2, 3)) / np.where(largest > 0, largest, 1)


#: With each dtype XLA and one kernel, by turns; the other kernels in `make test-slow`.
KERNEL_OF = {"bfloat16": "fixed_bound", "float16": "int8", "float32": "online"}
BY_DTYPE = [
    pytest.param(dtype, way, marks=[] if way in ("xla", kernel) else pytest.mark.slow("8 s"))
    for dtype, kernel in KERNEL_OF.items()
    for way in WAYS
]


@pytest.mark.compile
@pytest.mark.parametrize(("dtype", "way"), BY_DTYPE)
def test_every_finite_input_has_a_finite_and_right_result(dtype: str, way: str) -> None:
    info = jnp.finfo(dtype)
    smallest = {"float16": float(info.smallest_subnormal)}.get(dtype, float(info.smallest_normal))
    cases = heads(float(info.max), smallest)
    bound = float(info.max)
    q, k, v = (jnp.asarray(np.clip(np.stack(x)[None], -bound, bound), dtype) for x in zip(*cases.values(), strict=True))
    found = dict(zip(cases, errors(q, k, v, way, HEAD_DIM**-0.5), strict=True))
    assert {name: error for name, error in found.items() if error > TOLERANCE[way]} == {}


SCALES = [(1e30, 1e-15), (1e-30, 1e15), (1e300, 1.0), (-3e38, 1.0), (0.0, 1.0), (1e-300, 1.0), (2e-8, 1e3)]
#: Each scale is built into a kernel: of four of them, one softmax by turns, the others in `make test-slow`.
KERNELS_SCALES = (1e30, -3e38, 0.0, 1e-300)
TURNS = [
    pytest.param(
        *scale,
        way,
        marks=[] if way == "xla" or (number % 2 == turn and scale[0] in KERNELS_SCALES) else pytest.mark.slow("3 s"),
    )
    for turn, way in enumerate(("online", "fixed_bound", "xla"))
    for number, scale in enumerate(SCALES)
]


@pytest.mark.compile
@pytest.mark.parametrize(("scale", "size", "way"), TURNS)
def test_extreme_scales(scale: float, size: float, way: str) -> None:
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.standard_normal((1, 1, KV_SEQ_LEN, HEAD_DIM)), jnp.float32)
    q, k = (jnp.asarray(one_hot(n)[None, None] * size, jnp.float32) for n in (Q_SEQ_LEN, KV_SEQ_LEN))
    assert errors(q, k, v, way, scale).max() < TOLERANCE[way]


@pytest.mark.compile
def test_gradients_of_xla_are_finite_and_right_where_scores_overflow() -> None:
    q, k, v = (jnp.asarray(x[None, None], jnp.float32) for x in heads(1e30, 1e-30)["ordinary"])

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.square(attention(q, k, v, implementation="xla")).sum()

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        s = jnp.einsum("bhqd,bhkd->bhqk", q, k, precision="highest") * HEAD_DIM**-0.5
        return jnp.square(jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(s), v, precision="highest")).sum()

    for actual, expected in zip(jax.grad(loss, (0, 1, 2))(q, k, v), jax.grad(plain, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-6)
    huge = jax.grad(loss, (0, 1, 2))(q * 1e30, k * 1e30, v)
    assert all(np.isfinite(x).all() for x in huge)


def test_the_gate_refuses_what_its_squares_cannot_show() -> None:
    """|q| |k| is 2^20, but the squares of q are 0 in float32."""
    tiny, huge = (jnp.full((1, 8, 4), x, jnp.float32) for x in (2.0**-70, 2.0**90))
    lengths = gates.max_length(tiny), gates.max_length(huge), gates.max_length(huge * 0)
    assert not gates.fixed_bound_exact(*lengths, 0.0, exponent_scale=1.0, kv_seq_len=4, centred=False)
    # A large q . k overflows before a small scale is there to help.
    large = gates.max_length(huge)
    assert not gates.fixed_bound_exact(large, large, large, 0.0, exponent_scale=2.0**-180, kv_seq_len=4, centred=True)
    ordinary = gates.max_length(tiny * 2.0**70)
    inside = {"exponent_scale": 1.0, "kv_seq_len": 1021, "centred": True}
    assert gates.fixed_bound_exact(ordinary, ordinary, ordinary, -80.0, **inside)
    assert not gates.fixed_bound_exact(ordinary, ordinary, ordinary, -95.0, **inside)  # products with v underflow
