"""The attention kernels that a trial can be about, ours and the peers, each in the form that a user's kernel has.

Each takes q, k, v `[batch, heads, seq, head_dim]` and does everything that its caller would have to do around it.
"""

import abc
import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import splash_attn
from splash_attn.api import Implementation
from splash_attn.gates import INT8_ERROR_BUDGET
from splash_attn.pallas import assumed_grid_sizes, slow_grid_sizes
from splash_attn.types import AttentionShape, BlockSizes, Variant
from tuning.kernels.protocol import Kernel, Unrolled
from tuning.trials import workloads

Attention = Callable[..., jax.Array]
#: What a kernel is given besides block sizes: for ours the fields of Variant, for a peer its own.
Options = Mapping[str, Any]

_LAYOUTS = ("q_layout", "k_layout", "v_layout")
_UNMASKED = "padded keys take part in the softmax: inexact unless the blocks divide the sequence"

#: Rows past one whole block: two blocks each way with a partial second one, of prime and distinct size.
_EXTRA_Q, _EXTRA_KV = 211, 307
#: Largest base-2 logit that each head of a check can have: one that the fixed-bound softmax takes, one it does not.
_BOUNDS = (50.0, 120.0)
#: With int8, whose error grows with it, also: the first is the only head that runs in int8.
_INT8_BOUNDS = (16.0, 50.0, 120.0)
#: Limits of ||actual - expected|| / ||expected|| over all rows, and of the worst row. bfloat16 rounds q * scale,
#: k - mean(k), the probabilities and the output, each by up to 2^-8 of itself; with logits of deviation 2.5 (first
#: head) to 6 (second) that comes to 0.007 over all and 0.04 in the worst of some thousand rows. A row that is wrong is
#: off by about 1. float32 has the same limits: the Pallas kernels multiply in bfloat16 whatever the input.
TOLERANCES = {"bfloat16": (2**-6, 2**-3), "float32": (2**-6, 2**-3)}
#: int8: the error that it is allowed, which is for the rms; for the worst row the same share more as above.
INT8_TOLERANCE = (INT8_ERROR_BUDGET, 8 * INT8_ERROR_BUDGET)
#: Queries that are unrolled in the kernel by which longer ones are estimated, without a loop and in one, which takes
#: longer to compile; and in the kernel around which the rest of the op is compiled.
_SHORT_LENGTH, _SHORT_LOOP, _LEAST_LENGTH = 2048, 1536, 640


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Block sizes, and what else an attention kernel is given, as pairs of name and value."""

    block_sizes: BlockSizes
    options: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, block_sizes: BlockSizes, options: Options) -> "AttentionConfig":
        return cls(block_sizes, tuple(options.items()))


class AttentionKernel(Kernel[AttentionConfig, workloads.Workload]):
    """An attention kernel. It is timed from the projections' outputs to the output projection's input.

    Attributes:
      extra: the optional extra of this project that installs it, if any.
      exact_at_any_length: False for a kernel that is only right where the blocks divide the sequences.
      compile_only: options that change nothing in interpret mode.
    """

    Config = AttentionConfig
    Workload = workloads.Workload
    extra: ClassVar[str | None] = None
    exact_at_any_length: ClassVar[bool] = True
    compile_only: ClassVar[frozenset[str]] = frozenset()

    @property
    def installed(self) -> bool:
        """Return whether the packages that it needs are there."""
        return all(importlib.util.find_spec(package) is not None for package in self.requires)

    @abc.abstractmethod
    def attention(self, block_sizes: BlockSizes, options: Options, implementation: Implementation) -> Attention:
        """Return the callable of q, k and v."""

    def config_of(self, block_sizes: BlockSizes | None, options: Options) -> AttentionConfig:
        """Return the configuration of a record's fields."""
        if block_sizes is None:
            raise ValueError(f"{self.name}: expected block sizes, got none.")
        return AttentionConfig.of(block_sizes, options)

    def build(self, config: AttentionConfig) -> Attention:
        """Return the attention of q, k and v on a TPU."""
        return self.attention(config.block_sizes, dict(config.options), "pallas_tpu")

    def arguments(self, workload: workloads.Workload) -> Sequence[jax.ShapeDtypeStruct]:
        """Return [batch, seq, heads * head_dim] three times."""
        shape = workload.shape
        lengths = (shape.q_seq_len, shape.kv_seq_len, shape.kv_seq_len)
        channels = shape.num_heads * shape.head_dim
        return tuple(jax.ShapeDtypeStruct((shape.batch_size, length, channels), workload.dtype) for length in lengths)

    def reference(self, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        """Return the attention in float64."""
        return splash_attn.attention_reference(q, k, v, dtype=np.float64)

    def flops(self, workload: workloads.Workload) -> float:
        """Return the FLOPs of the two matrix products."""
        return workload.shape.flops

    def check_workload(self, config: AttentionConfig, workload: workloads.Workload) -> workloads.Workload:
        """Return some heads, just past one block of q and one of kv."""
        blocks = config.block_sizes
        lengths = {"q_seq_len": blocks.block_q + _EXTRA_Q, "kv_seq_len": blocks.block_kv + _EXTRA_KV}
        if not self.exact_at_any_length:
            lengths = {"q_seq_len": 2 * blocks.block_q, "kv_seq_len": 2 * blocks.block_kv}
        heads = len(_INT8_BOUNDS if _is_int8(config) else _BOUNDS)
        shape = AttentionShape(batch_size=1, num_heads=heads, head_dim=workload.shape.head_dim, **lengths)
        return dataclasses.replace(workload, shape=shape)

    def inputs(self, workload: workloads.Workload) -> list[jax.Array]:
        """Return q, k and v of a check.

        The keys have a common offset, as before K-smoothing. Few keys dominate each row, so that a key too many or too
        few, or a lost rescale, shows. The largest |q| max|k - mean(k)| of the heads lie to either side of what the
        fixed-bound softmax takes (about 112 base-2 exponents at these lengths): every way through a kernel is checked.
        """
        shape = workload.shape
        bounds = np.array(_INT8_BOUNDS if shape.num_heads == len(_INT8_BOUNDS) else _BOUNDS, np.float32)
        rng = np.random.default_rng(0)

        def normal(rows: int) -> np.ndarray:
            return rng.standard_normal((1, len(bounds), rows, shape.head_dim), dtype=np.float32)

        q, k, v = normal(shape.q_seq_len), normal(shape.kv_seq_len), normal(shape.kv_seq_len)
        longest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
        q *= bounds[:, None, None] / (longest * shape.head_dim**-0.5 * np.log2(np.e))
        k += 2.0
        return [jnp.asarray(x, dtype=workload.dtype) for x in (q, k, v)]

    def limits(self, config: AttentionConfig, workload: workloads.Workload) -> tuple[float, float]:
        """Return the limits of the error over all rows and of the worst row."""
        return INT8_TOLERANCE if _is_int8(config) else TOLERANCES[workload.dtype]


def _is_int8(config: AttentionConfig) -> bool:
    return dict(config.options).get("qk_dtype") == "int8"


def from_projections(attention: Attention, num_heads: int) -> Attention:
    """Return attention as in a layer: it takes [batch, seq, heads * head_dim] three times, and returns the same."""

    def layer(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        heads = (x.reshape(*x.shape[:2], num_heads, -1).swapaxes(1, 2) for x in (q, k, v))
        return attention(*heads).swapaxes(1, 2).reshape(q.shape)

    return layer


class SplashAttn(AttentionKernel):
    """The kernel of `splash_attn`; its options are the fields of Variant."""

    name = "splash_attn"  # type: ignore[assignment]
    op_name = "splash_attention"
    requires = ("splash_attn",)
    compile_only = frozenset(f.name for f in dataclasses.fields(Variant) if f.metadata.get("compile_only"))

    def attention(self, block_sizes: BlockSizes, options: Options, implementation: Implementation) -> Attention:
        """Return `splash_attn.attention` with these block sizes, and `options` as its variant."""
        variant = Variant.from_dict(dict(options))
        return functools.partial(
            splash_attn.attention, block_sizes=block_sizes, variant=variant, implementation=implementation
        )

    def assume(self, config: AttentionConfig, workload: workloads.Workload) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return that all heads go to the kernel of the variant."""
        return assumed_grid_sizes(workload.shape, _variant(config))

    def assume_slow(self, config: AttentionConfig, workload: workloads.Workload) -> dict[str, int]:
        """Return that no head goes to the kernel of the variant, where some could."""
        return slow_grid_sizes(workload.shape, _variant(config))

    def check_config(self, config: AttentionConfig, workload: workloads.Workload) -> AttentionConfig:
        """Return as few tiles as fill the pipeline twice, with a shorter last one and a loop where there are such."""
        del workload
        blocks, variant = config.block_sizes, _variant(config)
        tile = variant.block_q_compute
        columns = -(-(variant.lookahead + 2) // 2)  # of two tiles each

        def short(length: int, rest: int) -> int:
            return min(length, columns * tile + rest % tile)

        block_q, unroll_q = short(blocks.block_q, blocks.block_q), variant.unroll_q
        if unroll_q is not None and unroll_q < blocks.block_q:
            rest = min(tile, blocks.block_q % unroll_q)
            unroll_q = short(unroll_q, unroll_q)
            block_q = min(blocks.block_q, 2 * unroll_q + rest)
        block_kv = min(blocks.block_kv, 2 * blocks.block_kv_compute)
        options = dict(config.options) | ({"unroll_q": unroll_q} if variant.unroll_q is not None else {})
        return AttentionConfig.of(BlockSizes(block_q, block_kv, blocks.block_kv_compute), options)

    def unrolled(self, config: AttentionConfig, workload: workloads.Workload) -> Unrolled[AttentionConfig]:
        """Return the queries of a block; of those that are unrolled, all or unroll_q, a shorter one has fewer."""
        blocks, unroll_q, tile = config.block_sizes, _variant(config).unroll_q, _variant(config).block_q_compute
        loops = unroll_q is not None and unroll_q < blocks.block_q
        length = unroll_q if loops and unroll_q is not None else blocks.block_q

        def shorter(new: int) -> AttentionConfig | None:
            if length <= new:
                return None
            loop_count, rest = divmod(blocks.block_q, length)
            block_q = loop_count * new + -(-rest * new // (length * tile)) * tile
            options = dict(config.options) | ({"unroll_q": new} if loops else {})
            return AttentionConfig.of(dataclasses.replace(blocks, block_q=block_q), options)

        # A tile that is cut in every trip costs more than its share.
        columns = max(3 if loops else 4, -(-(_SHORT_LOOP if loops else _SHORT_LENGTH) // tile))
        short = columns * tile + (length % tile if loops else 0)
        steps = workload.shape.batch_size * workload.shape.num_heads * -(-workload.shape.q_seq_len // blocks.block_q)
        return Unrolled(blocks.block_q, steps, shorter(short), shorter(_LEAST_LENGTH))


def _variant(config: AttentionConfig) -> Variant:
    return Variant.from_dict(dict(config.options))


class JaxSplash(AttentionKernel):
    """JAX's own splash attention, with block sizes and `layout` for q, k and v."""

    name = "jax_splash"  # type: ignore[assignment]
    op_name = "splash_mha"
    requires = ("jax",)
    exact_at_any_length = False
    notes = (_UNMASKED,)

    def attention(self, block_sizes: BlockSizes, options: Options, implementation: Implementation) -> Attention:
        """Return `make_splash_mha` without a mask."""
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


class TokamaxSplash(AttentionKernel):
    """tokamax's splash attention, with block sizes, `layout` of q, k, v, and `use_experimental_scheduler`."""

    name = "tokamax_splash"  # type: ignore[assignment]
    op_name = "splash_mha"
    requires = ("tokamax",)
    extra = "peers"
    exact_at_any_length = False
    notes = (_UNMASKED,)

    def attention(self, block_sizes: BlockSizes, options: Options, implementation: Implementation) -> Attention:
        """Return `make_splash_mha_single_device` without a mask."""
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


ATTENTION_KERNELS: tuple[AttentionKernel, ...] = (SplashAttn(), JaxSplash(), TokamaxSplash())
