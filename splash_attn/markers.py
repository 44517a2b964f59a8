"""Identities that say no: what they mark cannot be lowered for a TPU, or cannot be differentiated."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def _identity(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.def_impl(lambda x: x)
    primitive.def_abstract_eval(lambda x: x)
    batching.defvectorized(primitive)
    mlir.register_lowering(primitive, lambda context, x: [x])
    return primitive


def _refuse_tpu(context: mlir.LoweringRuleContext, x: Any) -> Any:
    raise ValueError(
        "attention chose implementation='xla' when no TPU was in sight, and is now lowered for one: trace it within "
        "jax.set_mesh or jax.sharding.use_abstract_mesh of the TPU's devices, or ask for implementation='xla'."
    )


def _refuse_gradient(primals: Any, tangents: Any) -> Any:
    raise NotImplementedError(
        "attention: the Pallas kernel has no gradient yet; implementation='xla' has one, use it to differentiate."
    )


_CHOSEN_OFF_TPU = _identity("attention_chosen_off_tpu")
ad.deflinear2(_CHOSEN_OFF_TPU, lambda cotangent, _: [cotangent])
mlir.register_lowering(_CHOSEN_OFF_TPU, _refuse_tpu, platform="tpu")
_NO_GRADIENT = _identity("attention_without_gradient")
ad.primitive_jvps[_NO_GRADIENT] = _refuse_gradient


def chosen_off_tpu(x: jax.Array) -> jax.Array:
    """Return x; lowering it for a TPU raises ValueError."""
    return _CHOSEN_OFF_TPU.bind(x)


def without_gradient(x: jax.Array) -> jax.Array:
    """Return x; differentiating it, forward or backward, raises NotImplementedError."""
    return _NO_GRADIENT.bind(x)
