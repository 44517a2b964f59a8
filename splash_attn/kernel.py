"""The Pallas TPU kernel: exact softmax attention over one chip's heads, in [kv, q] orientation.

Scores are computed as S^T = K Q^T, so that the softmax reduces over sublanes (cheap vector adds, no cross-lane work) and
the probabilities are the stationary MXU operand of O^T = V^T P, whose 256-deep contraction runs the MXU at full width.

Work goes through the block in tiles of `block_kv_compute` keys by `block_q_compute` queries. The kernel is unrolled and
software-pipelined by hand: the scores of the next `lookahead` tiles are issued to the MXU before a tile's exponentials
are taken, so that the MXU never waits for the vector unit. Without it the compiler schedules the tiles one by one.

Two softmaxes, same result:

* "online" keeps a running maximum and rescales, as FlashAttention does (Dao et al., arXiv:2205.14135).
* "fixed_bound" subtracts a bound known beforehand instead, which removes the maximum and every rescale. With logits in
  base 2, x_ij = q_i . k_j (scale and log2(e) inside q), Cauchy-Schwarz gives |x_ij| <= B_i = |q_i| max_j |k_j|. The
  kernel takes p_ij = 2^(x_ij - B_i):
    - no overflow, ever: x_ij - B_i <= 0, so p_ij <= 1, the sum of S of them is at most S, and |O_i| <= S max|v|, as in
      the online kernel.
    - no loss: a p_ij below 2^-126 may be flushed to zero. Let M_i = max_j x_ij. The flushed mass is at most S 2^-126
      against a row sum of at least 2^(M_i - B_i), so relative to the sum it is at most 2^(log2(S) - 126 + B_i - M_i).
      With keys centred on their mean (K-smooth), the x_ij of a row average to 0, hence M_i >= 0; without, M_i >= -B_i.
      `fixed_bound_limit` asks that this loss stays under 2^-24, half a unit in the last place of float32:
        centred:  B_i <= 102 - log2(S) - 1        not centred:  B_i <= (102 - log2(S) - 1) / 2
      The 1 pays for what rounding does: bfloat16 keys are centred up to 2^-9 max|k_j|, which moves M_i by B_i / 512
      < 1/4, and B_i is computed in float32.
  `splash_attn.api` computes max_i B_i for every head from the q and k of the call, and gives the heads that are not
  within the limit to the online kernel.
"""

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
_MASKED = -1e30  # finite: the difference of two masked logits must not be NaN


def fixed_bound_limit(kv_seq_len: int, *, centred: bool) -> float:
    """Largest bound B (base-2 logits) for which the fixed-bound softmax loses less than 2^-24 of any row's sum."""
    limit = 126 - 24 - math.log2(kv_seq_len) - 1
    return limit if centred else limit / 2


def vmem_bytes_estimate(shape: AttentionShape, block_sizes: BlockSizes, variant: Variant, itemsize: int = 2) -> int:
    """Lower estimate of the VMEM that the kernel needs: double-buffered windows, scratch and tiles in flight."""
    head_dim = -(-shape.head_dim // SUBLANES) * SUBLANES
    lanes_dim = -(-shape.head_dim // LANES) * LANES
    q_out_windows = 2 * 2 * head_dim * block_sizes.block_q * itemsize
    kv_windows = 2 * block_sizes.block_kv * (lanes_dim + head_dim) * itemsize
    scratch = (head_dim + 2 * SUBLANES) * block_sizes.block_q * 4
    tile_rows = min(variant.block_q_compute, block_sizes.block_q)
    tiles = (variant.lookahead + 1) * block_sizes.block_kv_compute * tile_rows * 4
    return q_out_windows + kv_windows + scratch + tiles


def _kernel_body(
    head_ids_ref,  # [heads] in SMEM: which head each grid row works on
    k_norms_ref,  # [heads] in SMEM: max_j |k_j| of each head, read by "fixed_bound" only
    q_ref,  # [head_dim, block_q]
    k_ref,  # [block_kv, head_dim]
    v_ref,  # [head_dim, block_kv]
    *refs,  # (out aliased from an earlier call, only if there is one), out, then the scratch
    kv_seq_len: int,
    block_sizes: BlockSizes,
    variant: Variant,
):
    o_ref, m_scratch_ref, l_scratch_ref, acc_scratch_ref = refs[-4:]
    bq, bkv, bkv_compute = block_sizes.block_q, block_sizes.block_kv, block_sizes.block_kv_compute
    head_dim = q_ref.shape[0]
    kv_block = pl.program_id(2)
    last_kv_block = pl.cdiv(kv_seq_len, bkv) - 1
    online = variant.softmax == "online"

    @pl.when(kv_block == 0)
    def _init():
        l_scratch_ref[...] = jnp.zeros_like(l_scratch_ref)
        acc_scratch_ref[...] = jnp.zeros_like(acc_scratch_ref)
        if online:
            m_scratch_ref[...] = jnp.full_like(m_scratch_ref, _MASKED)
        else:
            q = q_ref[...].astype(jnp.float32)
            bound = jnp.sqrt(jnp.sum(q * q, axis=0, keepdims=True)) * k_norms_ref[head_ids_ref[pl.program_id(1)]]
            m_scratch_ref[...] = jnp.broadcast_to(bound, m_scratch_ref.shape)

    def scores(kv_start: int, num_keys: int, queries: slice) -> jax.Array:
        """S^T of one tile, [keys, queries]; keys past the end of the sequence are masked."""
        keys = -(-num_keys // LANES) * LANES
        s = lax.dot_general(
            k_ref[kv_start : kv_start + keys, :],
            q_ref[:, queries],
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if num_keys < keys:
            s = jnp.where(lax.broadcasted_iota(jnp.int32, s.shape, 0) < num_keys, s, _MASKED)
        return s

    def accumulate(kv_start: int, num_keys: int, queries: slice, s: jax.Array) -> None:
        """Adds one tile to the row sums and to O^T. Rows are kept in groups of 8 sublanes: [groups, 8, queries]."""
        keys, width = s.shape
        s = s.reshape(keys // SUBLANES, SUBLANES, width)
        m = m_scratch_ref[:, queries]
        l = l_scratch_ref[:, queries]
        acc = acc_scratch_ref[:, queries]
        if online:
            m_prev = m
            m = jnp.maximum(m_prev, jnp.broadcast_to(s.max(axis=0).max(axis=0, keepdims=True), m_prev.shape))
            rescale = jnp.exp2(m_prev - m)
            m_scratch_ref[:, queries] = m
            l = l * rescale
            acc = (acc.reshape(head_dim // SUBLANES, SUBLANES, width) * rescale[None]).reshape(head_dim, width)
        p = jnp.exp2(s - m[None])
        l_scratch_ref[:, queries] = l + p.sum(axis=0)
        v = v_ref[:, kv_start : kv_start + keys]
        if num_keys < keys:  # what lies past the end may be NaN, and 0 * NaN is not 0
            v = jnp.where(lax.broadcasted_iota(jnp.int32, v.shape, 1) < num_keys, v, jnp.zeros_like(v))
        acc_scratch_ref[:, queries] = acc + lax.dot_general(
            v, p.reshape(keys, width).astype(v.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    def process(num_keys_in_block: int) -> None:
        tiles = [
            (kv_start, min(bkv_compute, num_keys_in_block - kv_start), slice(start, min(start + variant.block_q_compute, bq)))
            for kv_start in range(0, num_keys_in_block, bkv_compute)
            for start in range(0, bq, variant.block_q_compute)
        ]
        in_flight = []
        for tile in tiles:
            in_flight.append((tile, scores(*tile)))
            if len(in_flight) > variant.lookahead:
                ready, s = in_flight.pop(0)
                accumulate(*ready, s)
        for ready, s in in_flight:
            accumulate(*ready, s)

    if last_kv_block > 0:
        pl.when(kv_block < last_kv_block)(lambda: process(bkv))

    @pl.when(kv_block == last_kv_block)
    def _finish():
        process(kv_seq_len - last_kv_block * bkv)
        l = l_scratch_ref[...].sum(axis=0, keepdims=True)
        o_ref[...] = (acc_scratch_ref[...] / l).astype(o_ref.dtype)


def splash_attention_kernel(
    q: Float[Array, "heads head_dim q_seq"],
    k: Float[Array, "heads kv_seq head_dim"],
    v: Float[Array, "heads head_dim kv_seq"],
    *,
    block_sizes: BlockSizes,
    variant: Variant,
    k_norms: Float[Array, " heads"] | None = None,
    head_ids: Int[Array, " heads"] | None = None,
    num_heads: Int[Array, ""] | int | None = None,
    out: Float[Array, "heads head_dim q_seq"] | None = None,
    interpret: bool = False,
) -> Float[Array, "heads head_dim q_seq"]:
    """One kernel call. Nothing is scaled here: q holds scale * log2(e), and logits are base-2 exponents.

    Args:
      q: queries, transposed: head_dim on sublanes and the sequence on lanes, as the score tiles need them.
      k: keys; v: values, transposed. Lengths need not divide by the block sizes.
      k_norms: max_j |k_j| of each head, float32; needed by the "fixed_bound" softmax.
      head_ids, num_heads: compute only the heads head_ids[:num_heads]. Both may be traced, so that the choice can be
        made on the device. Default: every head.
      out: where to leave the heads that are not computed (donated). Default: they are undefined.

    Returns:
      O^T, in q's dtype.

    Raises:
      ValueError: k_norms is missing where the variant needs it.
    """
    heads, head_dim, q_seq_len = q.shape
    kv_seq_len = k.shape[1]
    if k_norms is None:
        if variant.softmax == "fixed_bound":
            raise ValueError("k_norms=None: the fixed_bound softmax needs the largest key norm of each head.")
        k_norms = jnp.zeros((heads,), jnp.float32)
    if head_ids is None:
        head_ids = jnp.arange(heads, dtype=jnp.int32)
    bq, bkv = block_sizes.block_q, block_sizes.block_kv
    in_specs = [
        pl.BlockSpec((None, head_dim, bq), lambda i, h, j, ids, _: (ids[h], 0, i)),
        pl.BlockSpec((None, bkv, head_dim), lambda i, h, j, ids, _: (ids[h], j, 0)),
        pl.BlockSpec((None, head_dim, bkv), lambda i, h, j, ids, _: (ids[h], 0, j)),
    ]
    operands = [head_ids, k_norms, q, k, v]
    aliases = {}
    if out is not None:
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        aliases = {len(operands): 0}
        operands.append(out)
    return pl.pallas_call(
        functools.partial(_kernel_body, kv_seq_len=kv_seq_len, block_sizes=block_sizes, variant=variant),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(q_seq_len, bq), heads if num_heads is None else num_heads, pl.cdiv(kv_seq_len, bkv)),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((None, head_dim, bq), lambda i, h, j, ids, _: (ids[h], 0, i)),
            scratch_shapes=[
                pltpu.VMEM((SUBLANES, bq), jnp.float32),
                pltpu.VMEM((SUBLANES, bq), jnp.float32),
                pltpu.VMEM((head_dim, bq), jnp.float32),
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
    )(*operands)
