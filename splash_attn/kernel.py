"""The Pallas TPU kernel: softmax attention over one chip's heads, in [kv, q] orientation.

Scores are computed as S^T = K Q^T, so that the softmax reduces over sublanes (cheap vector adds, no cross-lane work)
and the probabilities are the stationary MXU operand of O^T = V^T P^T, whose 256-deep contraction runs the MXU at full
width.

Work goes through the block in tiles of `block_kv_compute` keys by `block_q_compute` queries. The kernel is unrolled and
software-pipelined by hand: the scores of the next `lookahead` tiles are issued to the MXU before a tile's exponentials
are taken, so that the MXU never waits for the vector unit. Without it the compiler schedules the tiles one by one.
Filling and draining the pipeline costs some 300 cycles, once every `unroll_q` queries.

Three ways to the same softmax; `splash_attn.gates` says, with proof, which heads may take which:

* "online" keeps a running maximum and rescales, as FlashAttention does (Dao et al., arXiv:2205.14135). The vector unit
  is its bottleneck, so the row sums come from the MXU, as rows of ones under V^T. It takes any finite input: queries
  and values are scaled by powers of two, once a block, and scores by the rest, less their maximum.
* "fixed_bound" subtracts one number a query, known beforehand, which removes the maximum and every rescale. The number
  rides along in the contraction: in registers, q gets a row that holds it and k a column of ones, and the MXU, whose
  contraction is 256 deep, adds it for nothing.
* "fixed_bound" with int8 q and k: the MXU makes scores twice as fast, and what limits then is the exponentials, taken
  in bfloat16, two at a time. Not exact: an option for who wants it, within a budget.

q and k keep the values that they came with (int8 apart): the scale and log2(e) multiply the float32 scores, so that no
operand is rounded a second time.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from splash_attn import tiles
from splash_attn.tiles import SHIFT_ROWS, SUBLANES, Tile, last_block_unroll_q
from splash_attn.types import LANES, AttentionShape, BlockSizes, Variant

#: What a query's largest component is scaled to, so that no score of head_dim 256 overflows float32.
_QUERY_SCALE = 2.0**-13
_EXPONENT_BITS, _MANTISSA_BITS = 0x7F800000, 23


def vmem_bytes_estimate(shape: AttentionShape, block_sizes: BlockSizes, variant: Variant, itemsize: int = 2) -> int:
    """VMEM that the kernel asks for: double-buffered windows of q, k, v and the output, and the scratch.

    What the compiler spills comes on top.
    """
    sublanes_dim = -(-shape.head_dim // SUBLANES) * SUBLANES
    lanes_dim = -(-shape.head_dim // LANES) * LANES
    q_and_out = 2 * 2 * sublanes_dim * block_sizes.block_q * itemsize
    int8 = variant.qk_dtype == "int8"
    k_and_v = 2 * ((lanes_dim if int8 else sublanes_dim) + sublanes_dim) * block_sizes.block_kv * itemsize
    scratch = (sublanes_dim + 2 * SUBLANES + tiles.row_scratch_rows(variant) + SUBLANES) * 4 * block_sizes.block_q
    scratch += itemsize * math.prod(tiles.side_scratch_shape(sublanes_dim, block_sizes, variant))
    keys, key_lanes = tiles.key_scratch_shape(shape.head_dim, block_sizes, variant)
    scratch += itemsize * keys * -(-key_lanes // LANES) * LANES
    scratch += 4 * math.prod(tiles.score_scratch_shape(block_sizes, variant))
    return q_and_out + k_and_v + scratch


def _by_sublane_group(x: jax.Array) -> jax.Array:
    """[rows, queries] -> [rows // 8, 8, queries]: sums and maxima over the first axis are plain vector operations."""
    return x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1])


def _normalize_queries(q_ref, scaled_ref, row_scratch_ref, exponent_scale: float) -> None:
    """Scale queries by powers of two, so that no score overflows; keep what scales the scores; start the maximum."""

    @pl.loop(0, q_ref.shape[1] // LANES)
    def _(i):
        queries = pl.ds(pl.multiple_of(i * LANES, LANES), LANES)
        q = q_ref[:, queries].astype(jnp.float32)
        bits = lax.bitcast_convert_type(jnp.abs(q).max(axis=0, keepdims=True), jnp.int32) & _EXPONENT_BITS
        bits = jnp.clip(bits, 1 << _MANTISSA_BITS, 253 << _MANTISSA_BITS)
        down = lax.bitcast_convert_type((254 << _MANTISSA_BITS) - bits, jnp.float32)
        up = lax.bitcast_convert_type(bits, jnp.float32)
        scaled_ref[:, queries] = (q * down * math.copysign(_QUERY_SCALE, exponent_scale)).astype(scaled_ref.dtype)
        scale = jnp.clip(up * min(abs(exponent_scale) / _QUERY_SCALE, 2.0**127), 2.0**-126, 2.0**127)
        row_scratch_ref[:SUBLANES, queries] = jnp.full((SUBLANES, LANES), -jnp.inf, jnp.float32)
        row_scratch_ref[SUBLANES:, queries] = jnp.broadcast_to(scale, (SUBLANES, LANES))


def _kernel_body(
    head_ids_ref,  # [heads] in SMEM: which head each grid row works on
    v_scale_ref,  # [heads] in SMEM: see `splash_attention_kernel`
    q_ref,  # [head_dim, block_q]
    k_ref,  # [head_dim, block_kv]; int8: [block_kv, head_dim]
    v_ref,  # [head_dim, block_kv]
    per_query_ref,  # [1, block_q]: see `splash_attention_kernel`
    *refs,  # the output of an earlier call that this one continues, if there is one; the output; the scratch
    kv_seq_len: int,
    exponent_scale: float,
    block_sizes: BlockSizes,
    variant: Variant,
):
    # row_scratch_ref holds what the softmax needs for each query, 8 rows of it: the sum by sublane ("fixed_bound"), the
    # scale of the scores (int8), or the running maximum and then the scale of the scores ("online").
    o_ref, side_scratch_ref, row_scratch_ref, acc_scratch_ref, s_scratch_ref, key_scratch_ref = refs[-6:]
    bq, bkv, bkv_compute = block_sizes.block_q, block_sizes.block_kv, block_sizes.block_kv_compute
    head_dim = q_ref.shape[0]
    kv_block = pl.program_id(2)
    last_kv_block = pl.cdiv(kv_seq_len, bkv) - 1
    online = variant.softmax == "online"
    int8 = variant.qk_dtype == "int8"
    v_scale = v_scale_ref[head_ids_ref[pl.program_id(1)]]
    sums_on_mxu = online or int8  # as rows of ones under V^T; "fixed_bound" has vector slots left, and no MXU cycle

    @pl.when(kv_block == 0)
    def _init():
        acc_scratch_ref[...] = jnp.zeros_like(acc_scratch_ref)
        if int8:
            row_scratch_ref[...] = jnp.broadcast_to(per_query_ref[...], row_scratch_ref.shape)
        elif online:
            _normalize_queries(q_ref, o_ref, row_scratch_ref, exponent_scale)  # the output is idle until the end
        else:
            row_scratch_ref[...] = jnp.zeros_like(row_scratch_ref)
            first_row = lax.broadcasted_iota(jnp.int32, (SHIFT_ROWS, bq), 0) == 0
            side_scratch_ref[...] = jnp.where(first_row, -per_query_ref[...], 0).astype(side_scratch_ref.dtype)

    if not int8:  # here, since in HBM keys with head_dim last would fill half of each register's lanes
        for start in range(0, bkv, LANES):
            keys = k_ref[:, start : start + LANES].swapaxes(0, 1)
            if tiles.shifted(variant):
                keys = jnp.concatenate([keys, jnp.ones((LANES, SHIFT_ROWS), keys.dtype)], axis=1)
            key_scratch_ref[start : start + LANES] = keys

    def score_slot(tile: Tile):
        keys, queries = tile.shape
        return s_scratch_ref.at[tile.index % s_scratch_ref.shape[0], :keys, :queries]

    def scores(tile: Tile) -> jax.Array:
        """K Q^T of one tile, [keys, queries], as base-2 exponents ("online" scales it later); masked past the end."""
        k, q = (k_ref if int8 else key_scratch_ref)[tile.keys, :], (o_ref if online else q_ref)[:, tile.queries]
        if tiles.shifted(variant):
            q = jnp.concatenate([q, side_scratch_ref[:, tile.queries]], axis=0)
        s = lax.dot_general(k, q, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32 if int8 else jnp.float32)
        if int8:
            s = (_by_sublane_group(s.astype(jnp.float32)) * row_scratch_ref[:, tile.queries][None]).reshape(tile.shape)
        elif not online:
            s = s * exponent_scale
        if tile.ragged:
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 0) < tile.num_keys, s, -jnp.inf)
        if int8:
            return s.astype(jnp.bfloat16)
        if not online:
            return s
        # The maximum needs the whole tile before the first exponential: leave the tile in VMEM, not in registers.
        score_slot(tile)[...] = s
        return _by_sublane_group(s).max(axis=0)

    def probabilities(tile: Tile, s: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """P^T of one tile in v's dtype, [keys, queries], and the factor that rescales what came before it."""
        if not online:
            p = jnp.exp2(s)
            if not sums_on_mxu:
                row_scratch_ref[:, tile.queries] += _by_sublane_group(p).sum(axis=0)
            return p.astype(v_ref.dtype), None
        m_prev, m_tile, scale = row_scratch_ref[:SUBLANES, tile.queries], s, row_scratch_ref[SUBLANES:, tile.queries]
        m = jnp.maximum(m_prev, jnp.broadcast_to(m_tile.max(axis=0, keepdims=True), m_prev.shape))
        row_scratch_ref[:SUBLANES, tile.queries] = m
        p = jnp.exp2((_by_sublane_group(score_slot(tile)[...]) - m[None]) * scale[None])
        return p.reshape(tile.shape).astype(v_ref.dtype), jnp.exp2((m_prev - m) * scale)

    def masked(v: jax.Array, num_keys: int) -> jax.Array:
        """v with zeros past the end: what lies there may be NaN, and 0 * NaN is not 0."""
        if num_keys == v.shape[1]:
            return v
        return jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 1) < num_keys, v, jnp.zeros_like(v))

    def with_ones(v: jax.Array) -> jax.Array:
        return jnp.concatenate([v, jnp.ones((SUBLANES, v.shape[1]), v.dtype)], axis=0)

    def accumulate(tile: Tile, p: jax.Array, rescale: jax.Array | None) -> None:
        """O^T += V^T P^T, and where the MXU makes the row sums, these below it."""
        acc = acc_scratch_ref[:, tile.queries]
        v = side_scratch_ref[:, tile.keys] if online else masked(v_ref[:, tile.keys], tile.num_keys)
        if int8:
            v = with_ones(v)
        if rescale is not None:
            acc = (_by_sublane_group(acc) * rescale[None]).reshape(acc.shape)
        acc_scratch_ref[:, tile.queries] = acc + lax.dot_general(
            v, p, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    def process(num_keys: int, unroll_q: int) -> None:
        """All tiles of one block; those of `unroll_q` queries at a time are straight-line code."""
        if online:
            v = masked(v_ref[...].astype(jnp.float32) * v_scale, num_keys)
            side_scratch_ref[...] = with_ones(v.astype(v_ref.dtype))
        num_loops, rest = divmod(bq, unroll_q)
        if num_loops == 1:
            pipeline(num_keys, 0, unroll_q)
        else:

            @pl.loop(0, num_loops)
            def _(i):
                pipeline(num_keys, pl.multiple_of(i * unroll_q, LANES), unroll_q)

        if rest:
            pipeline(num_keys, num_loops * unroll_q, rest)

    def pipeline(num_keys: int, q_start: int | jax.Array, num_queries: int) -> None:
        """Tiles as a software pipeline: scores run `lookahead` tiles ahead, V^T P^T one behind."""
        todo = tiles.cut_into_tiles(num_keys, q_start, num_queries, bkv_compute, variant.block_q_compute)
        s: dict[int, jax.Array] = {}
        p: dict[int, tuple[jax.Array, jax.Array | None]] = {}
        for step in range(len(todo) + variant.lookahead + 1):
            ready = step - variant.lookahead
            if step < len(todo):
                s[step] = scores(todo[step])
            if 0 <= ready < len(todo):
                p[ready] = probabilities(todo[ready], s.pop(ready))
            if ready >= 1:
                accumulate(todo[ready - 1], *p.pop(ready - 1))

    if last_kv_block > 0:
        pl.when(kv_block < last_kv_block)(lambda: process(bkv, min(variant.unroll_q or bq, bq)))

    @pl.when(kv_block == last_kv_block)
    def _finish():
        last_num_keys = kv_seq_len - last_kv_block * bkv
        process(last_num_keys, last_block_unroll_q(last_num_keys, block_sizes, variant))
        acc = acc_scratch_ref[...]
        l = acc[head_dim : head_dim + 1] if sums_on_mxu else row_scratch_ref[...].sum(axis=0, keepdims=True)
        out = acc[:head_dim] / (l * v_scale if online else l)
        if online:  # an average of the largest values may be rounded past them
            largest = float(jnp.finfo(o_ref.dtype).max)
            out = jnp.clip(out, -largest, largest)
        o_ref[...] = out.astype(o_ref.dtype)


def splash_attention_kernel(
    q: Float[Array, "heads head_dim q_seq"] | Int[Array, "heads head_dim q_seq"],
    k: Float[Array, "heads head_dim kv_seq"] | Int[Array, "heads kv_seq head_dim"],
    v: Float[Array, "heads head_dim kv_seq"],
    *,
    block_sizes: BlockSizes,
    variant: Variant,
    exponent_scale: float = 1.0,
    per_query: Float[Array, "heads q_seq"] | None = None,
    v_scale: Float[Array, " heads"] | None = None,
    head_ids: Int[Array, " heads"] | None = None,
    num_heads: Int[Array, ""] | int | None = None,
    out: Float[Array, "heads head_dim q_seq"] | None = None,
    kv_seq_len: int | None = None,
    interpret: bool = False,
) -> Float[Array, "heads head_dim q_seq"]:
    """One kernel call.

    Args:
      q: queries, transposed: head_dim on sublanes and the sequence on lanes, as the score tiles need them.
      k: keys, transposed, too; in int8 not. v: values, transposed. Lengths need not divide by the block sizes.
      exponent_scale: q . k times this is a base-2 exponent: the attention's scale * log2(e).
      per_query: float32. "fixed_bound": what is subtracted from q . k, rounded to bfloat16 here; none of it where left
        out. With int8 q and k: what q . k is multiplied with, instead of exponent_scale. "online": not used.
      v_scale: float32, powers of two. "online" computes with v times this, and divides the output by it, so that no sum
        over v overflows and no product with v is lost: see `splash_attn.gates`. The others do not use it. Default: 1.
      head_ids, num_heads: compute only the heads head_ids[:num_heads]. Both may be traced, so that the choice can be
        made on the device. Default: every head.
      out: where to leave the heads that are not computed (donated). Default: they are undefined.
      kv_seq_len: how many of the keys count; those behind may hold anything. Default: all.

    Returns:
      O^T, in v's dtype.

    Raises:
      ValueError: int8 without per_query, or operands that are not what the variant says.
    """
    heads, head_dim, q_seq_len = q.shape
    kv_seq_len = v.shape[2] if kv_seq_len is None else kv_seq_len
    int8 = variant.qk_dtype == "int8"
    if int8 != (q.dtype == jnp.int8) or int8 != (k.dtype == jnp.int8):
        raise ValueError(f"{q.dtype=} {k.dtype=}: expected {variant.qk_dtype}, as the variant says.")
    if per_query is None:
        if int8:
            raise ValueError(f"{per_query=}: expected the scale of the int8 scores of each query.")
        per_query = jnp.zeros((heads, q_seq_len), jnp.float32)
    if head_ids is None:
        head_ids = jnp.arange(heads, dtype=jnp.int32)
    if v_scale is None:
        v_scale = jnp.ones(heads, jnp.float32)
    bq, bkv = block_sizes.block_q, block_sizes.block_kv
    keys = pl.BlockSpec((None, head_dim, bkv), lambda i, h, j, ids, _: (ids[h], 0, j))
    in_specs = [
        pl.BlockSpec((None, head_dim, bq), lambda i, h, j, ids, _: (ids[h], 0, i)),
        pl.BlockSpec((None, bkv, head_dim), lambda i, h, j, ids, _: (ids[h], j, 0)) if int8 else keys,
        keys,
        pl.BlockSpec((None, 1, bq), lambda i, h, j, ids, _: (ids[h], 0, i)),
    ]
    operands = [head_ids, v_scale, q, k, v, per_query[:, None]]
    aliases = {}
    if out is not None and interpret and q_seq_len % bq:
        # The interpreter, unlike the TPU, refuses ragged blocks of an aliased output.
        padding = ((0, 0), (0, 0), (0, -q_seq_len % bq))
        out = jnp.pad(out, padding, constant_values=jnp.nan)
        operands[2] = jnp.pad(q, padding, constant_values=0 if int8 else jnp.nan)
        operands[5] = jnp.pad(operands[5], padding, constant_values=jnp.nan)
    if out is not None:
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        aliases = {len(operands): 0}
        operands.append(out)
    online = variant.softmax == "online"
    call = pl.pallas_call(
        functools.partial(
            _kernel_body,
            kv_seq_len=kv_seq_len,
            exponent_scale=exponent_scale,
            block_sizes=block_sizes,
            variant=variant,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(q_seq_len, bq), heads if num_heads is None else num_heads, pl.cdiv(kv_seq_len, bkv)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, head_dim, bq), lambda i, h, j, ids, _: (ids[h], 0, i)),
            scratch_shapes=[
                pltpu.VMEM(tiles.side_scratch_shape(head_dim, block_sizes, variant), v.dtype),
                pltpu.VMEM((tiles.row_scratch_rows(variant), bq), jnp.float32),
                pltpu.VMEM((head_dim + (SUBLANES if online or int8 else 0), bq), jnp.float32),
                pltpu.VMEM(tiles.score_scratch_shape(block_sizes, variant), jnp.float32),
                pltpu.VMEM(tiles.key_scratch_shape(head_dim, block_sizes, variant), v.dtype),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((heads, head_dim, operands[2].shape[2]), v.dtype),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            disable_bounds_checks=True,
            flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": variant.lp_scheduler},
            vmem_limit_bytes=variant.vmem_limit_bytes,
        ),
        name=kernel_name(variant),
        interpret=pltpu.InterpretParams(uninitialized_memory="nan") if interpret else False,
    )
    return call(*operands)[:, :, :q_seq_len]


def kernel_name(variant: Variant) -> str:
    """What profiles and compiler dumps call the kernel."""
    return f"splash_attention_{variant.softmax}" + ("_int8" if variant.qk_dtype == "int8" else "")
