"""tokamax's ragged matrix product, of a mixture of experts, for TPU: `pip install 'cogvideox-splash[peers]'`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tuning.kernels import Kernel, one_of


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of tokamax's Config, with its defaults."""

    tile_m: int = one_of(128, 256, 512)
    tile_k: int = one_of(128, 512, 1024, 2048)
    tile_n: int = one_of(128, 512, 1024)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Rows of all tokens, and the matrices of the experts."""

    rows: int = 8192
    features: int = 2048
    out_features: int = 1024
    experts: int = 8


class RaggedDot(Kernel[Tiles, Experts]):
    Config, Workload = Tiles, Experts
    requires = ("tokamax",)

    def arguments(self, workload):
        x = jax.ShapeDtypeStruct((workload.rows, workload.features), jnp.bfloat16)
        w = jax.ShapeDtypeStruct((workload.experts, workload.features, workload.out_features), jnp.bfloat16)
        # How the rows fall on the experts decides how much the kernel does: here unevenly, always alike.
        share = np.arange(1, workload.experts + 1, dtype=np.float64)
        sizes = np.floor(workload.rows * share / share.sum()).astype(np.int32)
        sizes[-1] += workload.rows - sizes.sum()
        return x, w, sizes

    def build(self, config):
        from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as tokamax

        tiling = (config.tile_m, config.tile_k, config.tile_n)

        def ragged_dot(x, w, sizes):
            return tokamax.gmm(x, w, sizes, precision=jax.lax.Precision.DEFAULT, out_dtype=x.dtype, tiling=tiling)

        return ragged_dot

    def reference(self, x, w, sizes):
        return jax.lax.ragged_dot(x.astype(jnp.float32), w.astype(jnp.float32), sizes)

    def is_valid(self, config, workload):
        pairs = (
            (workload.rows, config.tile_m),
            (workload.features, config.tile_k),
            (workload.out_features, config.tile_n),
        )
        return all(size % tile == 0 for size, tile in pairs) or "tiles do not divide the sizes"

    def check_workload(self, config, workload):
        return Experts(rows=4 * config.tile_m, features=config.tile_k, out_features=config.tile_n, experts=3)

    def flops(self, workload):
        return 2 * workload.rows * workload.features * workload.out_features
