"""Norm and modulation of tokens as one TPU kernel, in their dtype or turned and rounded to int8: x is read once.

XLA reads x twice for the first and three times for the second: for the norm's statistics, for the largest of each row,
and for the result.
"""

import functools
import math
from typing import Any

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


def modulate_on_tpu(
    x: Float[Array, "batch rows channels"],
    scale: Float[Array, "2 channels"],
    shift: Float[Array, "2 channels"],
    num_text: jax.Array,
    eps: float,
    quantize: bool,
    interpret: bool = False,
) -> jax.Array | Quantized:
    """Return norm(x) * scale + shift in x's dtype; or, to `quantize`, turned by blocks of channels, in int8 by row.

    scale, shift: float32, of text and of video; num_text: int32 [], how many rows, the first ones, are text.
    """
    batch, rows, channels = x.shape
    block_rows = min(_BLOCK_ROWS, -(-rows // 32) * 32)
    tokens = pl.BlockSpec((None, block_rows, channels), lambda b, i, _: (b, i, 0))
    by_kind = pl.BlockSpec((2, channels), lambda b, i, _: (0, 0))
    in_specs, operands = [tokens, by_kind, by_kind], [num_text[None], x, scale, shift]
    out_specs, out_shape, scratch = [tokens], [jax.ShapeDtypeStruct(x.shape, x.dtype)], []
    if quantize:
        size = int8.block_size(channels)
        in_specs.append(pl.BlockSpec((size, size), lambda b, i, _: (0, 0)))
        operands.append(jnp.asarray(int8.signs(size), x.dtype))
        out_specs.append(pl.BlockSpec((None, block_rows, 1), lambda b, i, _: (b, i, 0)))
        out_shape = [
            jax.ShapeDtypeStruct(x.shape, jnp.int8),
            jax.ShapeDtypeStruct((batch, rows, 1), jnp.float32),
        ]
        scratch = [pltpu.VMEM((block_rows, channels), dtype) for dtype in (x.dtype, jnp.float32)]
    call = pl.pallas_call(
        functools.partial(_quantizing_kernel if quantize else _modulate, eps=eps),
        name="modulate_quantize" if quantize else "modulate",
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(rows, block_rows)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
    )
    values, *step = call(*operands)
    return Quantized(values, step[0][..., 0]) if quantize else values


def modulate_in_xla(
    x: jax.Array, scale: jax.Array, shift: jax.Array, num_text: jax.Array, eps: float, quantize: bool
) -> jax.Array | Quantized:
    """Return what `modulate_on_tpu` does, on any device."""
    normed = x.astype(jnp.float32)
    normed -= normed.mean(-1, keepdims=True)
    normed *= lax.rsqrt(jnp.square(normed).mean(-1, keepdims=True) + eps)
    is_text = (jnp.arange(x.shape[1]) < num_text)[:, None]
    by_row = (jnp.where(is_text, each[0], each[1]) for each in (scale, shift))
    modulated = (normed * next(by_row) + next(by_row)).astype(x.dtype)
    if not quantize:
        return modulated
    turned = int8.rotate(modulated, int8.block_size(x.shape[-1]))
    step = int8.scale_of(jnp.abs(turned).max(-1))
    return Quantized(int8.to_steps(turned, step[..., None]), step)


def _modulate(num_text_ref: Any, x_ref: Any, scale_ref: Any, shift_ref: Any, out_ref: Any, *, eps: float) -> None:
    """Write a block of rows, a few at a time, so that these stay in registers."""
    block_rows = x_ref.shape[0]
    first_row = pl.program_id(1) * block_rows

    def rows_of_a_block(has_text: bool) -> None:
        def chunk(index: jax.Array, _: tuple[()]) -> tuple[()]:
            start = index * _CHUNK_ROWS
            rows = pl.ds(pl.multiple_of(start, _CHUNK_ROWS), _CHUNK_ROWS)
            x = x_ref[rows].astype(jnp.float32)
            x -= x.mean(-1, keepdims=True)
            x *= lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)
            scale, shift = scale_ref[1:2], shift_ref[1:2]
            if has_text:
                ids = first_row + start + lax.broadcasted_iota(jnp.int32, (_CHUNK_ROWS, 1), 0)
                is_text = ids < num_text_ref[0]
                scale, shift = jnp.where(is_text, scale_ref[0:1], scale), jnp.where(is_text, shift_ref[0:1], shift)
            out_ref[rows] = (x * scale + shift).astype(out_ref.dtype)
            return ()

        lax.fori_loop(0, block_rows // _CHUNK_ROWS, chunk, (), unroll=2)

    pl.when(first_row < num_text_ref[0])(lambda: rows_of_a_block(True))
    pl.when(first_row >= num_text_ref[0])(lambda: rows_of_a_block(False))


def _quantizing_kernel(
    num_text_ref: Any,
    x_ref: Any,
    scale_ref: Any,
    shift_ref: Any,
    signs_ref: Any,
    values_ref: Any,
    step_ref: Any,
    modulated_ref: Any,
    turned_ref: Any,
    *,
    eps: float,
) -> None:
    _modulate(num_text_ref, x_ref, scale_ref, shift_ref, modulated_ref, eps=eps)
    channels, size = x_ref.shape[1], signs_ref.shape[0]
    largest = jnp.zeros((x_ref.shape[0], size), jnp.float32)
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None
    for start in range(0, channels, size):
        columns = slice(start, start + size)
        turned = jnp.dot(
            modulated_ref[:, columns], signs_ref[...], preferred_element_type=jnp.float32, precision=precision
        )
        turned_ref[:, columns] = turned
        largest = jnp.maximum(largest, jnp.abs(turned))
    step = int8.scale_of(largest.max(-1, keepdims=True))
    for start in range(0, channels, size):
        columns = slice(start, start + size)
        values_ref[:, columns] = jnp.round(turned_ref[:, columns] * (1 / step)).astype(jnp.int8)
    step_ref[...] = step / math.sqrt(size)
