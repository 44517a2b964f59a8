"""How the kernel of `pipeline.model.vae.conv_kernel` brings its input into VMEM, and norms it there."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

COLUMNS = 4  # in the ring
_TILE_ROWS = 16  # of a tile of bfloat16
_CHUNK = 256  # positions that are worked on at once between products, at most


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a kernel is made for.

    Attributes:
      frames, columns, rows, strips: of the result.
      first, first_in, frames_in: the first of its frames and of the input's, of a call for some of them; how many.
      taps: frames of the input that one of the result depends on. stride: from these to the next one's.
      lead: how many of the first one's lie before the input. given: how many of them the ring holds; where it holds
        none, the input's first frame stands for them. doubled: the one that it holds is the first frame of the pair.
      factor: 2 where rows and columns are repeated. kept: frames handed to the next batch.
      odd: 1 where the first frame of the result depends on one frame less.
      row_repeat, per_frame, apart: rows and frames of the input to one of the latents; whether the first of these is
        of one frame.
      block_rows: of a product. width, narrow: channels of the result in a step; all of them, where few.
      shortcuts: frames that a step's residual is convolved from.
      aliased: results that are given, to be written in place. layered: whether what is kept is one of several layers'.
    """

    frames: int
    columns: int
    rows: int
    strips: int
    first: int
    first_in: int
    frames_in: int
    taps: int
    stride: int
    lead: int
    given: int
    doubled: bool
    factor: int
    kept: int
    odd: int
    normed: bool
    row_repeat: int
    per_frame: int
    apart: int
    block_rows: int
    width: int
    narrow: int
    residual: bool
    shortcuts: int
    statistics: bool
    aliased: int = 0
    layered: bool = False

    @property
    def columns_in(self) -> int:
        return self.columns // self.factor

    @property
    def positions(self) -> int:
        return self.rows * self.strips

    @property
    def raw(self) -> int:
        """Positions before rows are repeated."""
        return self.positions // self.factor

    @property
    def raw_start(self) -> int:
        """Where in a slab these lie: at its end, where a tile begins, as v7x's DMAs must."""
        return -(-(self.positions - self.raw) // _TILE_ROWS) * _TILE_ROWS

    @property
    def ring_positions(self) -> int:
        """Positions that a slab of the ring has room for."""
        return self.raw_start + self.raw

    def latent_frame(self, frame: Any) -> Any:
        """Return the latents' frame that a step of this frame norms with."""
        frame = self.first_in + jnp.maximum(frame * self.stride - self.odd, 0)
        return lax.div(frame + (self.per_frame - 1 if self.apart else 0), self.per_frame)


@dataclasses.dataclass(frozen=True)
class Loading:
    """Brings columns into the ring. They are numbered from the one left of the first: 0 to columns + 1."""

    n: Sizes
    inputs: list[Any]
    before: Any
    latents: list[Any]
    latent_weights: Any
    factors: Any
    ring: Any
    scales: Any
    arrived: Any

    def step(self, column: Any, frame: Any) -> None:
        """Start to fetch the next column, and make ready what the step needs of the one before it."""
        last = self.n.columns_in + 1

        @pl.when((column == 0) & (frame == 0))
        def _() -> None:
            for j in range(3):
                self._each_copy(jnp.int32(j), 0, self.n.frames_in, lambda copy: copy.start())

        @pl.when((column + 3 <= last) & (frame == 0))
        def _() -> None:
            self._each_copy(column + 3, 0, self.n.frames_in, lambda copy: copy.start())

        @pl.when(column == 0)
        def _() -> None:
            for j in range(2):
                self._make_ready(jnp.int32(j), frame, self.latents[1 + j], True)

        new = self.n.latent_frame(frame) != self.n.latent_frame(frame - 1)
        self._make_ready(column + 2, frame, self.latents[0], (column == 0) | (frame == 0) | new)

    def _each_copy(self, j: Any, start: Any, stop: Any, act: Callable[[Any], None]) -> None:
        """Act on the copy of each of some frames of a column, and with the first, of those before it."""
        n, slot = self.n, lax.rem(j, COLUMNS)
        if self.before is not None:

            @pl.when(start == 0)
            def _() -> None:
                act(
                    pltpu.make_async_copy(
                        self.before.at[:, j], self.ring.at[slot, pl.ds(0, n.given)], self.arrived.at[slot, 0]
                    )
                )

        def one(f: Any, _: Any) -> Any:
            to = self.ring.at[slot, n.given + f, pl.ds(n.raw_start, n.raw)]
            inner, left, right = self.inputs
            last = n.columns_in + 1
            for slab, here in (
                (lambda: inner.at[n.first_in + f, j - 1], (j > 0) & (j < last)),
                (lambda: left.at[n.first_in + f], j == 0),
                (lambda: right.at[n.first_in + f], j == last),
            ):

                @pl.when(here)
                def _(slab: Callable[[], Any] = slab) -> None:
                    act(pltpu.make_async_copy(slab(), to, self.arrived.at[slot, 1 + f]))

            return 0

        lax.fori_loop(start, stop, one, 0)

    def _make_ready(self, j: Any, frame: Any, latents: Any, new: Any) -> None:
        """Wait for the frames of a column that this step is the first to need, and norm them or repeat their rows."""
        n, slot = self.n, lax.rem(j, COLUMNS)
        start = jnp.maximum(frame * n.stride - n.odd, 0)
        stop = frame * n.stride + n.stride - n.odd
        self._each_copy(j, start, stop, lambda copy: copy.wait())
        if n.normed:

            @pl.when(new)
            def _() -> None:
                self._set_scales(latents)

        def one(f: Any, _: Any) -> Any:
            slab = self.ring.at[slot, n.given + f]
            if n.normed:
                self._norm(slab)
            if n.factor == 2:
                self._repeat_rows(slab)
            return 0

        if n.normed or n.factor == 2:
            lax.fori_loop(start, stop, one, 0)
        if n.doubled:

            @pl.when(frame == 0)
            def _() -> None:
                def double(at: Any) -> None:
                    half = self.ring[slot, 1, at, : self.ring.shape[3] // 2]
                    self.ring[slot, 0, at, :] = jnp.concatenate([half, half], axis=1)

                _in_chunks(n.positions, double)

    def _set_scales(self, latents: Any) -> None:
        """Compute scale and shift of each latent, group norm's factor and offset (`factors`) among them."""
        channels = self.ring.shape[3]
        dtype = self.ring.dtype

        def some(at: Any) -> None:
            both = jnp.dot(latents[0, 0, at, :], self.latent_weights[...], preferred_element_type=jnp.float32)
            scale, shift = (each.astype(dtype).astype(jnp.float32) for each in (both[:, :channels], both[:, channels:]))
            self.scales[0, at, :] = scale * self.factors[0:1]
            self.scales[1, at, :] = scale * self.factors[1:2] + shift

        _in_chunks(self.scales.shape[1], some)

    def _norm(self, slab: Any) -> None:
        n = self.n
        if n.row_repeat == 1:

            def some(at: Any) -> None:
                values = slab[at, :].astype(jnp.float32) * self.scales[0, at, :] + self.scales[1, at, :]
                slab[at, :] = jax.nn.silu(values).astype(slab.dtype)

            _in_chunks(n.positions, some)
            return
        size, latent_rows = n.row_repeat * n.strips, n.rows // n.row_repeat
        at_once = 3 if latent_rows % 3 == 0 else 1

        def rows(i: Any, _: Any) -> Any:
            for row in (i * at_once + k for k in range(at_once)):
                at = pl.ds(pl.multiple_of(row * size, size), size)
                of = pl.ds(pl.multiple_of(row * n.strips, n.strips), n.strips)
                values = slab[at, :].astype(jnp.float32).reshape(n.row_repeat, n.strips, -1)
                values = values * self.scales[0, of, :][None] + self.scales[1, of, :][None]
                slab[at, :] = jax.nn.silu(values).reshape(size, -1).astype(slab.dtype)
            return 0

        lax.fori_loop(0, latent_rows // at_once, rows, 0)

    def _repeat_rows(self, slab: Any) -> None:
        """Repeat the rows at the slab's end over the whole."""
        n, raw_start = self.n, self.n.raw_start
        at_once = 16 // n.strips if n.strips in (1, 2, 4, 8) and n.rows // 2 % (16 // n.strips) == 0 else n.rows // 2
        size = at_once * n.strips

        def some(i: Any, _: Any) -> Any:
            values = slab[pl.ds(raw_start + i * size, size), :].astype(jnp.float32).reshape(at_once, n.strips, -1)
            values = jnp.concatenate([values[:, None]] * 2, axis=1).reshape(2 * size, -1)
            slab[pl.ds(i * 2 * size, 2 * size), :] = values.astype(slab.dtype)
            return 0

        lax.fori_loop(0, n.rows // 2 // at_once, some, 0)


def _in_chunks(positions: int, work: Callable[[Any], None]) -> None:
    """Do work on slices of so many positions, of one size."""
    size = next((size for size in range(_CHUNK, 15, -16) if positions % size == 0), positions)

    def one(i: Any, _: Any) -> Any:
        work(pl.ds(pl.multiple_of(i * size, size), size))
        return 0

    lax.fori_loop(0, positions // size, one, 0)
