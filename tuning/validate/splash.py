"""Tokamax's splash attention as the rows of `tuning.trials.reported` called it.

The op takes q, k, v `[batch, seq, heads, head_dim]` and transposes them itself: what was timed includes that.
"""

from collections.abc import Callable
from typing import Any

import jax

from tuning.trials.reported import ReportedRow


def build(row: ReportedRow) -> Callable[[jax.Array, jax.Array, jax.Array], Any]:
    """Return the call that the row reports: tokamax's public op, with the row's configuration instead of a tuned one.

    Raises:
      ValueError: tokamax refuses the configuration.
    """
    from tokamax._src.ops.attention import pallas_mosaic_tpu
    from tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel import QKVLayout

    class _Op(pallas_mosaic_tpu.PallasMosaicTpuFlashAttention):
        def supported_on(self, device: jax.Device) -> bool:
            del device  # asked of the default device, which is the CPU of this machine: the TPU is not here
            return True

    op = _Op(
        config=pallas_mosaic_tpu.Config(
            block_q=row.block_q,
            block_kv=row.block_kv,
            block_kv_compute=row.block_kv_compute,
            q_layout=QKVLayout[row.q_layout],
            k_layout=QKVLayout[row.k_layout],
            v_layout=QKVLayout[row.v_layout],
            use_experimental_scheduler=row.lp_llo_scheduler,
            use_base2_exp=row.use_base2_exp,
        )
    )

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        return op(q, k, v, is_causal=row.is_causal, return_residuals=row.return_residuals)

    return attention


def abstract_args(row: ReportedRow) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Return q, k and v of the row's call."""
    q = jax.ShapeDtypeStruct((row.batch_size, row.seq_len, row.num_heads, row.head_dim), row.dtype)
    kv_seq_len, num_kv_heads = row.kv_seq_len or row.seq_len, row.num_kv_heads or row.num_heads
    kv = jax.ShapeDtypeStruct((row.batch_size, kv_seq_len, num_kv_heads, row.head_dim), row.dtype)
    return q, kv, kv
