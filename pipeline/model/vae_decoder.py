"""CogVideoX's VAE decoder as a function of arrays, written for one device's share of the columns.

It computes what the decoder of diffusers' AutoencoderKLCogVideoX computes on a batch of latent frames, from the same
weights, each convolution handing its last two input frames (the cache) to the next batch.

Activations are [frames, columns, rows, strips, channels]: a device's columns are cut into up to 8 strips side by side,
which a convolution sees as its batch. Strips lie in the 8 sublanes of a TPU's registers and channels in its lanes, so
that everything that convolutions, padding and upsampling do to frames, columns and rows moves whole registers. Left to
itself XLA cuts and mends the image so around every convolution, by copies that cost more than the convolutions.

Convolutions take and give the weights' dtype and accumulate in float32. Norms, their scales and shifts, activation
functions, biases and residuals are computed in float32 and rounded once, where stock rounds in between.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pipeline.model.placement import SPLIT
from pipeline.requests.errors import CheckpointError

NORM_EPS = 1e-6  # fixed in diffusers' CogVideoXSpatialNorm3D
MAX_STRIPS = 8  # sublanes of a TPU's vector register
Weights = Mapping[str, jax.Array]
#: Of each causal convolution, by its name and over the resnets of a run: the last two frames of its input,
#: [resnets, frames, columns, rows, strips, channels].
Cache = dict[str, jax.Array]
Activations = Float[Array, "frames columns rows strips channels"]


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """The fields of vae/config.json in use. time_levels: upsamplings, from the first, that double the frames, too."""

    num_levels: int
    num_resnets: int
    num_groups: int
    time_levels: int
    scaling_factor: float

    @property
    def spatial_factor(self) -> int:
        """Return the pixels a latent, along height and width."""
        return 2 ** (self.num_levels - 1)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the shape of a whole configuration. Raises CheckpointError for another architecture."""
        levels = len(config["block_out_channels"])
        for name, expected in (
            ("act_fn", ("silu",)),
            ("out_channels", (3,)),
            ("temporal_compression_ratio", tuple(2**level for level in range(levels))),
        ):
            if config[name] not in expected:
                raise CheckpointError(
                    f"vae/config.json: {name}={config[name]!r}, expected {' or '.join(map(repr, expected))}"
                )
        scaling_factor = config["scaling_factor"]
        if not isinstance(scaling_factor, int | float) or not 0 < scaling_factor < math.inf:
            raise CheckpointError(f"vae/config.json: {scaling_factor=}, expected a number above 0")
        return cls(
            num_levels=levels,
            num_resnets=config["layers_per_block"] + 1,
            num_groups=config["norm_num_groups"],
            time_levels=int(math.log2(config["temporal_compression_ratio"])),
            scaling_factor=float(scaling_factor),
        )


def arrange(weight: Any) -> Any:
    """Transpose a stock kernel [out, in, (time,) height, width] to [time, width, height, in, out]; others stay."""
    if weight.ndim == 4:
        weight = weight[:, :, None]
    return weight.transpose(2, 4, 3, 1, 0) if weight.ndim == 5 else weight


def decode(
    weights: Weights,
    latents: Float[Array, "frames rows columns channels"],
    cache: Cache | None,
    shape: DecoderShape,
    num_shards: int,
) -> tuple[Float[Array, "frames rows columns rgb"], Cache]:
    """Return one batch's video in [-1, 1], float32, and the cache for the next. cache: None for the first batch.

    weights: by their stock names, see `arrange`. latents: this device's columns of `num_shards` devices along the mesh
    axis SPLIT, scaled already, in the weights' dtype.
    """
    z = latents.swapaxes(1, 2)
    if "post_quant_conv.weight" in weights:
        z = (z @ weights["post_quant_conv.weight"].reshape(z.shape[-1], -1)) + weights["post_quant_conv.bias"]
    next_cache: Cache = {}

    def apply(
        names: Sequence[str], x: Activations, layer: Callable[["_Layer", Activations], Activations]
    ) -> Activations:
        """Apply `layer` with the weights below each of `names`, which are alike, in turn; compiled once."""
        layers = [{k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)} for name in names]
        caches = {k.removeprefix(names[0]): v for k, v in (cache or {}).items() if k.startswith(names[0])}

        def step(x: Activations, this: tuple[Weights, Cache]) -> tuple[Activations, Cache]:
            state = _Layer(this[0], this[1] if cache else None, z, shape.num_groups, num_shards)
            return layer(state, x), state.next_cache

        if len(names) == 1:
            x, after = step(x, (layers[0], {k: v[0] for k, v in caches.items()}))
            after = {k: v[None] for k, v in after.items()}
        else:
            x, after = lax.scan(step, x, (jax.tree.map(lambda *values: jnp.stack(values), *layers), caches))
        next_cache.update({names[0] + k: v for k, v in after.items()})
        return x

    x = cut(z, num_strips(z.shape[1]))
    x = apply(["decoder."], x, lambda layer, x: layer.causal_conv("conv_in", x))
    x = apply([f"decoder.mid_block.resnets.{index}." for index in range(2)], x, _Layer.resnet)
    for level in range(shape.num_levels):
        block = f"decoder.up_blocks.{level}"
        with jax.named_scope(f"level_{level}"):
            resnets = [f"{block}.resnets.{index}." for index in range(shape.num_resnets)]
            if f"{resnets[0]}conv_shortcut.weight" in weights:  # to another number of channels
                x = apply([resnets.pop(0)], x, _Layer.resnet)
            x = apply(resnets, x, _Layer.resnet)
            if level < shape.num_levels - 1:
                upsample = functools.partial(_Layer.upsample, double_frames=level < shape.time_levels)
                x = apply([f"{block}.upsamplers.0."], x, upsample)
    x = apply(["decoder."], x, lambda layer, x: layer.norm_silu("norm_out", x))
    video = apply(["decoder."], x, lambda layer, x: layer.causal_conv("conv_out", x, dtype=jnp.float32))
    return join(video).swapaxes(1, 2), next_cache


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


@dataclasses.dataclass
class _Layer:
    """One layer at work. weights, cache: by names below the layer's. z: latents [frames, columns, rows, channels]."""

    weights: Weights
    cache: Cache | None
    z: jax.Array
    num_groups: int
    num_shards: int
    next_cache: Cache = dataclasses.field(default_factory=dict)

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
            before = jnp.concatenate([x[:1]] * 2) if self.cache is None else self.cache[name]
            x = jnp.concatenate([before, x])
            self.next_cache[name] = x[-2:]
            return self._conv(f"{name}.conv", self._with_neighbours(x), dtype or x.dtype, residual)

    def upsample(self, x: Activations, double_frames: bool) -> Activations:
        """Repeat rows and columns (and frames) twice, then convolve each frame by itself."""
        with jax.named_scope("upsample"):
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
            x = self._conv("conv", self._with_neighbours(x), x.dtype)
            if double_frames:  # after the convolution, which would do the same twice; an odd frame is the first
                odd = x.shape[0] % 2
                x = jnp.concatenate([x[:odd], jnp.repeat(x[odd:], 2, axis=0)])
            columns = x.shape[1] * x.shape[3]
            strips = num_strips(columns)
            return x if strips == x.shape[3] else cut(join(x), strips)

    def norm_silu(self, name: str, x: Activations) -> Activations:
        """Apply group norm, scaled and shifted by two 1x1x1 convolutions of the latents, and SiLU.

        These work on the latents before the interpolation instead of after it: nearest-neighbour interpolation only
        repeats pixels.
        """
        with jax.named_scope(name):
            factor, offset = self._group_norm(f"{name}.norm_layer", x)
            z = self._latents_like(x)
            scale, shift = (
                self._conv(f"{name}.{conv}.conv", z, jnp.float32).astype(x.dtype)[:, None, :, None, :, None]
                for conv in ("conv_y", "conv_b")
            )
            pairs = zip(x.shape[:3], z.shape[:3], strict=True)
            # Barriers keep the blocks' form: with x's, the compiler writes scales and shifts out for every pixel first
            # (1.64 ms instead of 0.36 for [8, 20, 720, 8, 128], predicted for v6e).
            blocks = lax.optimization_barrier(
                x.reshape(*(n for size, like in pairs for n in (like, size // like)), *x.shape[3:])
            )
            h = (blocks.astype(jnp.float32) * factor + offset) * scale.astype(jnp.float32) + shift.astype(jnp.float32)
            return lax.optimization_barrier(jax.nn.silu(h).astype(x.dtype)).reshape(x.shape)

    def _group_norm(self, name: str, x: Activations) -> tuple[jax.Array, jax.Array]:
        """Return group norm's factor and offset, float32 [channels] each. Statistics are of the whole image."""
        groups = self.num_groups
        count = x.size // groups * self.num_shards

        def mean(values: jax.Array) -> jax.Array:
            by_group = values.sum((0, 1, 2, 3)).reshape(groups, -1).sum(1)
            return jnp.repeat(lax.psum(by_group, SPLIT) / count, x.shape[-1] // groups)

        values = x.astype(jnp.float32)
        centre = mean(values)
        variance = mean(jnp.square(values - centre))
        factor = lax.rsqrt(variance + NORM_EPS) * self.weights[f"{name}.weight"].astype(jnp.float32)
        return factor, self.weights[f"{name}.bias"].astype(jnp.float32) - centre * factor

    def _latents_like(self, x: Activations) -> Activations:
        """Return the latents in the strips of x; each of their pixels is a block of pixels of x."""
        z, frames = self.z, x.shape[0]
        if frames % 2 and frames > 1:  # as in stock, the first by itself
            z = jnp.concatenate([z[:1], jnp.repeat(z[1:], (frames - 1) // (z.shape[0] - 1), axis=0)])
        strips, columns = x.shape[3], z.shape[1]
        return cut(jnp.repeat(z, strips // math.gcd(columns, strips), axis=1), strips)

    def _with_neighbours(self, x: Activations) -> Activations:
        """Add the next strip's column on each side of a strip; zeros beyond the image's edges."""

        def from_beside(column: jax.Array, step: int) -> jax.Array:
            """Return the column of each strip's neighbour `step` to the right; from other devices for the outermost."""
            pairs = [(i, i - step) for i in range(self.num_shards) if 0 <= i - step < self.num_shards]
            strips = column.shape[3]
            inner, outer = (slice(1, None), slice(0, 1)) if step > 0 else (slice(0, -1), slice(strips - 1, None))
            beside = [column[..., inner, :], lax.ppermute(column[..., outer, :], SPLIT, pairs)]
            return jnp.concatenate(beside[::step], axis=3)

        return jnp.concatenate([from_beside(x[:, -1:], -1), x, from_beside(x[:, :1], 1)], axis=1)

    def _conv(self, name: str, x: Activations, dtype: Any, residual: Activations | None = None) -> Activations:
        """Convolve, padding rows only. Bias and residual are added in float32."""
        kernel = self.weights[f"{name}.weight"]
        rows = kernel.shape[2] // 2
        out = lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(1, 1, 1),
            padding=((0, 0), (0, 0), (rows, rows)),
            dimension_numbers=("DHWNC", "DHWIO", "DHWNC"),
            preferred_element_type=jnp.float32,
        )
        out = out + self.weights[f"{name}.bias"].astype(jnp.float32)
        return (out if residual is None else out + residual.astype(jnp.float32)).astype(dtype)
