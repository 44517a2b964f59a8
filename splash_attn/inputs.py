"""What the public call accepts: types, shapes, dtypes, values and shardings, each refused in one line."""

import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from splash_attn.types import AttentionShape

SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")


def as_array(name: str, x: Any) -> Any:
    """Return x as it is, a JAX or NumPy array, or the array that it wraps by `__jax_array__`."""
    if isinstance(x, jax.Array):
        return x
    if isinstance(x, np.ndarray):
        if not x.dtype.isnative:  # JAX takes its bytes for those of the other order
            remedy = f"use {name}.astype({x.dtype.name!r})"
            raise ValueError(f"{name}.dtype={x.dtype}: expected the byte order of this machine; {remedy}.")
        return x
    if hasattr(x, "__jax_array__"):
        return x.__jax_array__()
    kind = type(x)
    remedy = "jnp.asarray(x)"
    if kind.__module__.partition(".")[0] in ("torch", "torchax"):
        remedy = "jax.dlpack.from_dlpack(x.detach()), or call this through torchax.interop.call_jax"
    raise ValueError(f"{name} is a {kind.__module__}.{kind.__qualname__}: expected a JAX or NumPy array; use {remedy}.")


def as_number(scale: Any) -> float:
    """Return a scale that is known when tracing as a Python float."""
    if isinstance(scale, jax.core.Tracer):
        raise ValueError(
            "scale is traced: expected a number known when tracing; name it in jax.jit's static_argnames, "
            "or multiply q by it and pass scale=1.0."
        )
    try:
        number = math.nan if isinstance(scale, str | bool) else float(scale)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"scale={scale!r}: expected a finite number.")
    return number


def as_length(kv_seq_len: Any, available: int) -> int:
    """Return how many of the `available` keys count, as a Python int."""
    try:
        length = 0 if isinstance(kv_seq_len, bool) else operator.index(kv_seq_len)
    except TypeError:
        length = 0
    if not 0 < length <= available:
        raise ValueError(
            f"{kv_seq_len=}: expected an integer from 1 to {available}, the keys that there are, known when tracing."
        )
    return length


def check_flag(name: str, value: Any) -> bool:
    """Return a flag as a Python bool."""
    if not isinstance(value, bool | np.bool):
        raise ValueError(f"{name}={value!r}: expected True or False, known when tracing.")
    return bool(value)


def check_shapes(q: jax.Array, k: jax.Array, v: jax.Array) -> AttentionShape:
    """Return the shape of the call that q, k and v make up."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}.shape={x.shape}: expected [batch, heads, seq, head_dim].")
        if x.dtype.name not in SUPPORTED_DTYPES:
            raise ValueError(
                f"{name}.dtype={x.dtype.name}: expected one of {SUPPORTED_DTYPES}; use {name}.astype('float32')."
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name}.dtype={x.dtype.name}: expected q's dtype, {q.dtype.name}.")
        if 0 in x.shape:
            raise ValueError(f"{name}.shape={x.shape}: expected no empty dimension.")
    if k.shape != v.shape:
        raise ValueError(f"v.shape={v.shape}: expected k's shape, {k.shape}.")
    if (q.shape[0], q.shape[1], q.shape[3]) != (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(f"k.shape={k.shape}: expected batch, heads and head_dim of q.shape={q.shape}.")
    return AttentionShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3])


def refuse_not_finite(kv_seq_len: int, **arrays: jax.Array) -> None:
    """Refuse NaN and infinity, in keys and values that count, where all are known, with one wait for the device."""
    if any(isinstance(x, jax.core.Tracer) for x in arrays.values()):
        return
    with jax.ensure_compile_time_eval():  # also where something else is being traced
        finite = [_all_finite(x, None if name == "q" else kv_seq_len) for name, x in arrays.items()]
    for name, is_finite in zip(arrays, jax.device_get(finite), strict=True):
        if not is_finite:
            raise ValueError(f"{name} holds NaN or infinity: expected finite values.")


@functools.partial(jax.jit, static_argnums=1)
def _all_finite(x: jax.Array, seq_len: int | None) -> jax.Array:
    return jnp.isfinite(x[:, :, :seq_len]).all()


def find_sharding(*, partitioned: bool, **arrays: jax.Array | np.ndarray) -> NamedSharding | None:
    """Return how q, k and v lie on several devices, all alike; None: on one, or not known, or within shard_map.

    It is known where the mesh's axes are explicit, and outside jit. partitioned: XLA may divide the computation as it
    likes, which it cannot do with a kernel; only explicit axes count then.

    Raises:
      ValueError: they are divided otherwise than by batch and heads, all alike.
    """
    known = {name: _sharding(x, partitioned) for name, x in arrays.items()}
    first = next((sharding for sharding in known.values() if sharding is not None), None)
    if first is None:
        return None
    for name, sharding in known.items():
        spec = sharding.spec if sharding is not None else PartitionSpec()
        if any(spec[2:]) or (*spec, None, None)[:2] != (*first.spec, None, None)[:2]:
            raise ValueError(
                f"{name} is sharded as {spec}: expected q, k and v all alike, and by batch and heads only; "
                "use jax.sharding.reshard, or call attention within jax.shard_map(..., check_vma=False)."
            )
    return first


def _sharding(x: jax.Array | np.ndarray, partitioned: bool) -> NamedSharding | None:
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    if AxisType.Explicit in sharding.mesh.axis_types:
        return sharding
    if partitioned or isinstance(x, jax.core.Tracer):
        return None
    return x.sharding if isinstance(x.sharding, NamedSharding) and x.sharding.mesh.size > 1 else None
