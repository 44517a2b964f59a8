"""A kernel for tests, that compiles in no time: x * 2 + 1."""

import dataclasses
import os
import sys

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tuning.kernels import Kernel, Unrolled, one_of


@dataclasses.dataclass(frozen=True)
class Config:
    block: int = one_of(8, 16, 64)
    add_first: bool = one_of(False, True)


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int = 128


class Scaled(Kernel[Config, Sizes]):
    Config, Workload = Config, Sizes

    def arguments(self, workload):
        return [jax.ShapeDtypeStruct((workload.rows, 128), jnp.float32)]

    def build(self, config):
        def body(x_ref, out_ref):
            for row in range(0, config.block, 8):  # unrolled
                x = x_ref[row : row + 8]
                out_ref[row : row + 8] = (x + 0.5) * 2 if config.add_first else x * 2 + 1

        def scaled(x):
            block = pl.BlockSpec((config.block, 128), lambda i: (i, 0))
            grid = (x.shape[0] // config.block,)
            out = jax.ShapeDtypeStruct(x.shape, x.dtype)
            call = pl.pallas_call(body, grid=grid, in_specs=[block], out_specs=block, out_shape=out, name="scaled")
            return call(x)

        return scaled

    def reference(self, x):
        return x * 2 + (2 if os.environ.get("SCALED_IS_WRONG") else 1)

    def is_valid(self, config, workload):
        return workload.rows % config.block == 0 or "block does not divide rows"

    def unrolled(self, config, workload):
        def shorter(block):
            return dataclasses.replace(config, block=block) if config.block > block else None

        return Unrolled(config.block, workload.rows // config.block, shorter(32), shorter(8))

    def check_workload(self, config, workload):
        return Sizes(rows=min(workload.rows, 4 * config.block))

    def check_config(self, config, workload):
        return dataclasses.replace(config, block=8)


class Idle(Scaled):
    """Its tunable `add_first` changes nothing."""

    def build(self, config):
        return super().build(dataclasses.replace(config, add_first=False))


class Flat(Scaled):
    """Returns another shape than its reference."""

    def build(self, config):
        call = super().build(config)
        return lambda x: call(x).reshape(-1)


class NanWhereUnwritten(Scaled):
    """Leaves the last row of each block unwritten."""

    def build(self, config):
        def body(x_ref, out_ref):
            out_ref[: config.block - 1] = x_ref[: config.block - 1] * 2 + 1

        def scaled(x):
            block = pl.BlockSpec((config.block, 128), lambda i: (i, 0))
            out = jax.ShapeDtypeStruct(x.shape, x.dtype)
            grid = (x.shape[0] // config.block,)
            return pl.pallas_call(body, grid=grid, in_specs=[block], out_specs=block, out_shape=out, name="scaled")(x)

        return scaled


class Beside(Scaled):
    """Has baselines: XLA's, one that computes something else, and one that is not for this device."""

    def baselines(self):
        def absent(x):
            raise NotImplementedError("not for this device")

        return {"XLA": lambda x: x * 2 + 1, "wrong": lambda x: x * 2, "absent": absent}


class Here(Beside):
    """Is for the processor that tests run on, so that it is measured as a chip's kernel is."""

    platform = "cpu"

    def build(self, config):
        return lambda x: (x + 0.5) * 2 if config.add_first else x * 2 + 1


class Divides(Scaled):
    """Fails in build, at a line of this file."""

    def build(self, config):
        return super().build(dataclasses.replace(config, block=config.block // 0))


class Exits(Scaled):
    """Ends the process in build."""

    def build(self, config):
        sys.exit(3)


class Partly(Scaled):
    """Leaves the rows past the last whole block unwritten, which the sizes of its check do not show."""

    def is_valid(self, config, workload):
        return True

    def check_workload(self, config, workload):
        return Sizes(rows=2 * config.block)


class Refuses(Scaled):
    """Takes one value of a tunable only."""

    def build(self, config):
        if config.add_first:
            raise ValueError("not today")
        return super().build(config)


class BuildsNothing(Scaled):
    """Returns no function from build."""

    def build(self, config):
        return 3


class TakesAnother(Scaled):
    """Has a baseline of other arguments."""

    def baselines(self):
        return {"XLA": lambda x, y: x + y}


class Plain(Scaled):
    """Has an argument without a shape."""

    def arguments(self, workload):
        return [1.0]


class UnrollsFive(Scaled):
    """Says of its unrolled code what nothing can use."""

    def unrolled(self, config, workload):
        return 5


class UnrollsTheSame(Scaled):
    """Says of itself that it is shorter than it is."""

    def unrolled(self, config, workload):
        return Unrolled(config.block, workload.rows // config.block, config)


class AssumesNothing(Scaled):
    """Returns nothing where grid sizes are wanted."""

    def assume(self, config, workload):
        return None


class ListsBaselines(Scaled):
    """Has baselines without names."""

    def baselines(self):
        return []


class ReturnsNothing(Scaled):
    """Computes nothing, as its reference does."""

    def build(self, config):
        return lambda x: None

    def reference(self, x):
        return None


class Trips(Scaled):
    """Fails with one value of a tunable, by a mistake of its author."""

    def build(self, config):
        return {}["block"] if config.add_first else super().build(config)
