"""What the public call accepts: types, shapes, dtypes and values, each refused in one line."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from splash_attn.types import AttentionShape

SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")


def as_array(name: str, x: Any) -> Any:
    """Return x as it is, a JAX or NumPy array, or the array that it wraps by `__jax_array__`."""
    if isinstance(x, jax.Array | np.ndarray):
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
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"scale={scale!r}: expected a finite number.")
    return number


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


def refuse_not_finite(**arrays: jax.Array) -> None:
    """Refuse NaN and infinity where all values are known, with one wait for the device."""
    if any(isinstance(x, jax.core.Tracer) for x in arrays.values()):
        return
    with jax.ensure_compile_time_eval():  # also where something else is being traced
        finite = jax.device_get([_all_finite(x) for x in arrays.values()])
    for name, is_finite in zip(arrays, finite, strict=True):
        if not is_finite:
            raise ValueError(f"{name} holds NaN or infinity: expected finite values.")


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()
