"""The Pallas implementations: operands of the kernel, which heads get which softmax, vmap, and no gradients."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from splash_attn import gates
from splash_attn.kernel import kernel_name, splash_attention_kernel
from splash_attn.markers import without_gradient
from splash_attn.quantize import quantize_qk
from splash_attn.tiles import fallback_unroll_q
from splash_attn.types import AttentionShape, BlockSizes, Variant
from splash_attn.xla import saturate

LOG2_E = math.log2(math.e)


def attention_pallas(q: jax.Array, k: jax.Array, v: jax.Array, **how: Any) -> jax.Array:
    """Return `_attention` with that `how`, one call of a larger batch under vmap, and an error where differentiated."""
    batched = custom_vmap(functools.partial(_attention, **how))

    @batched.def_vmap
    def _(axis_size: int, in_batched: list[bool], *arrays: jax.Array) -> tuple[jax.Array, bool]:
        if not axis_size:
            return jnp.zeros((0, *arrays[0].shape[1 if in_batched[0] else 0 :]), arrays[0].dtype), True
        wide = (
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(arrays, in_batched, strict=True)
        )
        out = batched(*(x.reshape(-1, *x.shape[2:]) for x in wide))
        return out.reshape(axis_size, -1, *out.shape[1:]), True

    return batched(*(without_gradient(x) for x in (q, k, v)))


def _to_bfloat16(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.bfloat16 else saturate(x.astype(jnp.float32), jnp.bfloat16)


def _half_centred(k: jax.Array, kv_seq_len: int) -> jax.Array:
    """Half of k less its mean over the sequence, the last axis, in float32: the whole might not fit."""
    half = k.astype(jnp.float32) * 0.5
    return half - (half * (1 / kv_seq_len)).sum(axis=-1, keepdims=True)


def _attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    k_smooth: bool,
    block_sizes: BlockSizes,
    variant: Variant,
    interpret: bool,
    kv_seq_len: int,
) -> jax.Array:
    batch_size, num_heads, _, head_dim = q.shape
    # Keys in bfloat16 are used as they are: subtracting their mean would round them again, for nothing.
    smooth_keys = k_smooth and k.dtype != jnp.bfloat16
    exponent_scale = max(-(2.0**126), min(2.0**126, scale * LOG2_E * (2 if smooth_keys else 1)))
    # head_dim on sublanes and the sequence on lanes: no register is half empty.
    qs, kt, vs = (x.reshape(-1, *x.shape[2:]).swapaxes(1, 2) for x in (q, k, v))

    def counted(x: jax.Array) -> jax.Array:
        """Return zeros for the keys that do not count."""
        return x if x.shape[2] == kv_seq_len else jnp.where(jnp.arange(x.shape[2]) < kv_seq_len, x, 0)

    ks = _to_bfloat16(_half_centred(counted(kt), kv_seq_len) if smooth_keys else kt)
    qs, vs = _to_bfloat16(qs), _to_bfloat16(vs)
    largest_v = jnp.abs(counted(vs)).max((1, 2)).astype(jnp.float32)
    v_scale = gates.power_of_two_scale(largest_v, log2_target=60)
    heads = batch_size * num_heads
    call = functools.partial(
        splash_attention_kernel, block_sizes=block_sizes, interpret=interpret, kv_seq_len=kv_seq_len
    )
    in_bfloat16 = functools.partial(call, qs, ks, vs, exponent_scale=exponent_scale)

    def restore(out: jax.Array) -> jax.Array:
        out = out.swapaxes(1, 2).reshape(q.shape)
        return out if out.dtype == q.dtype else saturate(out.astype(jnp.float32), q.dtype)

    if variant.softmax == "online":
        return restore(in_bfloat16(v_scale=v_scale, variant=variant))
    unroll_q = fallback_unroll_q(block_sizes, variant)
    fallback = dataclasses.replace(variant, qk_dtype="bfloat16", unroll_q=unroll_q, lp_scheduler=False)
    online = dataclasses.replace(fallback, softmax="online")
    fixed = fallback if variant.qk_dtype == "int8" else variant
    common: dict[str, Any] = {"exponent_scale": exponent_scale, "kv_seq_len": kv_seq_len}
    log2_max_v = jnp.log2(largest_v)
    k32 = ks.astype(jnp.float32)
    centre = jnp.zeros((heads, head_dim, 1), jnp.float32)
    if k_smooth:
        centre = counted(k32).sum(axis=2, keepdims=True) / kv_seq_len
    exact = gates.fixed_bound_exact(
        gates.max_length(qs),
        gates.max_length(counted(k32 - centre)),
        gates.max_length(centre),
        log2_max_v,
        centred=k_smooth,
        **common,
    )
    shift = (qs.astype(jnp.float32) * centre).sum(axis=1)
    # Each head goes to the first that may have it; a kernel leaves the heads of the others alone.
    ways: list[tuple[jax.Array, Callable[..., jax.Array]]] = [
        (exact, functools.partial(in_bfloat16, per_query=shift, variant=fixed))
    ]
    if variant.qk_dtype == "int8":
        quantized = quantize_qk(qs, ks[..., :kv_seq_len].swapaxes(1, 2), exponent_scale)
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
    runs = [run for _, run in ways] + [functools.partial(in_bfloat16, v_scale=v_scale, variant=online)]
    for index, run in enumerate(runs):
        head_ids = jnp.roll(order, -(way < index).sum())
        out = run(head_ids=head_ids, num_heads=(way == index).sum(dtype=jnp.int32), out=out)
    assert out is not None
    return restore(out)


def slow_grid_sizes(shape: AttentionShape, variant: Variant) -> dict[str, int]:
    """Return the other end of what `assumed_grid_sizes` assumes: all heads go to the slowest fallback, online softmax.

    Empty where nothing depends on the data.
    """
    assumed, _ = assumed_grid_sizes(shape, variant)
    online = {kernel_name(Variant(softmax="online")): shape.batch_size * shape.num_heads} if assumed else {}
    return dict.fromkeys(assumed, 0) | online


def assumed_grid_sizes(shape: AttentionShape, variant: Variant) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return what a prediction assumes of a call: all heads go to the kernel of `variant`, and none to its fallbacks.

    Returns:
      Heads by Pallas kernel name, as `offline_tpu.predict` takes them, and the assumption in words; both empty where
      nothing depends on the data.
    """
    if variant.softmax == "online":
        return {}, ()
    heads = shape.batch_size * shape.num_heads
    ways = [variant, dataclasses.replace(variant, qk_dtype="bfloat16"), Variant(softmax="online")]
    grid_sizes = {kernel_name(way): 0 for way in ways} | {kernel_name(variant): heads}
    return grid_sizes, (f"assumes that {kernel_name(variant)} may have all {heads} heads",)
