"""The kernels of norms against the same in XLA, which the stages' tests compare with diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.layers.norm_kernel import modulate_in_xla, modulate_on_tpu
from pipeline.model.layers.norms import norm_rotary_in_xla
from pipeline.model.layers.qk_kernel import norm_rotary_on_tpu

TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-5}  # a unit in the last place of values up to 8


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("parts", "rows", "rotated"),
    [
        (1, 40, True),
        (1, 2176, True),
        (1, 40, False),
        (4, 256, True),
        (3, 40, True),
        (8, 264, True),
        pytest.param(1, 2176, False, marks=pytest.mark.slow("3 s")),
    ],
)
def test_queries(parts, rows, rotated, dtype, rng):
    x = jnp.asarray(rng.normal(size=(parts, 2, 6, 32, rows)), dtype)
    weight, bias = (jnp.asarray(rng.normal(size=32), jnp.float32) for _ in range(2))
    angles = rng.normal(size=(16, parts * rows))
    rotary = tuple(jnp.asarray(each(angles), jnp.float32) for each in (np.cos, np.sin)) if rotated else None
    actual = norm_rotary_on_tpu(x, weight, bias, rotary, 1e-6, interpret=True)
    expected = norm_rotary_in_xla(x, weight, bias, rotary, 1e-6)
    assert (actual.dtype, actual.shape) == (x.dtype, (2, 6, 32, parts * rows))
    difference = np.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32))
    assert difference.max() < TOLERANCE[dtype]
    assert difference.mean() < TOLERANCE[dtype] / 100


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("num_text", [0, 7, 43])
def test_tokens(num_text, dtype, rng):
    x = jnp.asarray(rng.normal(size=(2, 43, 96)), dtype)
    scale, shift = (jnp.asarray(rng.normal(size=(2, 96)), jnp.float32) for _ in range(2))
    actual = modulate_on_tpu(x, scale, shift, jnp.int32(num_text), 1e-5, False, interpret=True)
    expected = modulate_in_xla(x, scale, shift, jnp.int32(num_text), 1e-5, False)
    assert actual.dtype == x.dtype
    difference = np.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32))
    assert difference.max() < 2 * TOLERANCE[dtype]
    assert difference.mean() < TOLERANCE[dtype] / 100
