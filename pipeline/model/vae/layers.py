"""What the VAE's encoder and decoder are made of, written for one device's share of the columns.

It computes what the layers of diffusers' AutoencoderKLCogVideoX compute on a batch of frames, from the same weights,
each convolution handing its last two input frames (the cache) to the next batch.

Activations are [frames, columns, rows, strips, channels]: a device's columns are cut into up to 8 strips side by side,
which a convolution sees as its batch. Strips lie in the 8 sublanes of a TPU's registers and channels in its lanes, so
that everything that convolutions, padding and upsampling do to frames, columns and rows moves whole registers. Left to
itself XLA cuts and mends the image so around every convolution, by copies that cost more than the convolutions.

Frames may lie in pairs, the two of a pair side by side in the channels; see `pair`.

Convolutions take and give the weights' dtype and accumulate in float32. Norms, their scales and shifts, activation
functions, biases and residuals are computed in float32 and rounded once, where stock rounds in between.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pipeline.model.placement import SPLIT

#: What the names of their weights begin with.
DECODER_PREFIXES, ENCODER_PREFIXES = ("decoder.", "post_quant_conv."), ("encoder.", "quant_conv.")
NORM_EPS = 1e-6  # fixed in diffusers' CogVideoXSpatialNorm3D, and what the encoder's norms have as published
MAX_STRIPS = 8  # sublanes of a TPU's vector register
Weights = Mapping[str, jax.Array]
#: Of each causal convolution, by its name and over the resnets of a run: the last two frames of its input,
#: [resnets, frames, columns, rows, strips, channels], or its last pair.
Cache = dict[str, jax.Array]
Activations = Float[Array, "frames columns rows strips channels"]


def arrange(weight: Any) -> Any:
    """Transpose a stock kernel [out, in, (time,) height, width] to [height, time, width, in, out]; others stay."""
    if weight.ndim == 4:
        weight = weight[:, :, None]
    return weight.transpose(3, 2, 4, 1, 0) if weight.ndim == 5 else weight


def num_strips(num_columns: int) -> int:
    """Return the number of strips that a device's columns are cut into."""
    return math.gcd(num_columns, MAX_STRIPS)


def cut(x: Float[Array, "frames columns rows channels"], strips: int) -> Activations:
    """Cut columns into strips of equal width."""
    frames, columns, rows, channels = x.shape
    return jnp.moveaxis(x.reshape(frames, strips, columns // strips, rows, channels), 1, 3)


def join(x: Activations) -> Float[Array, "frames columns rows channels"]:
    """Invert `cut`."""
    frames, columns, rows, strips, channels = x.shape
    return jnp.moveaxis(x, 3, 1).reshape(frames, strips * columns, rows, channels)


def pair(x: Activations) -> Activations:
    """Lay frames side by side in pairs [pairs, columns, rows, strips, 2 channels], the earlier one's channels first.

    An odd number's first frame is in a pair with itself.
    """
    x = jnp.concatenate([x[: len(x) % 2], x])
    return jnp.concatenate([x[::2], x[1::2]], axis=-1)


def unpair(x: Activations, odd: int) -> Activations:
    """Invert `pair`. odd: 1 where the frames are of an odd number, else 0."""
    pairs, *between, channels = x.shape
    frames = jnp.moveaxis(x.reshape(pairs, *between, 2, channels // 2), -2, 1)
    return frames.reshape(2 * pairs, *between, channels // 2)[odd:]


def pair_weights(weights: Weights, prefixes: Sequence[str]) -> dict[str, jax.Array]:
    """Return the weights below any of the prefixes as they are for frames in pairs, with the same names.

    A causal convolution becomes one of two pairs, a quarter of whose kernel is zeros. Where channels fill half of a
    matrix unit it takes three quarters of the time, and gives the same sums.
    """

    def paired(x: jax.Array) -> jax.Array:
        if x.ndim != 5 or x.shape[1] == 1:  # those of one frame are of the latents
            return jnp.concatenate([x, x], axis=-1)
        taps = _kernel_to_pairs(x)
        taps = jnp.moveaxis(taps.reshape(len(taps), 2, 2, *taps.shape[2:]), 2, 3)
        return taps.reshape(*taps.shape[:3], -1, taps.shape[-1])

    return {name: paired(x) for name, x in weights.items() if name.startswith(tuple(prefixes))}


def weights_to_pairs(weights: Weights, prefixes: Sequence[str]) -> dict[str, jax.Array]:
    """Return the weights of convolutions that take single frames, two of them a move, and give pairs."""
    return {
        name: _kernel_to_pairs(x) if x.ndim == 5 else jnp.concatenate([x, x])
        for name, x in weights.items()
        if name.startswith(tuple(prefixes))
    }


def _kernel_to_pairs(kernel: jax.Array) -> jax.Array:
    """Return the kernel [height, time + 1, width, in, 2 out] of the earlier frame, and one frame on, of the later."""
    nothing = jnp.zeros_like(kernel[:, :1])
    both = [jnp.concatenate(frames, axis=1) for frames in ((kernel, nothing), (nothing, kernel))]
    return jnp.concatenate(both, axis=-1)


@dataclasses.dataclass
class Layer:
    """One layer at work. weights, cache: by names below the layer's; cache: None in the first batch.

    paired: whether the frames lie in pairs. odd: whether they are of an odd number, as only a first batch's are.
    """

    weights: Weights
    cache: Cache | None
    num_groups: int
    num_shards: int
    paired: bool = dataclasses.field(default=False, kw_only=True)
    odd: bool = dataclasses.field(default=False, kw_only=True)
    next_cache: Cache = dataclasses.field(default_factory=dict, kw_only=True)

    def resnet(self, x: Activations) -> Activations:
        h = self.causal_conv("conv1", self.norm_silu("norm1", x))
        h = self.norm_silu("norm2", h)
        if "conv_shortcut.weight" in self.weights:
            x = self._conv("conv_shortcut", x, x.dtype)
        return self.causal_conv("conv2", h, residual=x)

    def causal_conv(
        self, name: str, x: Activations, dtype: Any = None, residual: Activations | None = None
    ) -> Activations:
        """Convolve 3x3x3, each frame with the two before it; before the first batch lies its first frame, twice."""
        with jax.named_scope(name):
            if self.paired:
                first = jnp.concatenate([x[:1, ..., : x.shape[-1] // 2]] * 2, axis=-1)
            else:
                first = jnp.concatenate([x[:1]] * 2)
            before = first if self.cache is None else self.cache[name]
            x = jnp.concatenate([before, x])
            self.next_cache[name] = x[-len(before) :]
            return self._conv(f"{name}.conv", self._with_neighbours(x), dtype or x.dtype, residual)

    def norm_silu(self, name: str, x: Activations) -> Activations:
        """Apply group norm and SiLU."""
        with jax.named_scope(name):
            factor, offset = self._group_norm(name, x)
            return jax.nn.silu(x.astype(jnp.float32) * factor + offset).astype(x.dtype)

    def _group_norm(self, name: str, x: Activations) -> tuple[jax.Array, jax.Array]:
        """Return group norm's factor and offset, float32 [channels] each. Statistics are of the whole image."""
        groups, side_by_side = self.num_groups, 2 if self.paired else 1
        channels, repeated = x.shape[-1] // side_by_side, self.paired and self.odd
        count = (x.size - repeated * x[0].size // 2) // groups * self.num_shards

        def mean(values: jax.Array) -> jax.Array:
            if repeated:  # the first frame counts once
                pairs, channel = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 4))
                values = jnp.where((pairs == 0) & (channel < channels), 0, values)
            by_group = values.sum((0, 1, 2, 3)).reshape(side_by_side, groups, -1).sum((0, 2))
            return jnp.tile(jnp.repeat(lax.psum(by_group, SPLIT) / count, channels // groups), side_by_side)

        values = x.astype(jnp.float32)
        centre = mean(values)
        variance = mean(jnp.square(values - centre))
        factor = lax.rsqrt(variance + NORM_EPS) * self.weights[f"{name}.weight"].astype(jnp.float32)
        return factor, self.weights[f"{name}.bias"].astype(jnp.float32) - centre * factor

    def _from_beside(self, column: jax.Array, step: int) -> jax.Array:
        """Return the column of each strip's neighbour `step` to the right; from other devices for the outermost.

        Zeros beyond the image's edges.
        """
        pairs = [(i, i - step) for i in range(self.num_shards) if 0 <= i - step < self.num_shards]
        strips = column.shape[3]
        inner, outer = (slice(1, None), slice(0, 1)) if step > 0 else (slice(0, -1), slice(strips - 1, None))
        beside = [column[..., inner, :], lax.ppermute(column[..., outer, :], SPLIT, pairs)]
        return jnp.concatenate(beside[::step], axis=3)

    def _with_neighbours(self, x: Activations) -> Activations:
        """Add the next strip's column on each side of a strip; zeros beyond the image's edges."""
        return jnp.concatenate([self._from_beside(x[:, -1:], -1), x, self._from_beside(x[:, :1], 1)], axis=1)

    def _conv(
        self,
        name: str,
        x: Activations,
        dtype: Any,
        residual: Activations | None = None,
        strides: tuple[int, int, int] = (1, 1, 1),
        row_padding: tuple[int, int] | None = None,
    ) -> Activations:
        """Convolve, padding rows only, by default as many as leave their number. Bias and residual in float32."""
        kernel = self.weights[f"{name}.weight"]
        rows = kernel.shape[0] // 2
        out = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=strides[-1:] + strides[:-1],  # in the kernel's order
            padding=(row_padding or (rows, rows), (0, 0), (0, 0)),
            dimension_numbers=("DHWNC", "WDHIO", "DHWNC"),
            preferred_element_type=jnp.float32,
        )
        out = out + self.weights[f"{name}.bias"].astype(jnp.float32)
        return (out if residual is None else out + residual.astype(jnp.float32)).astype(dtype)


class Network:
    """Apply layers one after the other, and collect the cache for the next batch in `next_cache`.

    make: (weights below a layer's name, its cache) -> the layer. in_place: whether a layer is given the cache of all
    that are alike, and its `index` among them, and changes its part.
    """

    def __init__(self, weights: Weights, cache: Cache | None, make: Callable[..., Any], in_place: bool = False):
        self._weights, self._cache, self._make, self._in_place = weights, cache, make, in_place
        self.next_cache: Cache = {}

    def apply(self, names: Sequence[str], x: Any, layer: Callable[[Any, Any], Any]) -> Any:
        """Apply `layer` with the weights below each of `names`, which are alike, in turn; compiled once."""
        weights, cache = self._weights, self._cache
        layers = [{k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)} for name in names]
        caches = {k.removeprefix(names[0]): v for k, v in (cache or {}).items() if k.startswith(names[0])}
        stacked = jax.tree.map(lambda *values: jnp.stack(values), *layers) if len(names) > 1 else None

        def step(x: Any, this: tuple[Weights, Cache]) -> tuple[Any, Cache]:
            state = self._make(this[0], this[1] if cache else None)
            return layer(state, x), state.next_cache

        def step_in_place(carry: tuple[Any, Cache], this: tuple[Weights, Any]) -> tuple[tuple[Any, Cache], None]:
            x, caches = carry
            state = self._make(this[0], caches, index=this[1])
            x = layer(state, x)
            return (x, state.next_cache), None

        if cache and self._in_place:
            if stacked is None:
                (x, after), _ = step_in_place((x, caches), (layers[0], 0))
            else:
                (x, after), _ = lax.scan(step_in_place, (x, caches), (stacked, jnp.arange(len(names))))
        elif stacked is None:
            x, after = step(x, (layers[0], {k: v[0] for k, v in caches.items()}))
            after = after if self._in_place else {k: v[None] for k, v in after.items()}
        else:
            x, after = lax.scan(step, x, (stacked, caches))
            after = {k: v[:, 0] for k, v in after.items()} if self._in_place else after
        self.next_cache.update({names[0] + k: v for k, v in after.items()})
        return x
