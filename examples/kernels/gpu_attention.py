"""Two attention kernels for GPUs that JAX ships, beside cuDNN: `backend=measure device=local` where a GPU is."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tuning.kernels import Kernel, one_of


@dataclasses.dataclass(frozen=True)
class Shape:
    batch_size: int = 2
    seq_len: int = 4096
    num_heads: int = 16
    head_dim: int = 64


class Attention(Kernel):
    """What both have in common. Scores are not scaled, as Mosaic's kernel has it: a model scales q before."""

    Workload = Shape
    platform = "gpu"

    def arguments(self, workload):
        w = workload
        return (jax.ShapeDtypeStruct((w.batch_size, w.seq_len, w.num_heads, w.head_dim), jnp.float16),) * 3

    def reference(self, q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest")
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), v, precision="highest")

    def baselines(self):
        return {"cuDNN": functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation="cudnn")}

    def check_workload(self, config, workload):
        return dataclasses.replace(workload, seq_len=512, num_heads=2)

    def flops(self, workload):
        return 4 * workload.batch_size * workload.num_heads * workload.seq_len**2 * workload.head_dim


@dataclasses.dataclass(frozen=True)
class TritonBlocks:
    """The defaults are JAX's own."""

    block_q: int = one_of(32, 64, 128, default=128)
    block_k: int = one_of(32, 64, 128, default=128)
    num_warps: int = one_of(4, 8, default=4)
    num_stages: int = one_of(1, 2, 3, 4, default=2)


class GpuAttention(Attention):
    """Triton's, for any NVIDIA GPU."""

    Config = TritonBlocks

    def build(self, config):
        from jax.experimental.pallas.ops.gpu import attention

        blocks = attention.BlockSizes(block_q=config.block_q, block_k=config.block_k)
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}

        def attend(q, k, v):
            return attention.mha(q, k, v, None, block_sizes=blocks, **options)

        return attend

    def is_valid(self, config, workload):
        fits = workload.seq_len % config.block_q == 0 and workload.seq_len % config.block_k == 0
        return fits or "blocks do not divide the sequence"


@dataclasses.dataclass(frozen=True)
class HopperBlocks:
    """JAX has no default; this is the first configuration of its own tests."""

    block_q: int = one_of(64, 128, 192)
    block_kv: int = one_of(64, 128, 192, 256)
    max_concurrent_steps: int = one_of(2, 3, 4)
    use_schedule_barrier: bool = one_of(True, False)


class HopperAttention(Attention):
    """Mosaic's FlashAttention 3, for an H100 or H200."""

    Config = HopperBlocks

    def build(self, config):
        from jax.experimental.pallas.ops.gpu import attention_mgpu

        tuning = attention_mgpu.TuningConfig(**dataclasses.asdict(config))

        def attend(q, k, v):
            return attention_mgpu.attention(q, k, v, tuning)

        return attend

    def is_valid(self, config, workload):
        fits = workload.seq_len % (2 * config.block_q) == 0 and workload.seq_len % config.block_kv == 0
        return fits or "blocks do not divide the sequence"

    def check_workload(self, config, workload):
        length = 2 * config.block_q * config.block_kv // 64
        return dataclasses.replace(workload, seq_len=length, num_heads=2)
