"""The VAE's convolutions on a TPU, with the norm before, the residual, and the statistics for the norm after.

See `pipeline.model.vae.conv_kernel`. The kernel takes a few seconds to compile, and a tenth of the time of XLA's.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pipeline.model.vae.conv_kernel import TILE, kernel
from pipeline.model.vae.conv_loading import COLUMNS, Sizes

LANES = 128  # channels of a TPU's vector register
_BLOCK_POSITIONS = 600  # of a product, at most: more take longer to compile, and 2 % less time


class Vmem(NamedTuple):
    """Bytes of VMEM that a call plans with, and that it may take at most."""

    planned: int
    limit: int


#: By device kind, where the kernel was tried to compile: of the 128 MiB of a v6e, of the 64 of a v7x's core.
VMEM = {"TPU v6 lite": Vmem(112 * 2**20, 122 * 2**20), "TPU7x": Vmem(57 * 2**20, 63 * 2**20)}
V6E = VMEM["TPU v6 lite"]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm whose scale and shift are 1x1 convolutions of the latents, and SiLU.

    latents: [frames, columns + 2, rows * strips, LANES], the columns beside the outermost ones at the ends. weights:
    [LANES, 2 channels], to scales and to shifts. factors: group norm's factor and offset, float32 [2, channels].
    """

    latents: jax.Array
    weights: jax.Array
    factors: jax.Array


@dataclasses.dataclass(frozen=True)
class Convolved:
    """values: [frames, columns, rows * strips, channels].

    statistics: float32 [frames, columns, 8, channels], over each slab: sum and sum of squares of the values less a
    third, that third, and nothing. kept: the last frames of the normed input, [1, frames, columns + 2, rows * strips,
    channels], the columns beside the outermost ones at the ends; or `before`, with these in the layer's place. Both
    None where not asked for.
    """

    values: jax.Array
    statistics: jax.Array | None
    kept: jax.Array | None


def convolve(
    x: Float[Array, "frames columns positions channels"],
    beside: tuple[jax.Array, jax.Array],
    before: jax.Array | None,
    layer: Any,
    weights: Float[Array, "3 taps 3 channels out"],
    bias: Float[Array, " out"],
    *,
    strips: int,
    norm: Norm | None = None,
    residual: jax.Array | None = None,
    shortcut: Float[Array, "channels out"] | None = None,
    stride: int = 1,
    odd: int = 0,
    doubled: bool = False,
    factor: int = 1,
    kept: int = 0,
    statistics: bool = False,
    dtype: Any = None,
    vmem: Vmem = V6E,
    interpret: Any = False,
) -> Convolved:
    """Norm x, convolve it, and add bias and residual.

    Args:
      x: positions are rows * strips.
      beside: the columns left of the first and right of the last, [frames, positions, channels] each.
      before: `Convolved.kept` of the batch before, of all layers of a run; layer: which. None: the first frame stands
        for those before it; `doubled`, where frames lie in pairs, the first frame of the pair, twice.
      weights: by rows, frames and columns.
      residual: as the result; with `shortcut`, its channels are convolved 1x1 to the result's, where these are pairs
        those of both frames, the earlier one's first.
      stride: frames of x to one of the result. odd: 1 where the first one's are one less.
      factor: 2 repeats rows and columns before.
      kept: frames to return for the next batch.
      vmem: of the chip: as many frames are at work in a call as it holds.
    """
    frames_in, columns, raw, channels = x.shape
    _, taps, _, _, channels_out = weights.shape
    rows, dtype = raw // strips * factor, dtype or x.dtype
    positions, frames = rows * strips, (frames_in + odd) // stride
    weights = weights.reshape(3, taps * 3 * channels, channels_out)
    narrow = channels_out if 3 * channels_out <= LANES and shortcut is None else 0
    if narrow:  # all three rows in one product
        weights = jnp.moveaxis(weights, 0, 1).reshape(1, -1, 3 * channels_out)
        weights = jnp.pad(weights, ((0, 0), (0, 0), (0, LANES - 3 * channels_out)))
    latent_frames, _, latent_positions, _ = norm.latents.shape if norm else (1, 1, raw, 1)
    apart = latent_frames % 2
    sizes = Sizes(
        frames=frames,
        columns=columns * factor,
        rows=rows,
        strips=strips,
        first=0,
        first_in=0,
        frames_in=frames_in,
        taps=taps,
        stride=stride,
        lead=taps - stride + odd,
        given=0,
        doubled=doubled,
        factor=factor,
        kept=kept,
        odd=odd,
        normed=norm is not None,
        row_repeat=raw // latent_positions,
        per_frame=max((frames_in - apart) // max(latent_frames - apart, 1), 1),
        apart=apart,
        block_rows=_block_rows(rows, strips) or rows,
        width=min(channels_out, TILE),
        narrow=narrow,
        residual=residual is not None and shortcut is None,
        shortcuts=0 if shortcut is None or residual is None else len(shortcut) // residual.shape[-1],
        statistics=statistics,
    )
    slab_bytes = sizes.ring_positions * channels * x.dtype.itemsize
    result_bytes = positions * max(sizes.width, LANES) * 2 * max(jnp.dtype(dtype).itemsize, x.dtype.itemsize)
    beside_ring = weights.size * x.dtype.itemsize + result_bytes * (
        1 + max(sizes.shortcuts, 1) * (residual is not None)
    )
    beside_ring += 4 * latent_positions * channels * 4 if norm else 0
    at_once = (vmem.planned - beside_ring) // (COLUMNS * slab_bytes) - (taps - stride)
    at_once = max(min(at_once // stride, frames), 1)
    results: list[jax.Array] = []
    operands = _Operands(x, beside, before, before, layer, weights, bias, norm, residual, shortcut)
    for first in range(0, frames, at_once):  # as many frames a call as VMEM holds
        number, odd_here = min(at_once, frames - first), 0 if first else odd
        last = first + number == frames
        lead = taps - stride + odd_here
        here = dataclasses.replace(
            sizes,
            frames=number,
            first=first,
            first_in=first * stride - odd if first else 0,
            frames_in=number * stride - odd_here,
            lead=lead,
            given=lead if before is not None or (doubled and not first) else 0,
            doubled=doubled and not first,
            kept=kept if last else taps - stride,
            odd=odd_here,
            layered=last and operands.of_layers is not None,
        )
        if results and residual is not None and shortcut is None:
            operands = dataclasses.replace(operands, residual=results[0])  # which is its place
        results = _call(here, frames, dataclasses.replace(operands, before=before), results, dtype, vmem, interpret)
        before = results.pop() if here.kept else None
    return Convolved(results[0], results[1] if statistics else None, before if kept else None)


@dataclasses.dataclass(frozen=True)
class _Operands:
    """Arrays that the calls of one convolution read, as of `convolve`.

    before: the frames before those of a call. of_layers: those before the first call's, of all layers of a run.
    """

    x: jax.Array
    beside: tuple[jax.Array, jax.Array]
    before: jax.Array | None
    of_layers: jax.Array | None
    layer: Any
    weights: jax.Array
    bias: jax.Array
    norm: Norm | None
    residual: jax.Array | None
    shortcut: jax.Array | None


def _call(
    n: Sizes, frames: int, given: _Operands, results: list[jax.Array], dtype: Any, vmem: Vmem, interpret: Any
) -> list[jax.Array]:
    """Compute some frames of all `frames`, into the results of the calls for those before them.

    A residual gives its place to the result, and all layers' frames before theirs to what is kept: in a loop over
    layers nothing is copied.
    """
    x, before, norm, bias = given.x, given.before, given.norm, given.bias
    residual, shortcut = given.residual, given.shortcut
    aliases: dict[int, int] = {}
    others: list[tuple[int, Any]] = list(enumerate(results))
    *_, raw, channels = x.shape
    anywhere, at_start = pl.BlockSpec(memory_space=pl.ANY), {"pipeline_mode": pl.Buffered(1)}
    operands, specs = [x, *given.beside], [anywhere] * 3
    if before is not None:
        layer = jnp.int32(0) if before is not given.of_layers else given.layer
        operands += [jnp.stack([layer, given.layer]).astype(jnp.int32), before]
        specs += [pl.BlockSpec(memory_space=pltpu.SMEM), anywhere]
        if n.layered and before is given.of_layers:
            aliases[len(operands) - 1] = 1 + n.statistics
    if n.layered and before is not given.of_layers:
        others.append((1 + n.statistics, given.of_layers))
    if norm is not None:
        per_column = n.columns // (norm.latents.shape[1] - 2)
        size = norm.latents.shape[2]
        of_next = lambda c, f, _: (n.latent_frame(f), (c + 1 + per_column) // per_column, 0, 0)  # noqa: E731
        of_first = [lambda c, f, _, j=j: (n.latent_frame(f), j, 0, 0) for j in range(2)]
        operands += [norm.latents] * 3
        specs += [pl.BlockSpec((1, 1, size, LANES), index) for index in (of_next, *of_first)]
        operands += [norm.weights, norm.factors]
        specs += [pl.BlockSpec(each.shape, lambda c, f, t: (0, 0), **at_start) for each in operands[-2:]]
    operands += [given.weights, bias[None]]
    specs += [
        pl.BlockSpec(given.weights.shape, lambda c, f, t: (0, 0, 0), **at_start),
        pl.BlockSpec((1, n.width), lambda c, f, t: (0, t)),
    ]
    slab = pl.BlockSpec((1, 1, n.positions, n.width), lambda c, f, t: (n.first + f, c, 0, t))
    if residual is not None and shortcut is None:
        aliases[len(operands)] = 0
        operands, specs, others = [*operands, residual], [*specs, slab], others[1:] if results else others
    if residual is not None and shortcut is not None:
        odd = n.shortcuts * frames - len(residual)
        for k in range(n.shortcuts):
            index = lambda c, f, t, k=k: (jnp.maximum((n.first + f) * n.shortcuts + k - odd, 0), c, 0, 0)  # noqa: E731
            operands.append(residual)
            specs.append(pl.BlockSpec((1, 1, n.positions, residual.shape[-1]), index))
        operands.append(shortcut)
        specs.append(pl.BlockSpec(shortcut.shape, lambda c, f, t: (0, 0), **at_start))
    out_specs, out_shapes = [slab], [jax.ShapeDtypeStruct((frames, n.columns, n.positions, len(bias)), dtype)]
    if n.statistics:
        out_specs.append(pl.BlockSpec((1, 1, 8, n.width), lambda c, f, t: (n.first + f, c, 0, t)))
        out_shapes.append(jax.ShapeDtypeStruct((frames, n.columns, 8, len(bias)), jnp.float32))
    if n.kept:
        out_specs.append(anywhere)
        layers = len(given.of_layers) if n.layered and given.of_layers is not None else 1
        out_shapes.append(jax.ShapeDtypeStruct((layers, n.kept, n.columns_in + 2, raw, channels), x.dtype))
    aliases |= {len(operands) + position: index for position, (index, _) in enumerate(others)}
    scales = (2, norm.latents.shape[2], channels) if norm else (1, 8, LANES)
    call = pl.pallas_call(
        functools.partial(kernel, n=dataclasses.replace(n, aliased=len(others))),
        grid=(n.columns, n.frames, len(bias) // n.width),
        in_specs=[*specs, *[anywhere] * len(others)],
        out_specs=out_specs,
        out_shape=out_shapes,
        input_output_aliases=aliases,
        scratch_shapes=[
            pltpu.VMEM((COLUMNS, n.given + n.frames_in, n.ring_positions, channels), x.dtype),
            pltpu.VMEM(scales, jnp.float32),
            pltpu.VMEM((3 * n.strips, n.width), jnp.float32),
            pltpu.VMEM((3, 8, n.width), jnp.float32),
            pltpu.SemaphoreType.DMA((COLUMNS, n.frames_in + 1)),
            pltpu.SemaphoreType.DMA((3, max(n.kept, 1))),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vmem.limit),
        name="vae_conv",
        interpret=interpret,
    )
    return list(call(*operands, *(array for _, array in others)))


def _block_rows(rows: int, strips: int) -> int | None:
    """Return how many rows a product takes; None where no number will do."""
    if strips % 8 == 0:
        for size in range(min(_BLOCK_POSITIONS // strips, rows), 127 // strips, -1):
            if rows % size == 0 and size * strips % 16 == 0:
                return size
    return rows if rows * strips <= 2 * _BLOCK_POSITIONS else None


def repeats_rows(row_repeat: int, strips: int) -> bool:
    """Return whether a latent may stand for so many rows; otherwise the latents are to be repeated first."""
    return row_repeat == 1 or (strips % 8 == 0 and row_repeat * strips % 16 == 0)


def takes(rows: int, strips: int, channels: int, vmem: Vmem) -> bool:
    """Return whether `convolve` takes images of such columns, in bfloat16, on a chip with so much VMEM."""
    slab_bytes = rows * strips * channels * 2
    fits = 20 * slab_bytes <= vmem.planned  # 16 of a convolution that makes pairs, results and what else is held
    whole = channels % LANES == 0 and strips in (4, 8) and rows * strips % 8 == 0  # what was tried to compile
    return fits and whole and _block_rows(rows, strips) is not None
