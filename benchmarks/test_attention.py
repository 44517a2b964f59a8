"""Our "xla" attention beside JAX's own and the reference, in float32 on the machine that is here."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from splash_attn import attention, attention_reference

#: [batch, heads, seq, head_dim]
SHAPES = [(1, 4, 1560, 64), (1, 2, 1560, 128)]


def jax_nn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """jax.nn.dot_product_attention takes [batch, seq, heads, head_dim]."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v).swapaxes(1, 2)


IMPLEMENTATIONS = {"jax.nn": jax_nn, "splash_attn xla": attention, "reference": attention_reference}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_attention(beside: Callable[..., Any], shape: tuple[int, ...], name: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3))
    call = jax.jit(IMPLEMENTATIONS[name])
    actual = beside(
        lambda: call(q, k, v).block_until_ready(),
        group=f"attention {'x'.join(map(str, shape))} float32",
        name=name,
        baseline=name == "jax.nn",
    )
    np.testing.assert_allclose(actual, attention_reference(q, k, v), atol=1e-4)
