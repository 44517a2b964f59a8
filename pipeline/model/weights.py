"""The transformer's weights as the denoise step takes them: blocks stacked along layers, and rotary pairs as halves.

Names and shapes otherwise stay those of the stock checkpoint: "transformer_blocks.attn1.to_q.weight" is
[layers, out, in].
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from pipeline.model.placement import put
from pipeline.model.sharding import ParallelPlan

BLOCKS = "transformer_blocks."
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


def place_weights(
    weights: dict[str, np.ndarray], head_dim: int, plan: ParallelPlan, mesh: Mesh
) -> dict[str, jax.Array]:
    """Stack stock weights on the host and place them on the mesh. Empties `weights` on the way, to hold them only once.

    Works over several processes, each of which has read the whole checkpoint and places what its devices hold.
    """
    placed = {}
    for key, names in stack_names(weights).items():
        values = [weights.pop(name) for name in names]
        if not plan.uses_stock_block and _PERMUTED.search(key):
            heads = [value.reshape(-1, head_dim, *value.shape[1:]) for value in values]
            values = [np.concatenate([x[:, ::2], x[:, 1::2]], axis=1).reshape(values[0].shape) for x in heads]
        value = np.stack(values) if key.startswith(BLOCKS) else values[0]
        value = value.reshape(len(value), -1) if key == _PATCHES else value
        placed[key] = put(value, NamedSharding(mesh, plan.stacked_weight_spec(key)))
    return placed


def abstract_weights(
    shapes: Mapping[str, tuple[int, ...]], dtype: Any, plan: ParallelPlan, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of what `place_weights` returns, without weights."""
    abstract = {}
    for key, names in stack_names(shapes).items():
        shape = tuple(shapes[names[0]])
        shape = (len(names), *shape) if key.startswith(BLOCKS) else shape
        shape = (shape[0], math.prod(shape[1:])) if key == _PATCHES else shape
        sharding = NamedSharding(mesh, plan.stacked_weight_spec(key))
        abstract[key] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    return abstract
