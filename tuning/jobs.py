"""What a worker process does with one candidate, by backend. Runs inside `tuning.worker`.

A job takes the payload that `tuning.evaluate` made and returns the fields of a Trial that it found out.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from splash_attn import device as devices
from splash_attn.api import Implementation
from splash_attn.types import AttentionShape, BlockSizes
from tuning import kernels, measure, numerics
from tuning.status import Status, compile_error


@dataclasses.dataclass(frozen=True)
class Request:
    """One candidate as a job sees it."""

    kernel: str
    kernel_hash: str
    shape: AttentionShape
    dtype: str
    block_sizes: BlockSizes
    options: dict[str, Any]
    device: str
    cache_dir: Path | None
    measure: measure.MeasureSettings

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> "Request":
        values = dict(payload)
        values["shape"] = AttentionShape(**values["shape"])
        values["block_sizes"] = BlockSizes(**values["block_sizes"])
        values["cache_dir"] = Path(values["cache_dir"]) if values["cache_dir"] else None
        values["measure"] = measure.MeasureSettings(**values["measure"])
        return cls(**values)

    def attention(self, implementation: Implementation) -> kernels.Attention:
        return kernels.KERNELS[self.kernel].build(self.block_sizes, self.options, implementation)

    def timed(self, implementation: Implementation) -> kernels.Attention:
        """The whole op, of which the time is taken: from the projections' outputs to the output projection's input."""
        return kernels.from_projections(self.attention(implementation), self.shape.num_heads)

    def abstract_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of `timed`: [batch, seq, heads * head_dim] three times."""
        shape = self.shape
        channels = shape.num_heads * shape.head_dim
        q = jax.ShapeDtypeStruct((shape.batch_size, shape.q_seq_len, channels), self.dtype)
        kv = jax.ShapeDtypeStruct((shape.batch_size, shape.kv_seq_len, channels), self.dtype)
        return q, kv, kv


def offline(payload: dict[str, Any]) -> dict[str, Any]:
    """Compile for the device that is not here, read the schedule, then check the numerics in interpret mode."""
    from tuning import offline as offline_model

    request = Request.from_payload(payload)
    kernel = kernels.KERNELS[request.kernel]
    assumed = kernel.assume(request.shape, request.options)
    device = devices.by_name(request.device)
    # Outside of the try: what libtpu says against its own start is not the candidate's fault.
    topologies.get_topology_desc(platform="tpu", topology_name=device.topology)
    try:
        prediction = offline_model.predict(
            request.timed("pallas_tpu"),
            *request.abstract_args(),
            device=device,
            grid_sizes=assumed.grid_sizes,
        )
    except offline_model.UnknownDumpFormatError:
        raise  # not the candidate's fault
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    checked = _check(request, "pallas_interpret")
    if checked["status"] != Status.OK:
        return checked
    kernel_ops = prediction.matching(kernel.op_name)
    assert kernel_ops, f"no op named {kernel.op_name} in the prediction"
    unresolved_count = sum(len(op.unresolved) for op in kernel_ops)
    unresolved = (
        [f"{unresolved_count} spots of the kernel's schedule depend on data: see `ops`"] if unresolved_count else []
    )
    return checked | {
        "label": "predicted",
        "time_samples_ms": [prediction.time_s * 1e3],
        "kernel_time_ms": sum(op.time_s for op in kernel_ops) * 1e3,
        "cycles": sum(op.cycles * op.calls for op in kernel_ops),
        "vmem_bytes": max(op.vmem_bytes for op in kernel_ops),
        "spill_count": sum(op.spill_count * op.calls for op in kernel_ops),
        "fill_count": sum(op.fill_count * op.calls for op in kernel_ops),
        "peak_hbm_bytes": prediction.peak_hbm_bytes,
        "compile_time_s": prediction.compile_time_s,
        "ops": prediction.to_dict()["ops"],
        "notes": [*kernel.notes, *assumed.notes, *unresolved],
    }


def interpret(payload: dict[str, Any]) -> dict[str, Any]:
    """Check the numerics in interpret mode. No time."""
    return _check(Request.from_payload(payload), "pallas_interpret")


def measured(payload: dict[str, Any]) -> dict[str, Any]:
    """Check the numerics and time the op on the first device that JAX finds here."""
    request = Request.from_payload(payload)
    device = jax.devices()[0]
    on_tpu = device.platform == "tpu"
    kernel = kernels.KERNELS[request.kernel]
    implementation: Implementation = "pallas_tpu" if on_tpu else "pallas_interpret"
    checked = _check(request, implementation)
    if checked["status"] != Status.OK:
        return checked
    keys = jax.random.split(jax.random.key(0), 3)
    arguments = [
        jax.device_put(jax.random.normal(key, spec.shape, jnp.float32).astype(spec.dtype), device)
        for key, spec in zip(keys, request.abstract_args(), strict=True)
    ]
    start = time.perf_counter()
    try:
        compiled = jax.jit(request.timed(implementation)).lower(*arguments).compile()
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    compile_time_s = time.perf_counter() - start
    try:
        timed = measure.measure(
            lambda: compiled(*arguments), request.measure, platform=device.platform, kernel=kernel.op_name
        )
    except jax.errors.JaxRuntimeError as error:
        raise compile_error(error) from error
    notes = [*kernel.notes, *timed.notes]
    if not on_tpu:
        notes.insert(0, f"interpret mode on {device.platform}: compares nothing but this host with itself")
    return checked | {
        "label": "measured",
        "time_samples_ms": timed.times_ms,
        "kernel_time_ms": timed.kernel_time_ms,
        "compile_time_s": compile_time_s,
        "notes": notes,
    }


def probe(payload: dict[str, Any]) -> dict[str, Any]:
    """Which device JAX finds here; asked in a process of its own, so that the parent does not hold the chip."""
    del payload
    device = jax.devices()[0]
    return {"platform": device.platform, "device_kind": device.device_kind}


def _check(request: Request, implementation: Implementation) -> dict[str, Any]:
    key = numerics.CheckKey(
        kernel=request.kernel,
        kernel_hash=request.kernel_hash,
        head_dim=request.shape.head_dim,
        dtype=request.dtype,
        block_sizes=request.block_sizes,
        options=request.options,
        implementation=implementation,
    )
    found = numerics.check_once(key, request.attention(implementation), request.cache_dir)
    result: dict[str, Any] = {"status": Status.OK, "numerics": dataclasses.asdict(found)}
    if not found.passed:
        result |= {
            "status": Status.WRONG,
            "error": f"rms_error={found.rms_error:.2e} (limit {found.tolerance:.2e}), "
            f"max_row_error={found.max_row_error:.2e} (limit {found.row_tolerance:.2e})",
        }
    return result
