"""The parts that the jobs of all backends share.

A job runs in `splash_workbench.workers.worker`, takes the payload that `evaluate` made, and returns fields of a Trial.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from splash_attn.api import Implementation
from splash_attn.types import AttentionShape, BlockSizes
from splash_workbench.records.jsonl import decode
from splash_workbench.status import Status
from tuning.backends import kernels, numerics, timing


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
    measure: timing.MeasureSettings
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> "Request":
        cache_dir = Path(payload["cache_dir"]) if payload["cache_dir"] else None
        return dataclasses.replace(decode(payload | {"cache_dir": None}, cls), cache_dir=cache_dir)

    def attention(self, implementation: Implementation) -> kernels.Attention:
        return kernels.KERNELS[self.kernel].build(self.block_sizes, self.options, implementation)

    def timed(self, implementation: Implementation) -> kernels.Attention:
        """Return the op of which the time is taken: from the projections' outputs to the output projection's input."""
        return kernels.from_projections(self.attention(implementation), self.shape.num_heads)

    def abstract_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return the arguments of `timed`: [batch, seq, heads * head_dim] three times."""
        shape = self.shape
        channels = shape.num_heads * shape.head_dim
        q = jax.ShapeDtypeStruct((shape.batch_size, shape.q_seq_len, channels), self.dtype)
        kv = jax.ShapeDtypeStruct((shape.batch_size, shape.kv_seq_len, channels), self.dtype)
        return q, kv, kv


def check_numerics(request: Request, implementation: Implementation) -> dict[str, Any]:
    """Check the candidate against the reference. Return status, numerics and, where it is wrong, an error."""
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
    fields = dataclasses.asdict(found)
    if found.passed:
        return {"status": Status.OK, "numerics": fields}
    error = (
        f"rms_error={found.rms_error:.2e} (limit {found.tolerance:.2e}), "
        f"max_row_error={found.max_row_error:.2e} (limit {found.row_tolerance:.2e})"
    )
    return {"status": Status.WRONG, "numerics": fields, "error": error}


def probe(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the device that JAX finds here. In a process of its own, so that the parent does not hold the chip."""
    del payload
    device = jax.devices()[0]
    return {"platform": device.platform, "device_kind": device.device_kind}
