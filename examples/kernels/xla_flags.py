"""Flags of the TPU compiler for a plain JAX function, a matrix product with a normalisation: no kernel at all."""

import dataclasses

import jax
import jax.numpy as jnp

from tuning.kernels import Kernel, compiler_option


@dataclasses.dataclass(frozen=True)
class Flags:
    """None leaves a flag to the compiler."""

    scoped_vmem_kib: int | None = compiler_option("xla_tpu_scoped_vmem_limit_kib", None, 32768, 65536, 98304)
    latency_hiding: bool | None = compiler_option("xla_tpu_enable_latency_hiding_scheduler", None, True, False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    tokens: int = 8192
    features: int = 4096
    out_features: int = 4096


class ProjectAndNormalize(Kernel[Flags, Sizes]):
    Config, Workload = Flags, Sizes

    def arguments(self, workload):
        x = jax.ShapeDtypeStruct((workload.tokens, workload.features), jnp.bfloat16)
        return x, jax.ShapeDtypeStruct((workload.features, workload.out_features), jnp.bfloat16)

    def build(self, config):
        def project(x, w):
            y = jnp.dot(x, w, preferred_element_type=jnp.float32)
            return (y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

        return project

    def reference(self, x, w):
        y = x.astype(jnp.float32) @ w.astype(jnp.float32)
        return y / jnp.sqrt((y * y).mean(axis=-1, keepdims=True) + 1e-6)

    def check_workload(self, config, workload):
        return Sizes(tokens=256, features=512, out_features=512)

    def flops(self, workload):
        return 2 * workload.tokens * workload.features * workload.out_features
