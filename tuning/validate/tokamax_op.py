"""Tokamax's splash attention as a reported row called it, and the worker's job that predicts its time.

The op takes q, k, v `[batch, seq, heads, head_dim]` and transposes them itself: what was timed includes that.
"""

from collections.abc import Callable
from typing import Any

import jax

from splash_workbench.trial_status import compile_error
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


def predict_row(payload: dict[str, Any]) -> dict[str, Any]:
    """Predict a row's time, as a job. Payload: `row`, the fields of a ReportedRow, and `device`, a known name."""
    from jax.experimental import topologies

    import offline_tpu
    from offline_tpu.machine import devices

    row = ReportedRow(**payload["row"])
    device = devices.by_name(payload["device"])
    topologies.get_topology_desc(platform="tpu", topology_name=device.topology)  # its errors are not the row's
    try:
        return offline_tpu.predict(build(row), *abstract_args(row), device=device).to_dict()
    except offline_tpu.UnknownDumpFormatError:
        raise
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
