"""The transformer's weights as the denoise step takes them: blocks stacked along layers, and rotary pairs as halves.

Names and shapes otherwise stay those of the stock checkpoint: "transformer_blocks.attn1.to_q.weight" is
[layers, out, in]. Quantized, it is int8 and has ".weight_scale", [layers, out], beside it.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pipeline.model.layers import int8
from pipeline.model.placement import Changed, Rows, Stacked, place_all
from pipeline.model.sharding import ParallelPlan

BLOCKS = "transformer_blocks."
_HIDDEN_SIZES = "hidden sizes"  # of the feed-forward, kept from one weight to the next
#: Added to tokens before the first block, where the model has learned them: an argument of the step, no weight.
POSITIONS = "patch_embed.pos_embedding"
_PATCHES = "patch_embed.proj.weight"  # in CogVideoX 1.0 of a convolution, [out, in, height, width]
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")
#: Rotary pairs lie next to each other in a checkpoint: (0, 1), (2, 3), ... Where queries and keys are permuted alike,
#: scores do not change; first all even, then all odd elements of a head let the pairs be formed by slices.
_PERMUTED = re.compile(r"attn1\.(to_q|to_k|norm_q|norm_k)\.(weight|bias)$")


def stack_names(names: Mapping[str, Any]) -> dict[str, list[str]]:
    """Map each name in the step to its names in the checkpoint: one a layer, in order, for a block's weight."""
    stacked: dict[str, dict[int, str]] = {}
    for name in names:
        match = _BLOCK.match(name)
        key, layer = (BLOCKS + match[2], int(match[1])) if match else (name, 0)
        stacked.setdefault(key, {})[layer] = name
    return {key: [layers[index] for index in range(len(layers))] for key, layers in stacked.items()}


@dataclasses.dataclass(frozen=True)
class _HalvedPairs(Changed):
    """A weight whose rotary pairs are taken apart in each head."""

    head_dim: int

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        first, last = start // self.head_dim * self.head_dim, -(-stop // self.head_dim) * self.head_dim
        # Heads are read whole, and where they are to be if that is all of them: memory never used before costs time.
        rows = out if (first, last) == (start, stop) else np.empty((last - first, *self.shape[1:]), self.dtype)
        self.weight.read(first, last, rows)
        heads = rows.reshape(-1, self.head_dim // 2, 2, *self.shape[1:])
        pairs = np.empty_like(heads[0])
        for head in heads:
            pairs[...] = head
            head.reshape(2, *pairs[:, 0].shape)[...] = pairs.swapaxes(0, 1)
        if rows is not out:
            out[...] = rows[start - first : stop - first]


@dataclasses.dataclass(frozen=True)
class _Flattened(Changed):
    """A weight as a matrix of its rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        rows, *others = self.weight.shape
        return rows, math.prod(others)

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        self.weight.read(start, stop, out.reshape(-1, *self.weight.shape[1:]))


def place_weights(
    weights: Mapping[str, Rows], head_dim: int, plan: ParallelPlan, mesh: Mesh, quantize: bool = False
) -> dict[str, jax.Array]:
    """Read stock weights, stacked, onto the mesh; see `place_all`, which says what each process reads.

    quantize: to int8, on the devices, one name after the other, with all its layers there in both forms for a moment.
    """
    assert not (quantize and plan.uses_stock_block)
    stacked = stack_names(weights)

    def of(key: str) -> Rows | Stacked:
        layers = [weights[name] for name in stacked[key]]
        if not plan.uses_stock_block and _PERMUTED.search(key):
            layers = [_HalvedPairs(layer, head_dim) for layer in layers]
        if key == _PATCHES:
            layers = [_Flattened(layer) for layer in layers]
        return Stacked(layers) if key.startswith(BLOCKS) else layers[0]

    placed: dict[str, jax.Array] = {}
    keys = sorted(stacked, key=_quantized_name)  # last what needs other weights
    for key, array in place_all((key, of(key), weight_sharding(key, plan, mesh)) for key in keys):
        placed[key] = array
        del array
        if quantize:
            _quantize(placed, key, head_dim, plan, mesh)
    return placed


def _quantized_name(key: str) -> str:
    """Return the linear of a block whose weight a key is, where it is quantized; else an empty string."""
    name = key.removeprefix(BLOCKS).removesuffix(".weight")
    return name if key == f"{BLOCKS}{name}.weight" and name in int8.QUANTIZED else ""


def _quantize(placed: dict[str, jax.Array], key: str, head_dim: int, plan: ParallelPlan, mesh: Mesh) -> None:
    """Replace the weight of a linear that is computed in int8, just placed, by what it needs."""
    name = _quantized_name(key)
    if not name:
        return

    def of(*names: str) -> list[jax.Array]:
        return [placed[BLOCKS + each] for each in names]

    def sharding(part: str) -> NamedSharding:
        return weight_sharding(f"{BLOCKS}{name}.{part}", plan, mesh)

    weight = placed.pop(key)
    of_head = int8.block_size(head_dim)
    rotation: int | None = of_head if name == "attn1.to_out.0" else int8.block_size(weight.shape[2])
    smoothing: jax.Array | None = None
    out_rotation: int | None = None
    if name == "attn1.to_v":  # attention leaves the turn of v as it is, for the output projection
        out_rotation, bias = of_head, f"{BLOCKS}{name}.bias"
        if bias in placed:
            turn = jax.jit(lambda x: int8.rotate(x, of_head).astype(x.dtype), out_shardings=placed[bias].sharding)
            placed[bias] = turn(placed[bias])
    if name == "ff.net.0.proj":
        inputs = of("ff.net.0.proj.bias", "norm2.norm.weight", "norm2.norm.bias")
        sizes = jax.jit(jax.vmap(int8.hidden_sizes), out_shardings=sharding("bias"))
        placed[_HIDDEN_SIZES] = sizes(weight, *inputs)
    if name == "ff.net.2":
        rotation = None
        smooth = jax.jit(jax.vmap(int8.smoothing_of), out_shardings=sharding(int8.SMOOTHING))
        smoothing = smooth(weight, placed.pop(_HIDDEN_SIZES))
        placed[f"{BLOCKS}{name}.{int8.SMOOTHING}"] = smoothing
    one_layer = functools.partial(int8.quantize_weight, rotation=rotation, out_rotation=out_rotation)
    all_layers = jax.jit(
        lambda *layers: jax.lax.map(lambda layer: one_layer(layer[0], smoothing=(*layer, None)[1]), layers),
        out_shardings=(sharding("weight"), sharding(int8.SCALE)),
    )
    values, scale = all_layers(*((weight,) if smoothing is None else (weight, smoothing)))
    placed |= {key: values, f"{BLOCKS}{name}.{int8.SCALE}": scale}


def stacked_shapes(
    shapes: Mapping[str, Sequence[int]], quantize: bool = False
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return name -> (shape, dtype) of what `place_weights` makes of stock weights. dtype: None for that of these."""
    stacked: dict[str, tuple[tuple[int, ...], Any]] = {}
    for key, names in stack_names(shapes).items():
        shape = tuple(shapes[names[0]])
        shape = (len(names), *shape) if key.startswith(BLOCKS) else shape
        shape = (shape[0], math.prod(shape[1:])) if key == _PATCHES else shape
        name = _quantized_name(key) if quantize else ""
        stacked[key] = shape, jnp.int8 if name else None
        if name:
            stacked[f"{BLOCKS}{name}.{int8.SCALE}"] = shape[:2], jnp.float32
        if name == "ff.net.2":
            stacked[f"{BLOCKS}{name}.{int8.SMOOTHING}"] = (shape[0], shape[2]), jnp.float32
    return stacked


def abstract_weights(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, plan: ParallelPlan, mesh: Mesh, quantize: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what `place_weights` returns, without weights."""
    return {
        key: jax.ShapeDtypeStruct(shape, kind or dtype, sharding=weight_sharding(key, plan, mesh))
        for key, (shape, kind) in stacked_shapes(shapes, quantize).items()
    }


def weight_sharding(key: str, plan: ParallelPlan, mesh: Mesh) -> NamedSharding:
    """Return where a weight of the step lies, by its name there."""
    return NamedSharding(mesh, plan.stacked_weight_spec(key))
