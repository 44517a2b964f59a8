"""The public call: checks, smoothing and scaling, the choice of implementation and of tuned blocks."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from splash_attn import tuned
from splash_attn.inputs import (
    as_array,
    as_length,
    as_number,
    check_flag,
    check_shapes,
    find_sharding,
    refuse_not_finite,
)
from splash_attn.markers import chosen_off_tpu
from splash_attn.pallas import attention_pallas
from splash_attn.types import AttentionShape, BlockSizes, QkDtype, Variant, clamp
from splash_attn.xla import attention_xla

logger = logging.getLogger(__name__)

Implementation = Literal["pallas_tpu", "pallas_interpret", "xla"]

# Scores that the "xla" implementation holds at once.
_XLA_SCORE_BYTES = 2**28
#: Settings of JAX that change what is traced, and the value of each that this package is written for.
_SETTINGS: tuple[tuple[Callable[[Any], Any], Any], ...] = (
    (jax.enable_x64, False),
    (jax.default_matmul_precision, None),
    (jax.numpy_dtype_promotion, "standard"),
    (jax.numpy_rank_promotion, "allow"),
    (jax.disable_jit, False),
    (jax.debug_nans, False),  # heads that a kernel leaves alone may hold any bits until another has computed them
    (jax.debug_infs, False),
)


@dataclasses.dataclass(frozen=True)
class Resolution:
    """How a call will run, and why."""

    implementation: Implementation
    block_sizes: BlockSizes | None
    variant: Variant | None
    reason: str

    def __str__(self) -> str:
        blocks = f" {self.block_sizes} {self.variant}" if self.block_sizes else ""
        return f"{self.implementation}{blocks}: {self.reason}"


def attention(
    q: Float[Array, "batch heads q_seq head_dim"],
    k: Float[Array, "batch heads kv_seq head_dim"],
    v: Float[Array, "batch heads kv_seq head_dim"],
    *,
    scale: float | None = None,
    k_smooth: bool = True,
    block_sizes: BlockSizes | None = None,
    variant: Variant | None = None,
    qk_dtype: QkDtype | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
    kv_seq_len: int | None = None,
) -> Float[Array, "batch heads q_seq head_dim"]:
    """`softmax(scale * q k^T) v`, exact at any length: padding never takes part in the softmax.

    The Pallas implementations multiply in bfloat16 and accumulate in float32, whatever the input dtype: float32 and
    float16 inputs are rounded once. "xla" computes in float32 throughout. Whatever the finite input, the output is
    finite; numbers under 2**-126 count as 0. The Pallas implementations have no gradient, "xla" has. JAX's settings of
    precision, promotion, x64 and debugging change nothing here.

    Arrays known to lie on several devices (outside jit, or by the explicit axes of a mesh) are to be divided by batch
    and heads, all alike: each device computes its own. Where JAX does not tell, as within jit on a mesh of other axes,
    call a kernel within jax.shard_map.

    Args:
      q, k, v: JAX or NumPy arrays in bfloat16, float16 or float32, all of one dtype. q_seq and kv_seq may differ.
      scale: multiplies the logits; None means head_dim ** -0.5. The caller multiplies nothing in beforehand. A number
        known when tracing: it is built into the kernel.
      k_smooth: subtract the mean key (SageAttention, arXiv:2410.02367). It shifts each row of logits by a constant, so
        it changes nothing but rounding. Keys that have to be rounded to bfloat16 are centred first; the "fixed_bound"
        softmax centres its bound, and is then proved exact over twice the range.
      block_sizes, variant: how the kernel runs; None takes the tuned entry for this device and shape
        (`splash_attn.tuned`).
      qk_dtype: "int8" asks for int8 q and k, faster and not exact, for the heads whose error is within
        `splash_attn.gates.INT8_ERROR_BUDGET`. None means what `variant` says, and bfloat16 without one. Like a variant,
        it is about the kernel: "xla" computes in float32 whatever it says.
      implementation: "pallas_tpu", "pallas_interpret" (the same kernel, interpreted on any platform: slow) or "xla"
        (plain JAX in bounded memory). None means "pallas_tpu" on a TPU and "xla" elsewhere; the choice is logged. The
        device is that of the mesh in context, that to which the arrays are committed, or JAX's default.
      interpret: the same as implementation="pallas_interpret".
      kv_seq_len: how many of the keys and values count; those behind may hold anything. None: all.

    Returns:
      The attention output in q's dtype.

    Raises:
      ValueError: mismatched shapes or dtypes, an unsupported type, dtype or head_dim, an empty sequence, a traced
        scale, a scale or (outside jit) an input that counts and is not finite, an unknown implementation, arrays that
        are divided otherwise, a file of tuned entries that cannot be read.
      NotImplementedError: a gradient of a Pallas implementation.
    """
    q, k, v = (as_array(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    k_smooth = check_flag("k_smooth", k_smooth)
    shape = check_shapes(q, k, v)
    if kv_seq_len is not None:
        shape = dataclasses.replace(shape, kv_seq_len=as_length(kv_seq_len, shape.kv_seq_len))
    scale = shape.head_dim**-0.5 if scale is None else as_number(scale)
    resolution = resolve(
        shape,
        dtype=q.dtype.name,
        device_kind=_device_kind(q, k, v),
        block_sizes=block_sizes,
        variant=variant,
        qk_dtype=qk_dtype,
        implementation=implementation,
        interpret=interpret,
    )
    _report(shape, resolution)
    sharding = find_sharding(partitioned=resolution.implementation == "xla", q=q, k=k, v=v)
    with contextlib.ExitStack() as stack:
        for setting, value in _SETTINGS:
            stack.enter_context(setting(value))
        refuse_not_finite(shape.kv_seq_len, q=q, k=k, v=v)
        return _run(
            q,
            k,
            v,
            sharding=sharding,
            scale=scale,
            k_smooth=k_smooth,
            resolution=resolution,
            asked=interpret or implementation is not None,
            score_bytes=_XLA_SCORE_BYTES,
            kv_seq_len=shape.kv_seq_len,
        )


def resolve(
    shape: AttentionShape,
    *,
    dtype: str = "bfloat16",
    device_kind: str | None = None,
    block_sizes: BlockSizes | None = None,
    variant: Variant | None = None,
    qk_dtype: QkDtype | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Resolution:
    """What `attention` would do for a shape, without doing it.

    Args:
      device_kind: as `jax.Device.device_kind`; None means the device of the mesh in context, or JAX's default.

    Raises:
      ValueError: an unknown implementation, one that contradicts `interpret` or that the device cannot run, a qk_dtype
        that contradicts `variant`, a file of tuned entries that cannot be read.
    """
    if qk_dtype not in (None, *get_args(QkDtype)):
        raise ValueError(f"qk_dtype={qk_dtype!r}: expected one of {get_args(QkDtype)}, or None.")
    if not isinstance(block_sizes, BlockSizes | None):
        raise ValueError(f"block_sizes={block_sizes!r}: expected splash_attn.BlockSizes, or None.")
    if not isinstance(variant, Variant | None):
        raise ValueError(f"variant={variant!r}: expected splash_attn.Variant, or None.")
    if variant is not None and qk_dtype not in (None, variant.qk_dtype):
        raise ValueError(f"qk_dtype={qk_dtype!r} contradicts variant={variant}; leave one of them out.")
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r}: expected one of {get_args(Implementation)}, or None.")
    if check_flag("interpret", interpret):
        if implementation not in (None, "pallas_interpret"):
            raise ValueError(f"interpret=True contradicts implementation={implementation!r}; leave one of them out.")
        implementation = "pallas_interpret"
    kind = device_kind if device_kind is not None else _device_kind()
    if implementation is None:
        implementation = "pallas_tpu" if kind.startswith("TPU") else "xla"
        reason = f"the device is {kind!r}"
    else:
        reason = "asked for"
    if implementation == "pallas_tpu" and not kind.startswith("TPU"):
        raise ValueError(
            f"implementation='pallas_tpu' on a device of kind {kind!r}: expected a TPU; "
            "use 'pallas_interpret' or 'xla', or leave it out."
        )
    if implementation == "xla":
        return Resolution(implementation, None, None, reason)
    qk_dtype = qk_dtype or "bfloat16"
    if block_sizes is None:
        choice = tuned.choose(kind, shape, dtype, variant=variant, qk_dtype=qk_dtype)
        return Resolution(implementation, choice.block_sizes, choice.variant, f"{reason}; {choice.reason}")
    blocks = clamp(block_sizes, shape)
    return Resolution(implementation, blocks, variant or Variant(qk_dtype=qk_dtype), f"{reason}; block sizes given")


@functools.cache
def _report(shape: AttentionShape, resolution: Resolution) -> None:
    logger.info("attention %s: %s", shape, resolution)


def _device_kind(*arrays: jax.Array | np.ndarray) -> str:
    """Of the mesh in context, else of what the arrays are committed to, else JAX's default."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        return abstract.device_kind
    for x in arrays:
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed:
            return next(iter(x.devices())).device_kind
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if isinstance(default, jax.Device):
        return default.device_kind
    return jax.devices(default)[0].device_kind


@functools.partial(
    jax.jit,
    static_argnames=("sharding", "scale", "k_smooth", "resolution", "asked", "score_bytes", "kv_seq_len"),
    inline=True,
)
def _run(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    sharding: NamedSharding | None,
    scale: float,
    k_smooth: bool,
    resolution: Resolution,
    asked: bool,
    score_bytes: int,
    kv_seq_len: int,
) -> jax.Array:
    def of_one_device(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        if resolution.implementation == "xla":
            k, v = k[:, :, :kv_seq_len], v[:, :, :kv_seq_len]
            out = attention_xla(q, k, v, scale=scale, k_smooth=k_smooth, score_bytes=score_bytes)
            return out if asked else chosen_off_tpu(out)
        assert resolution.block_sizes is not None and resolution.variant is not None
        return attention_pallas(
            q,
            k,
            v,
            scale=scale,
            k_smooth=k_smooth,
            block_sizes=resolution.block_sizes,
            variant=resolution.variant,
            interpret=resolution.implementation == "pallas_interpret",
            kv_seq_len=kv_seq_len,
        )

    if sharding is None:
        return of_one_device(q, k, v)
    spec = sharding.spec
    return jax.shard_map(of_one_device, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)(q, k, v)
