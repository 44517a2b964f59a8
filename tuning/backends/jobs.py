"""The parts that the jobs of all backends share.

A job runs in `splash_workbench.workers.worker`, takes the payload that `evaluate` made, and returns fields of a Trial.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from splash_attn.api import Implementation
from splash_attn.types import AttentionShape, BlockSizes
from tuning.backends import device_times, kernels


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
    cache_dir: str
    measure: device_times.MeasureSettings
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)

    def attention(self, implementation: Implementation) -> kernels.Attention:
        return kernels.KERNELS[self.kernel].build(self.block_sizes, self.options, implementation)

    def timed(self, implementation: Implementation) -> kernels.Attention:
        """Return the op of which the time is taken: from the projections' outputs to the output projection's input."""
        return kernels.from_projections(self.attention(implementation), self.shape.num_heads)

    def abstract_args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Return the arguments of `timed`: [batch, seq, heads * head_dim] three times."""
        shape = self.shape
        lengths = (shape.q_seq_len, shape.kv_seq_len, shape.kv_seq_len)
        channels = shape.num_heads * shape.head_dim
        return tuple(jax.ShapeDtypeStruct((shape.batch_size, length, channels), self.dtype) for length in lengths)


def normal_arguments(specs: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """Return arrays of these shapes and dtypes, of the standard normal distribution, always the same."""
    keys = jax.random.split(jax.random.key(0), len(specs))
    return [jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype) for key, x in zip(keys, specs, strict=True)]


def probe(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the device that JAX finds here. In a process of its own, so that the parent does not hold the chip."""
    del payload
    device = jax.devices()[0]
    return {"platform": device.platform, "device_kind": device.device_kind}
