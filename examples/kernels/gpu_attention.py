"""JAX's Pallas attention for GPUs (Triton), measured: `backend=measure device=local` where a GPU is."""

import dataclasses

import jax
import jax.numpy as jnp

from tuning.kernels import Kernel, one_of


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The defaults are JAX's own."""

    block_q: int = one_of(32, 64, 128, default=128)
    block_k: int = one_of(32, 64, 128, default=128)
    num_stages: int = one_of(1, 2, 3, 4, default=2)


@dataclasses.dataclass(frozen=True)
class Shape:
    batch_size: int = 1
    seq_len: int = 4096
    num_heads: int = 16
    head_dim: int = 64


class GpuAttention(Kernel[Blocks, Shape]):
    Config, Workload = Blocks, Shape
    platform = "gpu"

    def arguments(self, workload):
        w = workload
        return (jax.ShapeDtypeStruct((w.batch_size, w.seq_len, w.num_heads, w.head_dim), jnp.float16),) * 3

    def build(self, config):
        from jax.experimental.pallas.ops.gpu import attention

        blocks = attention.BlockSizes(block_q=config.block_q, block_k=config.block_k)

        def attend(q, k, v):
            scale = q.shape[-1] ** -0.5
            return attention.mha(q, k, v, None, scale, block_sizes=blocks, num_stages=config.num_stages)

        return attend

    def reference(self, q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v)

    def is_valid(self, config, workload):
        fits = workload.seq_len % config.block_q == 0 and workload.seq_len % config.block_k == 0
        return fits or "blocks do not divide the sequence"

    def check_workload(self, config, workload):
        length = 2 * max(config.block_q, config.block_k)
        return dataclasses.replace(workload, seq_len=length, num_heads=2)

    def flops(self, workload):
        return 4 * workload.batch_size * workload.num_heads * workload.seq_len**2 * workload.head_dim
