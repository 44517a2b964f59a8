"""A tiled matrix product for TPU: `python -m tuning.sweep kernel=examples/kernels/matmul.py:Matmul workload.m=8192`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tuning.kernels import Kernel, one_of


@dataclasses.dataclass(frozen=True)
class Blocks:
    block_m: int = one_of(256, 512, 1024, 2048)
    block_n: int = one_of(256, 512, 1024, 2048)
    block_k: int = one_of(512, 1024, 2048)


@dataclasses.dataclass(frozen=True)
class Sizes:
    m: int = 4096
    n: int = 4096
    k: int = 4096


def body(x_ref, y_ref, out_ref, acc_ref, *, num_k):
    @pl.when(pl.program_id(2) == 0)
    def _():
        acc_ref[...] = jnp.zeros_like(acc_ref)

    acc_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == num_k - 1)
    def _():
        out_ref[...] = acc_ref[...].astype(out_ref.dtype)


class Matmul(Kernel[Blocks, Sizes]):
    Config, Workload = Blocks, Sizes
    vmem_grows_with = ("block_m", "block_n", "block_k")

    def arguments(self, workload):
        m, n, k = workload.m, workload.n, workload.k
        return jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((k, n), jnp.bfloat16)

    def build(self, config):
        def matmul(x, y):
            (m, k), n = x.shape, y.shape[1]
            return pl.pallas_call(
                functools.partial(body, num_k=k // config.block_k),
                grid=(m // config.block_m, n // config.block_n, k // config.block_k),
                in_specs=[
                    pl.BlockSpec((config.block_m, config.block_k), lambda i, j, k: (i, k)),
                    pl.BlockSpec((config.block_k, config.block_n), lambda i, j, k: (k, j)),
                ],
                out_specs=pl.BlockSpec((config.block_m, config.block_n), lambda i, j, k: (i, j)),
                out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
                scratch_shapes=[pltpu.VMEM((config.block_m, config.block_n), jnp.float32)],
                compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
                name="matmul",
            )(x, y)

        return matmul

    def reference(self, x, y):
        return jnp.dot(x, y, preferred_element_type=jnp.float32)

    def baselines(self):
        return {"XLA": lambda x, y: jnp.dot(x, y, preferred_element_type=jnp.bfloat16)}

    def is_valid(self, config, workload):
        fits = workload.m % config.block_m == workload.n % config.block_n == workload.k % config.block_k == 0
        return fits or "blocks do not divide the sizes"

    def check_workload(self, config, workload):
        return Sizes(m=config.block_m, n=config.block_n, k=2 * config.block_k)

    def flops(self, workload):
        return 2 * workload.m * workload.n * workload.k
