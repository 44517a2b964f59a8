"""JAX's own paged attention for TPU, of a server's decoding step: one query a sequence, keys and values in pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tuning.kernels import Kernel, one_of


@dataclasses.dataclass(frozen=True)
class Pages:
    """JAX has no default; 4 is what its own tests begin with."""

    pages_per_compute_block: int = one_of(2, 4, 8, 16, 32, default=4)
    inline_seq_dim: bool = one_of(True, False)


@dataclasses.dataclass(frozen=True)
class Decode:
    batch_size: int = 8
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 16
    pages_per_sequence: int = 64


class PagedAttention(Kernel[Pages, Decode]):
    Config, Workload = Pages, Decode

    def arguments(self, workload):
        w = workload
        pages = w.batch_size * w.pages_per_sequence
        q = jax.ShapeDtypeStruct((w.batch_size, w.num_q_heads, w.head_dim), jnp.bfloat16)
        kv = jax.ShapeDtypeStruct((w.num_kv_heads, pages, w.page_size, w.head_dim), jnp.bfloat16)
        lengths = np.full(w.batch_size, w.pages_per_sequence * w.page_size, np.int32)
        page_indices = np.random.default_rng(0).permutation(pages).astype(np.int32)
        return q, kv, kv, lengths, page_indices.reshape(w.batch_size, w.pages_per_sequence)

    def build(self, config):
        from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

        def attend(q, k_pages, v_pages, lengths, page_indices):
            return paged_attention(q, k_pages, v_pages, lengths, page_indices, **dataclasses.asdict(config))

        return attend

    def reference(self, q, k_pages, v_pages, lengths, page_indices):
        def flat(pages):  # [kv_heads, pages, page_size, head_dim] -> [batch, kv_heads, seq, head_dim]
            return pages[:, page_indices].swapaxes(0, 1).reshape(q.shape[0], pages.shape[0], -1, q.shape[-1])

        k, v = flat(k_pages).astype(jnp.float32), flat(v_pages).astype(jnp.float32)
        grouped = q.astype(jnp.float32).reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        scores = jnp.einsum("bhgd,bhtd->bhgt", grouped, k)
        scores = jnp.where(jnp.arange(k.shape[2]) < lengths[:, None, None, None], scores, -jnp.inf)
        return jnp.einsum("bhgt,bhtd->bhgd", jax.nn.softmax(scores, axis=-1), v).reshape(q.shape)

    def is_valid(self, config, workload):
        divides = workload.pages_per_sequence % config.pages_per_compute_block == 0
        return divides or "pages_per_compute_block does not divide pages_per_sequence"

    def check_workload(self, config, workload):
        pages = 2 * config.pages_per_compute_block
        return dataclasses.replace(workload, batch_size=2, num_q_heads=8, num_kv_heads=2, pages_per_sequence=pages)
