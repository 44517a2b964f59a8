"""LayerNorm and rotary embedding of queries or keys as one TPU kernel: one read and one write.

XLA reads them three times, and writes the two halves of each head before it joins them. What several devices sent, part
by part of the sequence, is joined by where it is written.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

LANES = 128
_MAX_ROWS = 2048
_HEADS = 6


def norm_rotary_on_tpu(
    x: Float[Array, "parts batch heads head_dim rows"],
    weight: Float[Array, " head_dim"],
    bias: Float[Array, " head_dim"],
    rotary: tuple[Float[Array, "half all_rows"], Float[Array, "half all_rows"]] | None,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "batch heads head_dim all_rows"]:
    """Return what `pipeline.model.layers.norms.norm_rotary_in_xla` does; weight and bias in float32."""
    if x.shape[0] > 1 and x.shape[-1] % LANES:
        x = jnp.concatenate(list(x), axis=3)[None]  # a part would not begin at a whole register
    parts, batch, heads, head_dim, rows = x.shape
    block_rows, block_heads = _block_rows(rows), next(n for n in range(_HEADS, 0, -1) if heads % n == 0)
    chunk = LANES if block_rows % LANES == 0 else block_rows
    affine = [jnp.broadcast_to(each[:, None], (head_dim, chunk)) for each in (weight, bias)]
    blocks = pl.cdiv(rows, block_rows)  # of a part
    table = pl.BlockSpec((head_dim // 2, block_rows), lambda b, i, h: (0, i))
    whole = pl.BlockSpec((head_dim, chunk), lambda b, i, h: (0, 0))
    given = pl.BlockSpec(
        (None, None, block_heads, head_dim, block_rows), lambda b, i, h: (i // blocks, b, h, 0, i % blocks)
    )
    joined = pl.BlockSpec((None, block_heads, head_dim, block_rows), lambda b, i, h: (b, h, 0, i))
    tables = [] if rotary is None else list(rotary)
    return pl.pallas_call(
        functools.partial(_kernel, eps=eps),
        name="norm_rotary",
        out_shape=jax.ShapeDtypeStruct((batch, heads, head_dim, parts * rows), x.dtype),
        grid=(batch, parts * blocks, heads // block_heads),
        in_specs=[given, whole, whole, *[table] * len(tables)],
        out_specs=joined,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
        interpret=interpret,
    )(x, *affine, *tables)


def _block_rows(rows: int) -> int:
    """Return how many rows, on lanes, are taken at a time: whole registers that divide them if any do; all of a few."""
    if rows <= _MAX_ROWS:
        return rows
    return next((size for size in range(_MAX_ROWS, 0, -LANES) if rows % size == 0), _MAX_ROWS)


def _kernel(x_ref: Any, weight_ref: Any, bias_ref: Any, *refs: Any, eps: float) -> None:
    *tables, out_ref = refs
    block_heads, head_dim, block_rows = x_ref.shape
    chunk, half = weight_ref.shape[1], head_dim // 2

    def columns(index: jax.Array, _: tuple[()]) -> tuple[()]:
        rows = pl.ds(pl.multiple_of(index * chunk, chunk), chunk)
        weight, bias = weight_ref[...], bias_ref[...]
        cos_sin = [table[:, rows] for table in tables]
        for head in range(block_heads):
            x = x_ref[head, :, rows].astype(jnp.float32)
            x -= x.mean(0, keepdims=True)
            x = x * lax.rsqrt(jnp.square(x).mean(0, keepdims=True) + eps) * weight + bias
            if cos_sin:
                (cos, sin), even, odd = cos_sin, x[:half], x[half:]
                x = jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin])
            out_ref[head, :, rows] = x.astype(out_ref.dtype)
        return ()

    lax.fori_loop(0, block_rows // chunk, columns, ())
