"""The least time that the matrix units allow for an attention, to say how far a kernel is from it."""

import math

from offline_tpu.machine.devices import DEVICES, DeviceSpec
from splash_attn.types import AttentionShape
from tuning.trials.records import Trial, is_exact

#: Rows of one systolic array: what a product contracts over at no extra cost (cloud.google.com/tpu/docs/v6e, .../v5e,
#: .../v5p, .../tpu7x).
_MXU_ROWS = {"TPU7x": 256, "TPU v6 lite": 256, "TPU v5 lite": 128, "TPU v5": 128}

#: A time under this part of the bound is no time of that op; int8 may come to three quarters.
_IMPOSSIBLE = 0.5
#: The same sum, taken in another order or rounded.
_ROUNDING = 1.01

#: What to think of a predicted time under the bound.
OVER_BOUND = (
    "over 100 % of the bound: the compiler's schedule runs the matrix units faster than the chip's published peak; "
    "such times rank candidates and say no more"
)


def known_device(device_kind: str) -> DeviceSpec | None:
    """Return the figures of a device by what JAX calls it; None for one that is not in offline_tpu.machine.devices."""
    return next((spec for spec in DEVICES.values() if spec.device_kind == device_kind), None)


def roofline_ms(flops: float | None, hbm_bytes: float | None, device: DeviceSpec) -> float | None:
    """Return the least time of a bf16 program by its FLOPs and the bytes it must move; None where neither is known."""
    seconds = [flops / device.flops_per_cycle / device.cores / device.clock_hz] if flops else []
    seconds += [hbm_bytes / device.hbm_bytes_per_s / device.cores] if hbm_bytes else []
    return max(seconds) * 1e3 if seconds else None


def mxu_bound_ms(shape: AttentionShape | None, device: DeviceSpec) -> float | None:
    """Return the bf16 bound of Q K^T and P V; None for a device whose matrix units are not known here, or no attention.

    Q K^T contracts over head_dim only: it pays for whole arrays, however little of the rows it fills. P V contracts
    over the keys and runs at full rate when the probabilities are the stationary operand.
    """
    rows = _MXU_ROWS.get(device.device_kind)
    if rows is None or shape is None:
        return None
    scores = shape.batch_size * shape.num_heads * shape.q_seq_len * shape.kv_seq_len
    passes = -(-shape.head_dim // rows)
    qk_cycles = scores * passes * rows * 2 / device.flops_per_cycle
    pv_cycles = scores * shape.head_dim * 2 / device.flops_per_cycle
    return (qk_cycles + pv_cycles) / device.cores / device.clock_hz * 1e3


def bf16_bound_ms(shape: AttentionShape | None, dtype: str, device_kind: str) -> float | None:
    """Return the bound of a bfloat16 call; None for another dtype or an unknown device."""
    device = known_device(device_kind)
    return mxu_bound_ms(shape, device) if device is not None and dtype == "bfloat16" else None


def bound_fraction(bound_ms: float | None, time_ms: float | None, exact: bool) -> float | None:
    """Return the bound over a time: 1 is the best there can be. None for int8, whose bound is another."""
    return bound_ms / time_ms if bound_ms and time_ms and exact else None


def kernel_bound_fraction(trial: Trial) -> float | None:
    """Return the bound over the time of a trial's kernel alone; None where that is not known."""
    if trial.bound_ms is not None:
        return bound_fraction(trial.bound_ms, trial.kernel_time_ms or trial.time_ms, True)
    bound_ms = bf16_bound_ms(trial.shape, trial.dtype, trial.device_kind)
    return bound_fraction(bound_ms, trial.kernel_time_ms, is_exact(trial.variant))


def contradiction(trial: Trial) -> str | None:
    """Return why a trial's times cannot be true: not positive, shorter than their parts, far under the bound."""
    samples, kernel_ms = trial.time_samples_ms, trial.kernel_time_ms
    for name, value in (*(("time_samples_ms", sample) for sample in samples), ("kernel_time_ms", kernel_ms)):
        if value is not None and not (math.isfinite(value) and value > 0):
            return f"{name}={value}: expected a positive number of milliseconds."
    time_ms, device = trial.time_ms, known_device(trial.device_kind)
    cycles_ms = (trial.cycles or 0) / device.fastest_clock_hz * 1e3 if device else 0.0
    kernel_least_ms = max(kernel_ms or 0.0, cycles_ms)
    if time_ms is not None and kernel_least_ms > time_ms * _ROUNDING:
        return f"time_ms={time_ms}: contradicts the kernel in it, which takes {kernel_least_ms:.4g} ms."
    least_ms = _IMPOSSIBLE * ((mxu_bound_ms(trial.shape, device) if device else None) or 0.0)
    for name, value in (("time_ms", time_ms), ("kernel_time_ms", kernel_ms)):
        if value is not None and value < least_ms:
            return f"{name}={value}: expected at least {least_ms:.4g}, half of what the matrix units need."
    return None
