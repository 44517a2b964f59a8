"""The TPU kernel of `pipeline.model.vae.convolution`: what one step of its grid does.

A slab is one column of one frame, [rows * strips, channels], row by row. A step makes one slab of the result, 256 of
its channels, out of the slabs of the three columns around it, in each of the frames that it depends on. These are held
in VMEM, in a ring of four columns of all frames: three are read while the next one comes. Each is normed, or its rows
are repeated, once, where it lies.

A product of some rows with the weights of all columns and frames that meet there, for each of the three rows of the
kernel, gives three sums; moved by a row each, which moves whole registers, they are added. What belongs to rows of the
products before and after is carried from one to the next, and lags two rows behind.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pipeline.model.vae.conv_loading import COLUMNS, Loading, Sizes

TILE = 256  # channels of the result in a step


def kernel(*arguments: Any, n: Sizes) -> None:
    """Compute a step. Grid: columns, frames, tiles of channels. For the arguments see `convolution`."""
    refs: list[Any] = list(arguments)
    take: Callable[[], Any] = functools.partial(refs.pop, 0)
    inputs = [take() for _ in range(3)]  # and the columns beside the outermost ones
    layers: Any = None
    before: Any = None
    if n.given and not n.doubled:
        layers, before = take(), take()
    latents = [take() for _ in range(3)] if n.normed else [None] * 3
    latent_weights, factors = (take(), take()) if n.normed else (None, None)
    weights, bias = take(), take()
    residual = take() if n.residual else None
    shortcut_slabs = [take() for _ in range(n.shortcuts)]
    shortcut = take() if n.shortcuts else None
    del refs[: n.aliased]
    out = take()
    statistics = take() if n.statistics else None
    kept: Any = take() if n.kept else None
    ring, scales, carry, sums, arrived, stored = refs

    column, frame, tile = (pl.program_id(axis) for axis in range(3))
    source = lax.div(column, n.factor)
    load = Loading(
        n,
        inputs,
        before.at[layers[0]] if before is not None else None,
        latents,
        latent_weights,
        factors,
        ring,
        scales,
        arrived,
    )

    @pl.when((tile == 0) & (lax.rem(column, n.factor) == 0))
    def _() -> None:
        load.step(source, frame)

    def kept_copies(j: Any, side: int) -> list[Any]:
        frames = (max(n.frames_in - n.kept + n.given + i, 0) for i in range(n.kept))
        return [
            pltpu.make_async_copy(
                ring.at[lax.rem(j, COLUMNS), f], kept.at[layers[1] if n.layered else 0, i, j], stored.at[side, i]
            )
            for i, f in enumerate(frames)
        ]

    def keep(act: Callable[[Any], None]) -> None:
        for side, j, here in ((0, column + 1, True), (1, 0, column == 0), (2, n.columns + 1, column == n.columns - 1)):

            @pl.when((frame == n.frames - 1) & here)
            def _(side: int = side, j: Any = j) -> None:
                for copy in kept_copies(j, side):
                    act(copy)

    if kept is not None:
        pl.when(tile == 0)(lambda: keep(lambda copy: copy.start()))

    slabs = []
    for tap in range(n.taps):
        position = frame * n.stride + tap - n.lead
        index = position + n.given if n.given else jnp.maximum(position, 0)
        for width in range(3):
            j = column + width if n.factor == 1 else lax.div(column + width + 1, 2)
            slabs.append(ring.at[lax.rem(j, COLUMNS), index])
    lanes: Any = slice(None)
    if n.width < weights.shape[2] and not n.narrow:
        lanes = pl.ds(pl.multiple_of(tile * n.width, n.width), n.width)

    def products(start: Any, size: int) -> list[jax.Array]:
        """Return what some positions add to the row below them, to their own and to the row above them."""
        left = jnp.concatenate([slab[pl.ds(start, size), :] for slab in slabs], axis=1)

        def with_weights(row: int) -> jax.Array:
            return jnp.dot(left, weights[row, :, lanes], preferred_element_type=jnp.float32)

        if n.narrow:
            together = with_weights(0)
            return [together[:, row * n.narrow : (row + 1) * n.narrow] for row in range(3)]
        to_below, own, to_above = (with_weights(row) for row in range(3))
        if shortcut is not None:
            slab = jnp.concatenate([slab[0, 0, pl.ds(start, size), :] for slab in shortcut_slabs], axis=1)
            own += jnp.dot(slab, shortcut[:, lanes], preferred_element_type=jnp.float32)
        return [to_below, own, to_above]

    _Convolving(n, products, bias[...], residual, out, carry, sums if n.statistics else None).slab()
    if statistics is not None:
        nothing = jnp.zeros((5, n.width), jnp.float32)
        rows = [sums[0].sum(0, keepdims=True), sums[1].sum(0, keepdims=True), sums[2, :1]]
        statistics[0, 0] = jnp.concatenate([*rows, nothing])
    if kept is not None:
        pl.when(tile == pl.num_programs(2) - 1)(lambda: keep(lambda copy: copy.wait()))


@dataclasses.dataclass(frozen=True)
class _Convolving:
    """Adds products to a slab of the result."""

    n: Sizes
    products: Callable[[Any, int], list[jax.Array]]
    bias: jax.Array
    residual: Any
    out: Any
    carry: Any
    sums: Any

    def slab(self) -> None:
        n, carry, s = self.n, self.carry, self.n.strips
        block = n.block_rows * s
        if n.block_rows == n.rows:
            to_below, own, to_above = self.products(0, block)
            nothing = jnp.zeros((s, own.shape[1]), jnp.float32)
            values = own + jnp.concatenate([nothing, to_below[:-s]]) + jnp.concatenate([to_above[s:], nothing])
            self._start_sums(values)
            self._write(0, values)
            return
        carry[...] = jnp.zeros_like(carry)

        def one(i: Any, _: Any) -> Any:
            start = pl.multiple_of(i * block, block)
            to_below, own, to_above = self.products(start, block)
            done, before, to_first = (carry[row * s : (row + 1) * s] for row in range(3))
            first = to_first + own[:s] + to_above[s : 2 * s]
            middle = to_below[: -2 * s] + own[s:-s] + to_above[2 * s :]
            last = to_below[-2 * s : -s] + own[-s:]
            carry[...] = jnp.concatenate([middle[-s:], last, to_below[-s:]])

            pl.when(i == 0)(lambda: self._start_sums(first))

            @pl.when(i > 0)
            def before_it() -> None:
                self._write(pl.multiple_of(start - 2 * s, 16), jnp.concatenate([done, before + to_above[:s]]))

            self._write(start, jnp.concatenate([first, middle[:-s]]))
            return 0

        lax.fori_loop(0, n.rows // n.block_rows, one, 0)
        self._write(n.positions - 2 * s, carry[: 2 * s])

    def _start_sums(self, values: jax.Array) -> None:
        """Take sums about one of the values: about zero, those far from it would lose digits."""
        if self.sums is not None:
            self.sums[...] = jnp.zeros_like(self.sums)
            self.sums[2] = jnp.broadcast_to(values[:1] + self.bias, self.sums.shape[1:])

    def _write(self, start: Any, values: jax.Array) -> None:
        values, at = values + self.bias, pl.ds(start, len(values))
        if self.residual is not None:
            values = values + self.residual[0, 0, at, :].astype(jnp.float32)
        self.out[0, 0, at, :] = values.astype(self.out.dtype)
        if self.sums is not None:
            away = (values - self.sums[2, :1]).reshape(-1, 8, values.shape[1])
            self.sums[0] += away.sum(0)
            self.sums[1] += jnp.square(away).sum(0)
