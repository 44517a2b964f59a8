from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from offline_tpu import integers

SIZES = np.array([3, 0, 13], np.int32)


def _kernel(steps: jax.Array, ids: jax.Array, x: jax.Array) -> jax.Array:
    def body(ids_ref, x_ref, o_ref):  # type: ignore[no-untyped-def]
        o_ref[...] = x_ref[...]

    spec = pl.BlockSpec((8, 128), lambda i, ids: (ids[i], 0))
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(steps,), in_specs=[spec], out_specs=spec),
        name="gather",
    )(ids, x)


@jax.jit
def _ragged(x: jax.Array, sizes: jax.Array) -> jax.Array:
    ids = jnp.repeat(jnp.arange(3, dtype=jnp.int32), sizes, total_repeat_length=17)
    return _kernel(sizes.sum(), ids, x)


def _find(fn: Callable[..., jax.Array], *args: object, values: dict[int, np.ndarray]) -> integers.Integers:
    return integers.find(jax.jit(fn).trace(*args).jaxpr, values)


X = jax.ShapeDtypeStruct((24, 128), jnp.float32)
ABSTRACT_SIZES = jax.ShapeDtypeStruct(SIZES.shape, jnp.int32)


def test_grid_sizes_and_prefetched_scalars_are_computed_from_arguments() -> None:
    found = _find(_ragged, X, ABSTRACT_SIZES, values={1: SIZES})
    assert found.kernels == {"gather": {0: (16,), 1: (0,) * 3 + (2,) * 14}}
    assert found.parameters == {1: (3, 0, 13)}


def test_grid_sizes_and_prefetched_scalars_are_computed_from_constants() -> None:
    found = _find(lambda x: _ragged(x, jnp.asarray(SIZES)), X, values={})
    assert found.kernels["gather"][0] == (16,)


@pytest.mark.parametrize("values", [{}, {1: SIZES}])
def test_what_depends_on_other_arguments_is_unknown(values: dict[int, np.ndarray]) -> None:
    def data_dependent(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return _kernel(x[0, 0].astype(jnp.int32), sizes, x)

    assert 0 not in _find(data_dependent, X, ABSTRACT_SIZES, values=values).kernels["gather"]


def test_operands_of_kernels_of_one_name_that_differ_are_unknown() -> None:
    def twice(x: jax.Array, sizes: jax.Array) -> jax.Array:
        return _kernel(jnp.int32(2), sizes, _kernel(jnp.int32(3), sizes, x))

    assert _find(twice, X, ABSTRACT_SIZES, values={1: SIZES}).kernels == {"gather": {1: (3, 0, 13)}}


def test_parameters_are_numbered_without_arguments_that_are_not_used() -> None:
    def fn(unused: jax.Array, x: jax.Array, sizes: jax.Array) -> jax.Array:
        del unused
        return x + sizes.sum()

    assert _find(fn, X, X, ABSTRACT_SIZES, values={2: SIZES}).parameters == {1: (3, 0, 13)}
