"""The Pallas TPU kernel: exact softmax attention over one chip's heads, in [kv, q] orientation.

Scores are computed as S^T = K Q^T, so that the softmax reduces over sublanes (cheap vector adds, no cross-lane work)
and the probabilities are the stationary MXU operand of O^T = V^T P^T, whose 256-deep contraction runs the MXU at full
width.

Work goes through the block in tiles of `block_kv_compute` keys by `block_q_compute` queries. The kernel is unrolled and
software-pipelined by hand: the scores of the next `lookahead` tiles are issued to the MXU before a tile's exponentials
are taken, so that the MXU never waits for the vector unit. Without it the compiler schedules the tiles one by one.

q and k keep the values that they came with: the scale and log2(e) multiply the float32 scores, so that no operand is
rounded a second time.

Two softmaxes, same result:

* "online" keeps a running maximum and rescales, as FlashAttention does (Dao et al., arXiv:2205.14135). The vector unit
  is its bottleneck, so the row sums come from the MXU, as rows of ones under V^T.
* "fixed_bound" subtracts a bound known beforehand instead, which removes the maximum and every rescale. The bound rides
  along in the contraction: q gets rows that hold it, k columns that hold 1, and the MXU, whose contraction is 256 deep,
  adds them for nothing.

The bound, and when it is exact. Let x_ij = c q_i . k_j be the base-2 logits (c = scale log2(e)), u any vector, and
B_i = |c| |q_i| max_j |k_j - u|. By Cauchy-Schwarz |c q_i . (k_j - u)| <= B_i, so that with b_i = c q_i . u + B_i:

    - 2 B_i <= x_ij - b_i <= 0.

The kernel takes p_ij = 2^(x_ij - b_i). Softmax does not change when a constant is subtracted from a row, so any b_i
that is the same for all j is exact in real arithmetic; what remains is float32:

  - no overflow, ever: p_ij <= 1, so the sum of S of them is at most S and |O_i| <= S max|v|, as in the online kernel.
  - no loss: a p_ij below 2^-126 may be flushed to zero. The flushed mass is at most S 2^-126, against a row sum of at
    least 2^(M_i - b_i) with M_i = max_j x_ij; relative to the sum it is at most 2^(log2(S) - 126 + b_i - M_i). If u is
    the mean key (K-smooth), the x_ij - c q_i . u of a row average to 0, so their maximum is >= 0 and b_i - M_i <= B_i;
    if u = 0, b_i - M_i <= 2 B_i. A loss under 2^-24, half a unit in the last place of float32, needs
        B_i <= 102 - log2(S) - 1  (u the mean),     B_i <= (102 - log2(S) - 1) / 2  (u = 0).
    The 1 pays for the rounding of b_i, which is held in three bfloat16 terms (24 bits).

`splash_attn.api` computes max_i B_i for every head from the q and k of the call, and gives the heads that are not
within `fixed_bound_limit` to the online kernel.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from splash_attn.types import LANES, AttentionShape, BlockSizes, Variant

SUBLANES = 8
#: Rows that the bound adds to q: a whole bfloat16 tile.
BOUND_ROWS = 16


def fixed_bound_limit(kv_seq_len: int, *, centred: bool) -> float:
    """Largest bound B (base-2 logits) for which the fixed-bound softmax loses less than 2^-24 of any row's sum."""
    limit = 126 - 24 - math.log2(kv_seq_len) - 1
    return limit if centred else limit / 2


def _score_scratch_shape(block_sizes: BlockSizes, variant: Variant) -> tuple[int, int, int]:
    """Tiles in flight, of which "online" keeps the scores in VMEM; one idle tile otherwise."""
    if variant.softmax != "online":
        return 1, SUBLANES, LANES
    return variant.lookahead + 1, block_sizes.block_kv_compute, min(variant.block_q_compute, block_sizes.block_q)


def vmem_bytes_estimate(shape: AttentionShape, block_sizes: BlockSizes, variant: Variant, itemsize: int = 2) -> int:
    """VMEM that the kernel asks for: double-buffered windows of q, k, v and the output, and the scratch.

    What the compiler spills comes on top.
    """
    sublanes_dim = -(-shape.head_dim // SUBLANES) * SUBLANES
    contraction_dim = -(-shape.head_dim // BOUND_ROWS) * BOUND_ROWS + BOUND_ROWS
    lanes_dim = -(-contraction_dim // LANES) * LANES
    q_and_out = 2 * 2 * sublanes_dim * block_sizes.block_q * itemsize
    k_and_v = 2 * (lanes_dim + sublanes_dim) * block_sizes.block_kv * itemsize
    scratch = (contraction_dim * itemsize + (sublanes_dim + 3 * SUBLANES) * 4) * block_sizes.block_q
    scratch += 4 * math.prod(_score_scratch_shape(block_sizes, variant))
    return q_and_out + k_and_v + scratch


def extend_keys(k: Float[Array, "heads kv_seq head_dim"]) -> Float[Array, "heads kv_seq contraction_dim"]:
    """Appends the columns that meet the bound's rows in the contraction: zeros up to a multiple of 16, then ones."""
    heads, kv_seq_len, head_dim = k.shape
    zeros = jnp.zeros((heads, kv_seq_len, -head_dim % BOUND_ROWS), k.dtype)
    return jnp.concatenate([k, zeros, jnp.ones((heads, kv_seq_len, BOUND_ROWS), k.dtype)], axis=2)


def _split(x: Float[Array, "1 queries"]) -> Float[Array, "16 queries"]:
    """x as a sum of bfloat16 rows: three that hold 24 bits, and zeros."""
    row = lax.broadcasted_iota(jnp.int32, (BOUND_ROWS, x.shape[1]), 0)
    terms = jnp.zeros(row.shape, jnp.float32)
    for i in range(3):
        term = x.astype(jnp.bfloat16).astype(jnp.float32)
        terms = jnp.where(row == i, term, terms)
        x = x - term
    return terms.astype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """`num_keys` keys by the queries of one step; `keys` is rounded up to whole lanes."""

    index: int
    keys: slice
    num_keys: int
    queries: slice

    @property
    def shape(self) -> tuple[int, int]:
        return self.keys.stop - self.keys.start, self.queries.stop - self.queries.start

    @property
    def ragged(self) -> bool:
        return self.num_keys < self.shape[0]


def _tiles(num_keys: int, num_queries: int, block_kv_compute: int, block_q_compute: int) -> list[_Tile]:
    tiles: list[_Tile] = []
    for k_start in range(0, num_keys, block_kv_compute):
        keys_left = min(block_kv_compute, num_keys - k_start)
        keys = slice(k_start, k_start + -(-keys_left // LANES) * LANES)
        for q_start in range(0, num_queries, block_q_compute):
            queries = slice(q_start, min(q_start + block_q_compute, num_queries))
            tiles.append(_Tile(len(tiles), keys, keys_left, queries))
    return tiles


def _by_sublane_group(x: jax.Array) -> jax.Array:
    """[rows, queries] -> [rows // 8, 8, queries]: sums and maxima over the first axis are plain vector operations."""
    return x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1])


def _kernel_body(
    head_ids_ref,  # [heads] in SMEM: which head each grid row works on
    k_radius_ref,  # [heads] in SMEM: max_j |k_j - u| of each head; used by "fixed_bound" only, as is u
    q_ref,  # [head_dim, block_q]
    k_ref,  # [block_kv, contraction_dim], see `extend_keys`
    v_ref,  # [head_dim, block_kv]
    k_centre_ref,  # [head_dim, 1]: u
    *refs,  # the output of an earlier call that this one continues, if there is one; the output; the scratch
    kv_seq_len: int,
    exponent_scale: float,
    block_sizes: BlockSizes,
    variant: Variant,
):
    o_ref, q_scratch_ref, m_scratch_ref, l_scratch_ref, acc_scratch_ref, s_scratch_ref = refs[-6:]
    bq, bkv, bkv_compute = block_sizes.block_q, block_sizes.block_kv, block_sizes.block_kv_compute
    head_dim = q_ref.shape[0]
    kv_block = pl.program_id(2)
    last_kv_block = pl.cdiv(kv_seq_len, bkv) - 1
    online = variant.softmax == "online"

    @pl.when(kv_block == 0)
    def _init():
        acc_scratch_ref[...] = jnp.zeros_like(acc_scratch_ref)
        q_scratch_ref[...] = jnp.zeros_like(q_scratch_ref)
        q_scratch_ref[:head_dim, :] = q_ref[...]
        if online:
            m_scratch_ref[...] = jnp.full_like(m_scratch_ref, -jnp.inf)
        else:
            l_scratch_ref[...] = jnp.zeros_like(l_scratch_ref)
            q = q_ref[...].astype(jnp.float32)
            length = jnp.sqrt(jnp.sum(q * q, axis=0, keepdims=True))
            radius = k_radius_ref[head_ids_ref[pl.program_id(1)]] * math.copysign(1, exponent_scale)
            bound = jnp.sum(q * k_centre_ref[...], axis=0, keepdims=True) + length * radius  # b_i / c
            q_scratch_ref[-BOUND_ROWS:, :] = _split(-bound)

    def score_slot(tile: _Tile):
        keys, queries = tile.shape
        return s_scratch_ref.at[tile.index % s_scratch_ref.shape[0], :keys, :queries]

    def scores(tile: _Tile) -> jax.Array:
        """K Q^T of one tile, [keys, queries]; keys past the end of the sequence are masked."""
        s = lax.dot_general(
            k_ref[tile.keys, :],
            q_scratch_ref[:, tile.queries],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        s = s * exponent_scale
        if tile.ragged:
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 0) < tile.num_keys, s, -jnp.inf)
        if not online:
            return s
        # The maximum needs the whole tile before the first exponential: leave the tile in VMEM, not in registers.
        score_slot(tile)[...] = s
        return _by_sublane_group(s).max(axis=0)

    def probabilities(tile: _Tile, s: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """P^T of one tile in v's dtype, [keys, queries], and the factor that rescales what came before it."""
        if not online:
            p = jnp.exp2(s)
            l_scratch_ref[:, tile.queries] += _by_sublane_group(p).sum(axis=0)
            return p.astype(v_ref.dtype), None
        m_prev, m_tile = m_scratch_ref[:, tile.queries], s
        m = jnp.maximum(m_prev, jnp.broadcast_to(m_tile.max(axis=0, keepdims=True), m_prev.shape))
        m_scratch_ref[:, tile.queries] = m
        p = jnp.exp2(_by_sublane_group(score_slot(tile)[...]) - m[None])
        return p.reshape(tile.shape).astype(v_ref.dtype), jnp.exp2(m_prev - m)

    def accumulate(tile: _Tile, p: jax.Array, rescale: jax.Array | None) -> None:
        """O^T += V^T P^T, and with "online" the row sums below it."""
        acc = acc_scratch_ref[:, tile.queries]
        v = v_ref[:, tile.keys]
        if tile.ragged:  # what lies past the end may be NaN, and 0 * NaN is not 0
            v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 1) < tile.num_keys, v, jnp.zeros_like(v))
        if rescale is not None:
            acc = (_by_sublane_group(acc) * rescale[None]).reshape(acc.shape)
            v = jnp.concatenate([v, jnp.ones((SUBLANES, v.shape[1]), v.dtype)], axis=0)
        acc_scratch_ref[:, tile.queries] = acc + lax.dot_general(
            v, p, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    def process(num_keys_in_block: int) -> None:
        """The tiles of one block as a software pipeline: scores run `lookahead` tiles ahead, V^T P^T one behind."""
        tiles = _tiles(num_keys_in_block, bq, bkv_compute, variant.block_q_compute)
        s: dict[int, jax.Array] = {}
        p: dict[int, tuple[jax.Array, jax.Array | None]] = {}
        for step in range(len(tiles) + variant.lookahead + 1):
            ready = step - variant.lookahead
            if step < len(tiles):
                s[step] = scores(tiles[step])
            if 0 <= ready < len(tiles):
                p[ready] = probabilities(tiles[ready], s.pop(ready))
            if ready >= 1:
                accumulate(tiles[ready - 1], *p.pop(ready - 1))

    if last_kv_block > 0:
        pl.when(kv_block < last_kv_block)(lambda: process(bkv))

    @pl.when(kv_block == last_kv_block)
    def _finish():
        process(kv_seq_len - last_kv_block * bkv)
        acc = acc_scratch_ref[...]
        l = acc[head_dim : head_dim + 1] if online else l_scratch_ref[...].sum(axis=0, keepdims=True)
        o_ref[...] = (acc[:head_dim] / l).astype(o_ref.dtype)


def splash_attention_kernel(
    q: Float[Array, "heads head_dim q_seq"],
    k: Float[Array, "heads kv_seq contraction_dim"],
    v: Float[Array, "heads head_dim kv_seq"],
    *,
    exponent_scale: float,
    block_sizes: BlockSizes,
    variant: Variant,
    k_radius: Float[Array, " heads"] | None = None,
    k_centre: Float[Array, "heads head_dim"] | None = None,
    head_ids: Int[Array, " heads"] | None = None,
    num_heads: Int[Array, ""] | int | None = None,
    out: Float[Array, "heads head_dim q_seq"] | None = None,
    interpret: bool = False,
) -> Float[Array, "heads head_dim q_seq"]:
    """One kernel call.

    Args:
      q: queries, transposed: head_dim on sublanes and the sequence on lanes, as the score tiles need them.
      k: keys as `extend_keys` makes them; v: values, transposed. Lengths need not divide by the block sizes.
      exponent_scale: q . k times this is a base-2 exponent: the attention's scale * log2(e).
      k_radius, k_centre: max_j |k_j - u| and u of each head, float32; needed by the "fixed_bound" softmax.
      head_ids, num_heads: compute only the heads head_ids[:num_heads]. Both may be traced, so that the choice can be
        made on the device. Default: every head.
      out: where to leave the heads that are not computed (donated). Default: they are undefined.

    Returns:
      O^T, in q's dtype.

    Raises:
      ValueError: k_radius or k_centre is missing where the variant needs it.
    """
    heads, head_dim, q_seq_len = q.shape
    kv_seq_len = k.shape[1]
    if k_radius is None or k_centre is None:
        if variant.softmax == "fixed_bound":
            raise ValueError(f"{k_radius=} {k_centre=}: the fixed_bound softmax needs both, got None.")
        k_radius, k_centre = jnp.zeros((heads,), jnp.float32), jnp.zeros((heads, head_dim), jnp.float32)
    if head_ids is None:
        head_ids = jnp.arange(heads, dtype=jnp.int32)
    bq, bkv = block_sizes.block_q, block_sizes.block_kv
    in_specs = [
        pl.BlockSpec((None, head_dim, bq), lambda i, h, j, ids, _: (ids[h], 0, i)),
        pl.BlockSpec((None, bkv, k.shape[2]), lambda i, h, j, ids, _: (ids[h], j, 0)),
        pl.BlockSpec((None, head_dim, bkv), lambda i, h, j, ids, _: (ids[h], 0, j)),
        pl.BlockSpec((None, head_dim, 1), lambda i, h, j, ids, _: (ids[h], 0, 0)),
    ]
    operands = [head_ids, k_radius, q, k, v, k_centre[:, :, None]]
    aliases = {}
    if out is not None and interpret and q_seq_len % bq:
        # The interpreter, unlike the TPU, refuses ragged blocks of an aliased output.
        q, out = (jnp.pad(x, ((0, 0), (0, 0), (0, -q_seq_len % bq)), constant_values=jnp.nan) for x in (q, out))
        operands[2] = q
    if out is not None:
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        aliases = {len(operands): 0}
        operands.append(out)
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
                pltpu.VMEM((k.shape[2], bq), q.dtype),
                pltpu.VMEM((SUBLANES, bq), jnp.float32),
                pltpu.VMEM((SUBLANES, bq), jnp.float32),
                pltpu.VMEM((head_dim + (SUBLANES if variant.softmax == "online" else 0), bq), jnp.float32),
                pltpu.VMEM(_score_scratch_shape(block_sizes, variant), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            disable_bounds_checks=True,
            flags={"XLA_TPU_FORCE_LP_LLO_SCHEDULER": variant.lp_scheduler},
            vmem_limit_bytes=variant.vmem_limit_bytes,
        ),
        name=f"splash_attention_{variant.softmax}",
        interpret=pltpu.InterpretParams(uninitialized_memory="nan") if interpret else False,
    )
    return call(*operands)[:, :, :q_seq_len]
