"""Norm, modulation, turn and rounding to int8 of tokens as one TPU kernel: x is read once, and half as much written.

XLA reads x three times for it: for the norm's statistics, for the largest of each row, and to round.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pipeline.model.layers import int8
from pipeline.model.layers.int8 import Quantized

_BLOCK_ROWS = 256
_CHUNK_ROWS = 16


def modulate_quantize(
    x: Float[Array, "batch rows channels"],
    scale: Float[Array, "2 channels"],
    shift: Float[Array, "2 channels"],
    num_text: jax.Array,
    eps: float,
    interpret: bool = False,
) -> Quantized:
    """Return norm(x) * scale + shift, turned by blocks of channels, in int8 by row.

    scale, shift: float32, of text and of video; num_text: int32 [], how many rows, the first ones, are text.
    """
    batch, rows, channels = x.shape
    size = int8.block_size(channels)
    block_rows = min(_BLOCK_ROWS, -(-rows // 32) * 32)
    values, step = pl.pallas_call(
        functools.partial(_kernel, eps=eps, size=size),
        name="modulate_quantize",
        out_shape=(
            jax.ShapeDtypeStruct((batch, rows, channels), jnp.int8),
            jax.ShapeDtypeStruct((batch, rows, 1), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(rows, block_rows)),
            in_specs=[
                pl.BlockSpec((None, block_rows, channels), lambda b, i, _: (b, i, 0)),
                pl.BlockSpec((2, channels), lambda b, i, _: (0, 0)),
                pl.BlockSpec((2, channels), lambda b, i, _: (0, 0)),
                pl.BlockSpec((size, size), lambda b, i, _: (0, 0)),
            ],
            out_specs=[
                pl.BlockSpec((None, block_rows, channels), lambda b, i, _: (b, i, 0)),
                pl.BlockSpec((None, block_rows, 1), lambda b, i, _: (b, i, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((block_rows, channels), x.dtype),
                pltpu.VMEM((block_rows, channels), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )(num_text[None], x, scale, shift, jnp.asarray(int8.signs(size), x.dtype))
    return Quantized(values, step[..., 0])


def in_xla(x: jax.Array, scale: jax.Array, shift: jax.Array, num_text: jax.Array, eps: float) -> Quantized:
    """Return what `modulate_quantize` does, on any device."""
    normed = x.astype(jnp.float32)
    normed -= normed.mean(-1, keepdims=True)
    normed *= lax.rsqrt(jnp.square(normed).mean(-1, keepdims=True) + eps)
    is_text = (jnp.arange(x.shape[1]) < num_text)[:, None]
    modulated = normed * jnp.where(is_text, scale[0], scale[1]) + jnp.where(is_text, shift[0], shift[1])
    turned = int8.rotate(modulated.astype(x.dtype), int8.block_size(x.shape[-1]))
    step = int8.scale_of(jnp.abs(turned).max(-1))
    return Quantized(int8.to_steps(turned, step[..., None]), step)


def _kernel(
    num_text_ref, x_ref, scale_ref, shift_ref, signs_ref, values_ref, step_ref, modulated_ref, turned_ref, *, eps, size
):  # type: ignore[no-untyped-def]
    block_rows, channels = x_ref.shape
    first_row = pl.program_id(1) * block_rows

    def modulate_rows(has_text: bool) -> None:
        def chunk(index, _):  # type: ignore[no-untyped-def]
            start = index * _CHUNK_ROWS
            rows = pl.ds(start, _CHUNK_ROWS)
            x = x_ref[rows].astype(jnp.float32)
            mean = x.mean(-1, keepdims=True)
            x -= mean
            x *= lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
            if has_text:
                ids = first_row + start + lax.broadcasted_iota(jnp.int32, (_CHUNK_ROWS, 1), 0)
                is_text = ids < num_text_ref[0]
                scale, shift = (jnp.where(is_text, ref[0:1], ref[1:2]) for ref in (scale_ref, shift_ref))
            else:
                scale, shift = scale_ref[1:2], shift_ref[1:2]
            modulated_ref[rows] = (x * scale + shift).astype(modulated_ref.dtype)
            return ()

        lax.fori_loop(0, block_rows // _CHUNK_ROWS, chunk, (), unroll=2)

    pl.when(first_row < num_text_ref[0])(functools.partial(modulate_rows, True))
    pl.when(first_row >= num_text_ref[0])(functools.partial(modulate_rows, False))
    largest = jnp.zeros((block_rows, size), jnp.float32)
    exact = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    for start in range(0, channels, size):
        columns = slice(start, start + size)
        turned = jnp.dot(modulated_ref[:, columns], signs_ref[...], preferred_element_type=jnp.float32, precision=exact)
        turned_ref[:, columns] = turned
        largest = jnp.maximum(largest, jnp.abs(turned))
    step = int8.scale_of(largest.max(-1, keepdims=True))
    inverse = 1 / step
    for start in range(0, channels, size):
        columns = slice(start, start + size)
        values_ref[:, columns] = jnp.round(turned_ref[:, columns] * inverse).astype(jnp.int8)
    step_ref[...] = step / math.sqrt(size)
