"""What the jobs of all backends share: the candidate as they are given it, and the check of its numerics.

A job runs inside `splash_workbench.workers.worker`, takes the payload that `evaluate` made, and returns the fields of a
Trial that it found out.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from splash_attn.api import Implementation
from splash_attn.types import AttentionShape, BlockSizes
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

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> "Request":
        values = dict(payload)
        values["shape"] = AttentionShape(**values["shape"])
        values["block_sizes"] = BlockSizes(**values["block_sizes"])
        values["cache_dir"] = Path(values["cache_dir"]) if values["cache_dir"] else None
        values["measure"] = timing.MeasureSettings(**values["measure"])
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


def check_numerics(request: Request, implementation: Implementation) -> dict[str, Any]:
    """Check the candidate against the reference. Returns status, numerics and, where it is wrong, an error."""
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


def probe(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the device that JAX finds here. In a process of its own, so that the parent does not hold the chip."""
    del payload
    device = jax.devices()[0]
    return {"platform": device.platform, "device_kind": device.device_kind}
