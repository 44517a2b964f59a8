"""The least time that the matrix units allow for an attention, to say how far a kernel is from it."""

from offline_tpu.machine.devices import DeviceSpec
from splash_attn.types import AttentionShape

#: Rows of one systolic array: what a product contracts over at no extra cost (cloud.google.com/tpu/docs/v6e, .../v5e,
#: .../tpu7x).
_MXU_ROWS = {"TPU7x": 256, "TPU v6 lite": 256, "TPU v5 lite": 128}

#: What to think of a predicted time under the bound.
OVER_BOUND = (
    "over 100 % of the bound: the compiler's schedule runs the matrix units faster than the chip's published peak; "
    "such times rank candidates and say no more"
)


def mxu_bound_ms(shape: AttentionShape, device: DeviceSpec) -> float | None:
    """The bf16 bound of Q K^T and P V, None for a device whose matrix units are not known here.

    Q K^T contracts over head_dim only: it pays for whole arrays, however little of the rows it fills. P V contracts
    over the keys and runs at full rate when the probabilities are the stationary operand.
    """
    rows = _MXU_ROWS.get(device.device_kind)
    if rows is None:
        return None
    scores = shape.batch_size * shape.num_heads * shape.q_seq_len * shape.kv_seq_len
    passes = -(-shape.head_dim // rows)
    qk_cycles = scores * passes * rows * 2 / device.flops_per_cycle
    pv_cycles = scores * shape.head_dim * 2 / device.flops_per_cycle
    return (qk_cycles + pv_cycles) / device.clock_hz * 1e3
