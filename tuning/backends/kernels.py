"""The attention kernels that a trial can be about: ours, and the peers that are installed.

Each takes q, k, v `[batch, heads, seq, head_dim]` and does everything that its caller would have to do around it.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import splash_attn
from splash_attn.api import Implementation
from splash_attn.kernel import assumed_grid_sizes
from splash_attn.types import AttentionShape, BlockSizes, Variant

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
#: What a kernel is given besides block sizes: for ours the fields of Variant, for a peer its own.
Options = Mapping[str, Any]

_LAYOUTS = ("q_layout", "k_layout", "v_layout")
_UNMASKED = "padded keys take part in the softmax: inexact unless the blocks divide the sequence"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel by name.

    Attributes:
      build: (block_sizes, options, implementation) -> the callable.
      op_name: what the names of its Pallas ops contain.
      requires, extra: module that must be importable, and the optional extra of this project that installs it, if any.
      exact_at_any_length: False for a kernel that is only right where the blocks divide the sequences.
      notes: what a reader of its figures must know.
      compile_only: options that change nothing in interpret mode.
      assume: (shape, options) -> grid sizes that depend on the data, by Pallas kernel name, and notes that say so.
    """

    build: Callable[[BlockSizes, Options, Implementation], Attention]
    op_name: str
    requires: str
    extra: str | None = None
    exact_at_any_length: bool = True
    notes: tuple[str, ...] = ()
    compile_only: frozenset[str] = frozenset()
    assume: Callable[[AttentionShape, Options], tuple[dict[str, int], tuple[str, ...]]] = lambda shape, options: (
        {},
        (),
    )

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.requires.partition(".")[0]) is not None


def build_splash_attn(block_sizes: BlockSizes, options: Options, implementation: Implementation) -> Attention:
    """Return `splash_attn.attention` with these block sizes, and `options` as its variant."""
    variant = Variant.from_dict(dict(options))

    return functools.partial(
        splash_attn.attention, block_sizes=block_sizes, variant=variant, implementation=implementation
    )


def from_projections(attention: Attention, num_heads: int) -> Attention:
    """Return attention as in a layer: it takes [batch, seq, heads * head_dim] three times, and returns the same."""

    def layer(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        heads = (x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2) for x in (q, k, v))
        return attention(*heads).swapaxes(1, 2).reshape(q.shape)

    return layer


def _jax_splash(block_sizes: BlockSizes, options: Options, implementation: Implementation) -> Attention:
    """Return JAX's own splash attention, with block sizes and `layout` for q, k and v."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    blocks = dataclasses.asdict(block_sizes) | dict.fromkeys(_LAYOUTS, splash.QKVLayout[options["layout"]])

    def make(num_heads: int, q_seq_len: int, kv_seq_len: int) -> Attention:
        mask = masks.MultiHeadMask([masks.FullMask((q_seq_len, kv_seq_len))] * num_heads)
        return splash.make_splash_mha(
            mask,
            block_sizes=splash.BlockSizes(**blocks),
            head_shards=1,
            q_seq_shards=1,
            interpret=implementation == "pallas_interpret",
        )

    return _padded(block_sizes, make)


def _tokamax_splash(block_sizes: BlockSizes, options: Options, implementation: Implementation) -> Attention:
    """Return tokamax's splash attention, with block sizes, `layout` of q, k, v, and `use_experimental_scheduler`."""
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    config = splash.SplashConfig(
        **dataclasses.asdict(block_sizes),
        **dict.fromkeys(_LAYOUTS, splash.QKVLayout[options["layout"]]),
        use_experimental_scheduler=options["use_experimental_scheduler"],
        interpret=implementation == "pallas_interpret",
    )

    def make(_: int, q_seq_len: int, kv_seq_len: int) -> Attention:
        return splash.make_splash_mha_single_device(mask=masks.FullMask((q_seq_len, kv_seq_len)), config=config)

    return _padded(block_sizes, make)


def _padded(block_sizes: BlockSizes, make: Callable[[int, int, int], Attention]) -> Attention:
    """Return the attention around a peer's kernel: scale q, and pad to whole blocks, as its callers do."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q_seq_len = q.shape[2]

        def pad(x: jax.Array, block: int) -> jax.Array:
            return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))

        q = pad((q * q.shape[-1] ** -0.5).astype(q.dtype), block_sizes.block_q)
        k, v = pad(k, block_sizes.block_kv), pad(v, block_sizes.block_kv)
        kernel = make(q.shape[1], q.shape[2], k.shape[2])
        return jax.vmap(kernel)(q, k, v)[:, :, :q_seq_len]

    return attention


KERNELS = {
    "splash_attn": Kernel(
        build=build_splash_attn,
        op_name="splash_attention",
        requires="splash_attn",
        compile_only=frozenset(f.name for f in dataclasses.fields(Variant) if f.metadata.get("compile_only")),
        assume=lambda shape, options: assumed_grid_sizes(shape, Variant.from_dict(dict(options))),
    ),
    "jax_splash": Kernel(
        build=_jax_splash, op_name="splash_mha", requires="jax", exact_at_any_length=False, notes=(_UNMASKED,)
    ),
    "tokamax_splash": Kernel(
        build=_tokamax_splash,
        op_name="splash_mha",
        requires="tokamax",
        extra="peers",
        exact_at_any_length=False,
        notes=(_UNMASKED,),
    ),
}
