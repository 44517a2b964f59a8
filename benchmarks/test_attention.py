"""Attention on the machine that is here, side by side: `make bench`.

Compare the rows of one run with one another: on a CPU they say how the "xla" implementation does next to JAX's own, and
nothing about a TPU. The interpreted kernel is not here, its time means nothing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from splash_attn import attention, attention_reference

SHAPES = {"video 1x4x1560x64": (1, 4, 1560, 64), "video 1x2x1560x128": (1, 2, 1560, 128)}


def jax_nn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """jax.nn.dot_product_attention takes [batch, seq, heads, head_dim]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v).swapaxes(1, 2)


IMPLEMENTATIONS = {"splash_attn": attention, "reference": functools.partial(attention_reference), "jax.nn": jax_nn}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(benchmark: BenchmarkFixture, shape: str, name: str) -> None:
    benchmark.group = f"{shape}, float32, {jax.devices()[0].device_kind}"
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(SHAPES[shape]), jnp.float32) for _ in range(3))
    call = jax.jit(IMPLEMENTATIONS[name])
    expected = attention_reference(q, k, v)
    np.testing.assert_allclose(call(q, k, v), expected, atol=1e-4)
    benchmark.pedantic(lambda: call(q, k, v).block_until_ready(), rounds=10, warmup_rounds=2)
