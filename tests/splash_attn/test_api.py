"""The public call: what it refuses, what it chooses, and the "xla" implementation."""

import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from splash_attn import SEED_BLOCK_SIZES, AttentionShape, BlockSizes, Variant, api, attention, attention_reference


def arrays(*shapes: tuple[int, ...], dtype: object = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(7)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 2, 5, 64), (1, 2, 7, 64), (1, 2, 9, 64)], r"v.shape=\(1, 2, 9, 64\): expected k's shape"),
        ([(1, 2, 5, 64), (1, 3, 7, 64), (1, 3, 7, 64)], "expected batch, heads and head_dim of q"),
        ([(2, 5, 64), (2, 7, 64), (2, 7, 64)], r"expected \[batch, heads, seq, head_dim\]"),
        ([(1, 2, 5, 60), (1, 2, 7, 60), (1, 2, 7, 60)], r"head_dim=60: expected a multiple of 8 up to 256"),
        ([(1, 2, 5, 264), (1, 2, 7, 264), (1, 2, 7, 264)], "head_dim=264: expected a multiple of 8 up to 256"),
        ([(1, 2, 5, 64), (1, 2, 0, 64), (1, 2, 0, 64)], "expected no empty dimension"),
    ],
)
def test_refuses_shapes(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(*arrays(*shapes))


def test_refuses_dtypes() -> None:
    q, k, v = arrays((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8))
    with pytest.raises(ValueError, match=r"k\.dtype=bfloat16: expected q's dtype, float32"):
        attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match=r"q\.dtype=int32: expected one of"):
        attention(*(x.astype(jnp.int32) for x in (q, k, v)))


def test_refuses_another_byte_order() -> None:
    x = np.ones((1, 1, 5, 8), ">f4")
    with pytest.raises(ValueError, match=r"^q\.dtype=>f4: expected the byte order of this machine; use q\.astype"):
        attention(x, x, x)


def test_reference_refuses_what_would_be_broadcast() -> None:
    q, k = arrays((2, 2, 5, 8), (1, 2, 5, 8))
    with pytest.raises(ValueError, match=r"k\.shape=\(1, 2, 5, 8\).*expected .* alike"):
        attention_reference(q, k, k)


@pytest.mark.compile
@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_keys_that_do_not_count_may_hold_anything(implementation: str) -> None:
    q, k = arrays((1, 1, 5, 8), (1, 1, 7, 8))
    behind = k.at[:, :, 6:].set(jnp.nan)
    how = {"implementation": implementation, "kv_seq_len": np.int64(6)}
    np.testing.assert_array_equal(attention(q, behind, behind, **how), attention(q, k, k, **how))
    with pytest.raises(ValueError, match="k holds NaN"):
        attention(q, k.at[0, 0, 5, 0].set(jnp.inf), behind, **how)


@pytest.mark.parametrize("make", [torch.from_numpy, np.ndarray.tolist, memoryview])
def test_refuses_other_arrays_by_their_type(make: Callable[[np.ndarray], object]) -> None:
    x = np.zeros((1, 1, 5, 8), np.float32)
    with pytest.raises(ValueError, match=r"^k is a [\w.]+: expected a JAX or NumPy array; use [^\n]*\.$"):
        attention(x, make(x), x)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["0.1", True, 10**400, 1j, [1.0, 2.0], np.ones(2), None])
def test_scale_is_one_number_known_when_tracing(scale: object) -> None:
    q, k, v = arrays((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8))
    if scale is None:
        with pytest.raises(
            ValueError, match=r"^scale is traced: expected a number known when tracing; name it in [^\n]*scale=1\.0\."
        ):
            jax.jit(lambda scale: attention(q, k, v, scale=scale))(0.5)
        for number in (np.float32(0.5), jnp.float32(0.5), np.array(0.5)):
            np.testing.assert_array_equal(attention(q, k, v, scale=number), attention(q, k, v, scale=0.5))
    else:
        with pytest.raises(ValueError, match=r"^scale=[^\n]*: expected a finite number\.$"):
            attention(q, k, v, scale=scale)  # type: ignore[arg-type]


def test_refuses_options_of_another_type() -> None:
    q, k, v = arrays((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8))
    for options in ({"block_sizes": (128, 128, 128)}, {"variant": "online"}, {"k_smooth": 1}):
        with pytest.raises(ValueError, match="expected"):
            attention(q, k, v, interpret=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_values_that_are_not_finite(bad: float) -> None:
    q, k, v = arrays((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8))
    with pytest.raises(ValueError, match="v holds NaN or infinity"):
        attention(q, k, v.at[0, 0, 3, 2].set(bad))
    with pytest.raises(ValueError, match="scale="):
        attention(q, k, v, scale=bad)


def test_refuses_unknown_and_contradicting_implementations() -> None:
    q, k, v = arrays((1, 1, 5, 8), (1, 1, 7, 8), (1, 1, 7, 8))
    with pytest.raises(ValueError, match="implementation='cuda': expected one of"):
        attention(q, k, v, implementation="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="contradicts"):
        attention(q, k, v, implementation="xla", interpret=True)
    with pytest.raises(ValueError, match="on a device of kind 'cpu': expected a TPU"):
        attention(q, k, v, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="qk_dtype='int4': expected one of"):
        attention(q, k, v, qk_dtype="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="qk_dtype='int8' contradicts variant="):
        attention(q, k, v, qk_dtype="int8", variant=Variant())


def test_choice_by_platform_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="splash_attn"):
        attention(*arrays((1, 1, 17, 8), (1, 1, 19, 8), (1, 1, 19, 8)))  # logged once a shape
    assert "1x1x17:19x8: xla: the device is 'cpu'" in caplog.text


def test_resolves_for_a_device_that_is_not_here() -> None:
    shape = AttentionShape(1, 12, 39826, 39826, 64)
    assert api.resolve(shape, device_kind="TPU v6 lite").implementation == "pallas_tpu"
    assert api.resolve(shape, device_kind="TPU v6 lite").block_sizes is not None
    asked = api.resolve(shape, device_kind="TPU v6 lite", block_sizes=SEED_BLOCK_SIZES, variant=Variant("online"))
    assert (asked.block_sizes, asked.variant) == (SEED_BLOCK_SIZES, Variant("online"))
    assert api.resolve(shape, device_kind="cpu").implementation == "xla"


def test_blocks_are_clamped_to_short_sequences() -> None:
    resolution = api.resolve(AttentionShape(1, 1, 7, 300, 64), block_sizes=SEED_BLOCK_SIZES, interpret=True)
    assert resolution.block_sizes == BlockSizes(128, 512, 256)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("chunk_bytes", [2**28, 2**12])
def test_xla_matches_float64(dtype: object, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_XLA_SCORE_BYTES", chunk_bytes)  # the small one makes it work in chunks
    q, k, v = arrays((2, 3, 67, 40), (2, 3, 131, 40), (2, 3, 131, 40), dtype=dtype)
    actual = attention(q, k, v, implementation="xla")
    expected = attention_reference(q, k, v, dtype=np.float64)
    # float32 sums of 131 terms; a half-precision result is rounded once.
    tolerance = {4: 2e-6, 2: 2**-8}[actual.dtype.itemsize]
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, atol=tolerance)


def test_works_under_jit_and_vmap() -> None:
    q, k, v = arrays((2, 2, 17, 16), (2, 2, 29, 16), (2, 2, 29, 16))
    expected = attention(q, k, v)
    np.testing.assert_allclose(jax.jit(attention)(q, k, v), expected, atol=1e-6)


def test_reference_in_float32_and_float64_agree() -> None:
    q, k, v = arrays((1, 2, 17, 16), (1, 2, 29, 16), (1, 2, 29, 16))
    actual = attention_reference(q, k, v)
    np.testing.assert_allclose(actual, attention_reference(q, k, v, dtype=np.float64), atol=2e-6)
    with pytest.raises(ValueError, match=r"expected numpy\.float32 or numpy\.float64"):
        attention_reference(q, k, v, dtype=np.float16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_seq_len": 0}, r"kv_seq_len=0: expected an integer from 1 to 6, the keys that there are"),
        ({"kv_seq_len": 7}, r"kv_seq_len=7: expected an integer from 1 to 6"),
    ],
)
def test_lengths_that_cannot_be(options, message):
    q, k = jnp.zeros((1, 1, 8, 16)), jnp.zeros((1, 1, 6, 16))
    with pytest.raises(ValueError, match=message):
        attention(q, k, k, **options)
