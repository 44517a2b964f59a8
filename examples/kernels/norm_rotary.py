"""RMS norm and rotary embedding in one pass over HBM, for TPU: as a transformer has them before its attention."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tuning.kernels import Kernel, one_of

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of one block. The default is that of a first draft."""

    block_rows: int = one_of(128, 256, 512, 1024, 2048)
    rotate_in_float32: bool = one_of(True, False)


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int = 32768  # tokens times heads
    head_dim: int = 128


def normalize(x, gain):
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * gain


def rotate(x, cos, sin):
    low, high = jnp.split(x, 2, axis=-1)
    return x * cos + jnp.concatenate([-high, low], axis=-1) * sin


class NormRotary(Kernel[Rows, Sizes]):
    Config, Workload = Rows, Sizes

    def arguments(self, workload):
        table = jax.ShapeDtypeStruct((workload.rows, workload.head_dim), jnp.bfloat16)
        return table, jax.ShapeDtypeStruct((1, workload.head_dim), jnp.float32), table, table

    def build(self, config):
        def body(x_ref, gain_ref, cos_ref, sin_ref, out_ref):
            dtype = jnp.float32 if config.rotate_in_float32 else jnp.bfloat16
            x = normalize(x_ref[...], gain_ref[...]).astype(dtype)
            out_ref[...] = rotate(x, cos_ref[...].astype(dtype), sin_ref[...].astype(dtype)).astype(out_ref.dtype)

        def norm_rotary(x, gain, cos, sin):
            rows, head_dim = x.shape
            block = pl.BlockSpec((config.block_rows, head_dim), lambda i: (i, 0))
            return pl.pallas_call(
                body,
                grid=(rows // config.block_rows,),
                in_specs=[block, pl.BlockSpec((1, head_dim), lambda i: (0, 0)), block, block],
                out_specs=block,
                out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
                name="norm_rotary",
            )(x, gain, cos, sin)

        return norm_rotary

    def reference(self, x, gain, cos, sin):
        return rotate(normalize(x, gain), cos.astype(jnp.float32), sin.astype(jnp.float32))

    def baselines(self):
        return {"XLA": lambda x, *others: self.reference(x, *others).astype(x.dtype)}

    def is_valid(self, config, workload):
        return workload.rows % config.block_rows == 0 or "block_rows does not divide the rows"

    def check_workload(self, config, workload):
        return dataclasses.replace(workload, rows=2 * config.block_rows)
