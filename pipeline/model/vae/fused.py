"""The decoder's layers made of one kernel: norm, convolution, residual, and the statistics for the norm after.

XLA makes several passes of each, and takes longer to compile one of its convolutions than all of these kernels take.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pipeline.model.placement import SPLIT
from pipeline.model.vae.convolution import LANES, V6E, Convolved, Norm, Vmem, convolve, repeats_rows, takes
from pipeline.model.vae.decoder import DecoderLayer, DecoderShape
from pipeline.model.vae.layers import NORM_EPS, Activations, Weights, cut, join, num_strips


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Image:
    """Activations between layers.

    values: [frames, columns, rows * strips, channels], frames or pairs of them. statistics: of each frame on this
    device, mean and sum of squares about it, float32 [frames, 2, channels]. latents: as `Norm` has them.
    """

    values: jax.Array
    statistics: jax.Array
    latents: jax.Array
    strips: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass
class FusedLayer(DecoderLayer):
    """One layer at work, on `Image`s.

    Its cache is of all layers of a run, `index` being its own: [layers, frames, columns + 2, rows * strips, channels].
    It is changed in place. vmem: of the chip. interpret: as of `pallas_call`.
    """

    index: Any = dataclasses.field(default=0, kw_only=True)
    vmem: Vmem = dataclasses.field(default=V6E, kw_only=True)
    interpret: Any = dataclasses.field(default=False, kw_only=True)

    def input(self, x: Activations) -> Image:
        kernel = self.weights["conv_in.conv.weight"]
        missing = -kernel.shape[3] % LANES
        kernel = jnp.pad(kernel, [(0, 0)] * 3 + [(0, missing), (0, 0)])
        layer = dataclasses.replace(self, weights={**self.weights, "conv_in.conv.weight": kernel})
        strips = x.shape[3]
        values = _flat(jnp.pad(x, [(0, 0)] * 4 + [(0, missing)]))
        return layer._convolve("conv_in", Image(values, jnp.zeros(0), self._latents(strips, x.shape[2]), strips))

    def resnet(self, x: Any) -> Any:
        h = self._convolve("conv1", x, norm="norm1")
        return self._convolve("conv2", h, norm="norm2", residual=x.values)

    def resnet_to_pairs(self, x: Any) -> Any:
        h = self._convolve("conv1", x, norm="norm1", stride=2)
        return self.in_pairs()._convolve("conv2", h, norm="norm2", residual=x.values)

    def upsample(self, x: Any, double_frames: bool) -> Any:
        with jax.named_scope("upsample"):
            convolved = self._call("conv", x, factor=2)
            values, statistics = convolved.values, _by_frame(convolved)
            if double_frames:  # an odd frame is the first
                odd = len(values) % 2
                values, statistics = (
                    jnp.concatenate([a[:odd], jnp.repeat(a[odd:], 2, axis=0)]) for a in (values, statistics)
                )
            strips = num_strips(values.shape[1] * x.strips)
            if strips != x.strips:
                values = _flat(cut(join(_in_strips(values, x.strips)), strips))
            return Image(values, statistics, self._latents(strips, values.shape[2] // strips), strips)

    def output(self, x: Any) -> Activations:
        return _in_strips(self._convolve("conv_out", x, norm="norm_out", dtype=jnp.float32).values, x.strips)

    def _convolve(
        self,
        name: str,
        x: Image,
        norm: str | None = None,
        residual: jax.Array | None = None,
        stride: int = 1,
        dtype: Any = None,
    ) -> Image:
        """Convolve 3x3x3 after a norm, as `causal_conv`. stride: 2 where pairs are made of single frames."""
        with jax.named_scope(name):
            before = None if self.cache is None else self.cache[name]  # of all layers
            first = before is None
            convolved = self._call(
                f"{name}.conv",
                x,
                before,
                norm,
                residual,
                stride=stride,
                odd=len(self.z) % 2 if first and stride == 2 else 0,
                doubled=first and self.paired and not self.odd,
                kept=1 if self.paired else 2,
                statistics=dtype is None,
                dtype=dtype,
            )
            assert convolved.kept is not None
            self.next_cache[name] = convolved.kept
            return Image(convolved.values, _by_frame(convolved), x.latents, x.strips)

    def _call(
        self,
        name: str,
        x: Image,
        before: jax.Array | None = None,
        norm: str | None = None,
        residual: jax.Array | None = None,
        statistics: bool = True,
        **how: Any,
    ) -> Convolved:
        kernel, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"].astype(jnp.float32)
        shortcut = None
        if residual is not None and "conv_shortcut.weight" in self.weights:
            shortcut = self.weights["conv_shortcut.weight"].reshape(-1, kernel.shape[-1])
            bias = bias + self.weights["conv_shortcut.bias"].astype(jnp.float32)
        return convolve(
            x.values,
            self._beside(x.values, x.strips),
            before,
            self.index,
            kernel,
            bias,
            strips=x.strips,
            norm=self._norm(norm, x) if norm else None,
            residual=residual,
            shortcut=shortcut,
            statistics=statistics,
            vmem=self.vmem,
            interpret=self.interpret,
            **how,
        )

    def _beside(self, values: jax.Array, strips: int) -> tuple[jax.Array, jax.Array]:
        """Return the columns left of the first and right of the last, [frames, rows * strips, channels] each."""
        left = self._from_beside(_in_strips(values[:, -1:], strips), -1)
        right = self._from_beside(_in_strips(values[:, :1], strips), 1)
        return _flat(left)[:, 0], _flat(right)[:, 0]

    def _latents(self, strips: int, rows: int) -> jax.Array:
        """Return the latents as `Norm` has them, for images of so many rows: theirs, a one, and zeros."""
        columns, channels = self.z.shape[1], self.z.shape[3]
        z = jnp.concatenate([self.z, jnp.ones_like(self.z[..., :1])], axis=-1)  # zeros beyond the image have none
        z = jnp.pad(z, [(0, 0)] * 3 + [(0, LANES - channels - 1)])
        if not repeats_rows(rows // z.shape[2], strips):
            z = jnp.repeat(z, rows // z.shape[2], axis=2)
        return _flat(self._with_neighbours(cut(jnp.repeat(z, strips // math.gcd(columns, strips), axis=1), strips)))

    def _norm(self, name: str, x: Image) -> Norm:
        kernels, biases = (
            jnp.concatenate(
                [self.weights[f"{name}.{conv}.conv.{part}"].reshape(rows, -1) for conv in ("conv_y", "conv_b")], 1
            )
            for part, rows in (("weight", self.z.shape[3]), ("bias", 1))
        )
        weights = jnp.concatenate(
            [kernels, biases, jnp.zeros_like(kernels, shape=(LANES - len(kernels) - 1, kernels.shape[1]))]
        )
        return Norm(x.latents, weights, jnp.stack(self._factor_and_offset(f"{name}.norm_layer", x)))

    def _factor_and_offset(self, name: str, x: Image) -> tuple[jax.Array, jax.Array]:
        """Return group norm's factor and offset, float32 [channels] each, from the statistics."""
        groups, side_by_side = self.num_groups, 2 if self.paired else 1
        frames, columns, positions, channels = x.values.shape
        own = channels // side_by_side
        repeated = self.paired and self.odd  # the first frame counts once
        size = columns * positions
        count = (frames * side_by_side - repeated) * size * (own // groups) * self.num_shards

        def mean(values: jax.Array) -> jax.Array:
            if repeated:
                values = values.at[0, :own].set(0)
            by_group = lax.psum(values.sum(0).reshape(side_by_side, groups, -1).sum((0, 2)), SPLIT)
            return jnp.tile(jnp.repeat(by_group / count, own // groups), side_by_side)

        means, squares = x.statistics[:, 0], x.statistics[:, 1]
        centre = mean(size * means)
        variance = mean(squares + size * jnp.square(means - centre))
        factor = lax.rsqrt(variance + NORM_EPS) * self.weights[f"{name}.weight"].astype(jnp.float32)
        return factor, self.weights[f"{name}.bias"].astype(jnp.float32) - centre * factor


def _by_frame(convolved: Convolved) -> jax.Array:
    """Return `Image.statistics`."""
    if convolved.statistics is None:
        return jnp.zeros(0)
    size = convolved.values.shape[2]
    away, squares, origin = (convolved.statistics[:, :, index] for index in range(3))
    means = origin + away / size
    mean = means.mean(1, keepdims=True)
    squares = squares - jnp.square(away) / size + size * jnp.square(means - mean)
    return jnp.concatenate([mean, squares.sum(1, keepdims=True)], axis=1)


def _flat(x: Activations) -> jax.Array:
    frames, columns, rows, strips, channels = x.shape
    return x.reshape(frames, columns, rows * strips, channels)


def _in_strips(values: jax.Array, strips: int) -> Activations:
    frames, columns, positions, channels = values.shape
    return values.reshape(frames, columns, positions // strips, strips, channels)


def can_fuse(weights: Weights, shape: DecoderShape, rows: int, columns: int, paired: bool, vmem: Vmem) -> bool:
    """Return whether the kernel takes all of a decoder's sizes. rows, columns: of latents on one device."""
    last = shape.num_levels - 1
    pairs_of = f"decoder.up_blocks.{last}.resnets.0.conv_shortcut.weight"
    if paired and pairs_of not in weights:
        return False
    for level in range(shape.num_levels):
        strips = num_strips(columns * 2**level)
        name = f"decoder.up_blocks.{level}.resnets"
        taken, given = weights[f"{name}.0.conv1.conv.weight"].shape[3:]
        given *= 2 if paired and level == last else 1
        if not all(takes(rows * 2**level, strips, channels, vmem) for channels in (taken, given)):
            return False
    return True
