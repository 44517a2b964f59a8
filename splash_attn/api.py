"""The public call: checks, smoothing and scaling, the choice of implementation and of tuned blocks."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from splash_attn import gates, tuned
from splash_attn.kernel import short_unroll_q, splash_attention_kernel
from splash_attn.quantize import quantize_qk
from splash_attn.types import AttentionShape, BlockSizes, QkDtype, Variant

logger = logging.getLogger(__name__)

Implementation = Literal["pallas_tpu", "pallas_interpret", "xla"]

LOG2_E = math.log2(math.e)
SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")
# Scores that the "xla" implementation holds at once.
_XLA_SCORE_BYTES = 2**28


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
) -> Float[Array, "batch heads q_seq head_dim"]:
    """`softmax(scale * q k^T) v`, exact at any length: padding never takes part in the softmax.

    The Pallas implementations multiply in bfloat16 and accumulate in float32, whatever the input dtype: float32 and
    float16 inputs are rounded once. "xla" computes in float32 throughout.

    Args:
      q, k, v: bfloat16, float16 or float32, all of one dtype. q_seq and kv_seq may differ.
      scale: multiplies the logits; None means head_dim ** -0.5. The caller multiplies nothing in beforehand.
      k_smooth: subtract the mean key (SageAttention, arXiv:2410.02367). It shifts each row of logits by a constant, so
        it changes nothing but rounding. Keys that have to be rounded to bfloat16 are centred first; the "fixed_bound"
        softmax centres its bound, and is then proved exact over twice the range.
      block_sizes, variant: how the kernel runs; None takes the tuned entry for this device and shape
        (`splash_attn.tuned`).
      qk_dtype: "int8" asks for int8 q and k, faster and not exact, for the heads whose error is within
        `splash_attn.gates.INT8_ERROR_BUDGET`. None means what `variant` says, and bfloat16 without one. Like a variant,
        it is about the kernel: "xla" computes in float32 whatever it says.
      implementation: "pallas_tpu", "pallas_interpret" (the same kernel, interpreted on any platform: slow) or "xla"
        (plain JAX in bounded memory). None means "pallas_tpu" on a TPU and "xla" elsewhere; the choice is logged.
      interpret: the same as implementation="pallas_interpret".

    Returns:
      The attention output in q's dtype.

    Raises:
      ValueError: mismatched shapes or dtypes, an unsupported dtype or head_dim, an empty sequence, a scale or (outside
        jit) an input that is not finite, an unknown implementation.
    """
    shape = _check(q, k, v, scale)
    resolution = resolve(
        shape,
        dtype=q.dtype.name,
        block_sizes=block_sizes,
        variant=variant,
        qk_dtype=qk_dtype,
        implementation=implementation,
        interpret=interpret,
    )
    _report(shape, resolution)
    scale = shape.head_dim**-0.5 if scale is None else float(scale)
    if resolution.implementation == "xla":
        return _attention_xla(q, k, v, scale=scale, k_smooth=k_smooth)
    assert resolution.block_sizes is not None and resolution.variant is not None
    return _attention_pallas(
        q,
        k,
        v,
        scale=scale,
        k_smooth=k_smooth,
        block_sizes=resolution.block_sizes,
        variant=resolution.variant,
        interpret=resolution.implementation == "pallas_interpret",
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
        that contradicts `variant`.
    """
    if qk_dtype not in (None, *get_args(QkDtype)):
        raise ValueError(f"qk_dtype={qk_dtype!r}: expected one of {get_args(QkDtype)}, or None.")
    if variant is not None and qk_dtype not in (None, variant.qk_dtype):
        raise ValueError(f"qk_dtype={qk_dtype!r} contradicts variant={variant}; leave one of them out.")
    if implementation is not None and implementation not in get_args(Implementation):
        raise ValueError(f"implementation={implementation!r}: expected one of {get_args(Implementation)}, or None.")
    if interpret:
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
    blocks = tuned.clamp(block_sizes, shape)
    return Resolution(implementation, blocks, variant or Variant(qk_dtype=qk_dtype), f"{reason}; block sizes given")


@functools.cache
def _report(shape: AttentionShape, resolution: Resolution) -> None:
    logger.info("attention %s: %s", shape, resolution)


def _device_kind() -> str:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def _check(q: jax.Array, k: jax.Array, v: jax.Array, scale: float | None) -> AttentionShape:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}.shape={x.shape}: expected [batch, heads, seq, head_dim].")
        if x.dtype.name not in SUPPORTED_DTYPES:
            raise ValueError(f"{name}.dtype={x.dtype.name}: expected one of {SUPPORTED_DTYPES}.")
        if x.dtype != q.dtype:
            raise ValueError(f"{name}.dtype={x.dtype.name}: expected q's dtype, {q.dtype.name}.")
        if 0 in x.shape:
            raise ValueError(f"{name}.shape={x.shape}: expected no empty dimension.")
    if k.shape != v.shape:
        raise ValueError(f"v.shape={v.shape}: expected k's shape, {k.shape}.")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(f"k.shape={k.shape}: expected batch, heads and head_dim of q.shape={q.shape}.")
    if scale is not None and not (math.isfinite(scale)):
        raise ValueError(f"scale={scale}: expected a finite number.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, jax.core.Tracer) and not jnp.isfinite(x).all():
            raise ValueError(f"{name} holds NaN or infinity: expected finite values.")
    return AttentionShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])


def _centre(k: jax.Array) -> jax.Array:
    """k minus its mean over the sequence, in float32."""
    k32 = k.astype(jnp.float32)
    return k32 - k32.mean(axis=-2, keepdims=True)


def _attention_pallas(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    k_smooth: bool,
    block_sizes: BlockSizes,
    variant: Variant,
    interpret: bool,
) -> jax.Array:
    batch_size, num_heads, q_seq_len, head_dim = q.shape
    kv_seq_len = k.shape[2]
    exponent_scale = scale * LOG2_E
    # Keys in bfloat16 are used as they are: subtracting their mean would round them again, for nothing.
    smooth_keys = k_smooth and k.dtype != jnp.bfloat16
    ks = (_centre(k) if smooth_keys else k).astype(jnp.bfloat16).reshape(-1, kv_seq_len, head_dim)
    qs = q.astype(jnp.bfloat16).reshape(-1, q_seq_len, head_dim).swapaxes(1, 2)
    vs = v.astype(jnp.bfloat16).reshape(-1, kv_seq_len, head_dim).swapaxes(1, 2)
    heads = batch_size * num_heads
    call = functools.partial(splash_attention_kernel, block_sizes=block_sizes, interpret=interpret)
    in_bfloat16 = functools.partial(call, qs, ks, vs, exponent_scale=exponent_scale)

    def restore(out: jax.Array) -> jax.Array:
        return out.swapaxes(1, 2).reshape(q.shape).astype(q.dtype)

    if variant.softmax == "online":
        return restore(in_bfloat16(variant=variant))
    unroll_q = short_unroll_q(block_sizes.block_kv, block_sizes, variant)
    fallback = dataclasses.replace(variant, qk_dtype="bfloat16", unroll_q=unroll_q, lp_scheduler=False)
    online = dataclasses.replace(fallback, softmax="online")
    fixed = fallback if variant.qk_dtype == "int8" else variant
    common: dict[str, Any] = {"exponent_scale": exponent_scale, "kv_seq_len": kv_seq_len}
    log2_max_v = gates.log2_max(vs)
    k32 = ks.astype(jnp.float32)
    centre = k32.mean(axis=1, keepdims=True) if k_smooth else jnp.zeros((heads, 1, head_dim), jnp.float32)
    exact = gates.fixed_bound_exact(
        gates.max_length(qs),
        gates.max_length((k32 - centre).swapaxes(1, 2)),  # head_dim last, XLA may write k32 - centre out, slowly
        gates.max_length(centre.swapaxes(1, 2)),
        log2_max_v,
        centred=k_smooth,
        **common,
    )
    shift = (qs.astype(jnp.float32) * centre.swapaxes(1, 2)).sum(axis=1)
    # Each head goes to the first that may have it; a kernel leaves the heads of the others alone.
    ways: list[tuple[jax.Array, Callable[..., jax.Array]]] = [
        (exact, functools.partial(in_bfloat16, per_query=shift, variant=fixed))
    ]
    if variant.qk_dtype == "int8":
        quantized = quantize_qk(qs, ks, exponent_scale)
        accurate = gates.int8_accurate(
            quantized.q_length,
            quantized.k_length,
            quantized.q_step,
            quantized.k_step,
            log2_max_v,
            head_dim=head_dim,
            **common,
        )
        in_int8 = functools.partial(call, quantized.q, quantized.k, vs, per_query=quantized.scale, variant=variant)
        ways.insert(0, (accurate, in_int8))
    way = jnp.select([may for may, _ in ways], list(range(len(ways))), len(ways))
    order = jnp.argsort(way).astype(jnp.int32)
    out: jax.Array | None = None
    runs = [run for _, run in ways] + [functools.partial(in_bfloat16, variant=online)]
    for index, run in enumerate(runs):
        head_ids = jnp.roll(order, -(way < index).sum())
        out = run(head_ids=head_ids, num_heads=(way == index).sum(dtype=jnp.int32), out=out)
    assert out is not None
    return restore(out)


def _attention_xla(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float, k_smooth: bool) -> jax.Array:
    batch_size, num_heads, q_seq_len, head_dim = q.shape
    k32 = _centre(k) if k_smooth else k.astype(jnp.float32)
    v32 = v.astype(jnp.float32)

    def rows(q_chunk: jax.Array) -> jax.Array:
        logits = jnp.einsum(
            "bhqd,bhkd->bhqk", q_chunk.astype(jnp.float32) * scale, k32, precision=lax.Precision.HIGHEST
        )
        weights = jax.nn.softmax(logits, axis=-1)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, v32, precision=lax.Precision.HIGHEST).astype(q.dtype)

    chunk = max(8, _XLA_SCORE_BYTES // (4 * batch_size * num_heads * k.shape[2]))
    if chunk >= q_seq_len:
        return rows(q)
    num_chunks = -(-q_seq_len // chunk)
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, num_chunks * chunk - q_seq_len), (0, 0)))
    chunks = padded.reshape(batch_size, num_heads, num_chunks, chunk, head_dim)
    out = lax.map(rows, jnp.moveaxis(chunks, 2, 0))
    return jnp.moveaxis(out, 0, 2).reshape(padded.shape)[:, :, :q_seq_len]
