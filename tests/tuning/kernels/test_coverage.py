"""Results that a kernel leaves partly unwritten."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tuning.kernels.coverage import unwritten

ROWS = 1000
X = jax.ShapeDtypeStruct((ROWS, 256), jnp.float32)


def doubled(x, grid, block, index_map):
    """Twice x by a kernel that is called as told."""

    def body(*refs):
        refs[-1][...] = refs[-2][...] * 2

    spec = pl.BlockSpec(block, index_map)
    call = pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=grid, in_specs=[spec], out_specs=spec
    )
    return call(x)


def of(function, *arguments):
    return unwritten(jax.make_jaxpr(function)(*arguments))


@pytest.mark.parametrize(
    ("grid", "block", "index_map", "expected"),
    [
        ((3,), (256, 256), lambda i: (i, 0), ["3 of the 4 blocks of float32[1000,256]"]),
        ((4,), (256, 256), lambda i: (i, 0), []),
        ((4, 2), (256, 128), lambda i, j: (i, j), []),
        ((4, 2), (256, 128), lambda i, j: (i, 0), ["4 of the 8 blocks of float32[1000,256]"]),
        ((2, 4), (256, 256), lambda i, j: (j, 0), []),
        ((ROWS,), (None, 256), lambda i: (i, 0), []),
        ((ROWS - 1,), (None, 256), lambda i: (i, 0), ["999 of the 1000 blocks of float32[1000,256]"]),
        ((3,), (256, 256), lambda i: (3 - i, 0), ["3 of the 4 blocks of float32[1000,256]"]),
        ((9,), (256, 256), lambda i: (jnp.minimum(i, 3), 0), []),
        ((), None, None, []),
    ],
)
def test_blocks_that_no_step_writes_are_counted(grid, block, index_map, expected):
    assert of(functools.partial(doubled, grid=grid, block=block, index_map=index_map), X) == expected


def test_a_result_is_followed_through_reshapes_and_jit():
    @jax.jit
    def function(x):
        y = jax.jit(functools.partial(doubled, grid=(3,), block=(256, 256), index_map=lambda i: (i, 0)))(x)
        return x, jax.jit(lambda y: y.reshape(-1).astype(jnp.bfloat16))(y).reshape(256, ROWS)

    assert of(function, X) == ["3 of the 4 blocks of float32[1000,256]"]


def test_what_is_no_result_or_not_known_is_left_alone():
    partly = functools.partial(doubled, grid=(3,), block=(256, 256), index_map=lambda i: (i, 0))
    assert of(lambda x: partly(x)[:768], X) == []
    assert of(lambda x: partly(x) + x, X) == []

    def by_table(table, x):
        spec = pl.BlockSpec((256, 256), lambda i, table: (table[i], 0))
        grid = pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, grid=(3,), in_specs=[spec], out_specs=spec)

        def body(table_ref, x_ref, out_ref):
            out_ref[...] = x_ref[...]

        return pl.pallas_call(body, grid_spec=grid, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(table, x)

    assert of(by_table, jax.ShapeDtypeStruct((3,), jnp.int32), X) == []


def test_a_result_that_goes_on_from_an_argument_is_whole():
    def function(x):
        spec = pl.BlockSpec((256, 256), lambda i: (i, 0))

        def body(x_ref, out_ref):
            out_ref[...] = x_ref[...] * 2

        return pl.pallas_call(
            body,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(3,),
            in_specs=[spec],
            out_specs=spec,
            input_output_aliases={0: 0},
        )(x)

    assert of(function, X) == []
