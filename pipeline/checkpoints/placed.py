"""A checkpoint's transformer on a mesh: its weights as the denoise step takes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import Mesh

from pipeline.checkpoints.loading import Checkpoint, build_module, open_module
from pipeline.checkpoints.lora import MergedWeight, lora_changes
from pipeline.checkpoints.quantized import is_quantized, open_quantized
from pipeline.checkpoints.weight_files import weight_shapes
from pipeline.model.placement import Rows, Stacked, place_all, read_whole
from pipeline.model.sharding import ParallelPlan
from pipeline.model.weights import BLOCKS, POSITIONS, place_weights, weight_sharding
from pipeline.requests.request import LoraFile, Quantization


@dataclasses.dataclass(frozen=True)
class PlacedTransformer:
    """module: the stock one, without storage. positions: learned ones, [1, tokens, channels], on the host, if any."""

    module: Any
    weights: dict[str, jax.Array]
    positions: np.ndarray | None


def place_transformer(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    plan: ParallelPlan,
    mesh: Mesh,
    loras: Sequence[LoraFile] = (),
    quantization: Quantization | None = None,
) -> PlacedTransformer:
    """Load a transformer, merge LoRAs, quantize, and place it. Raises CheckpointError. All processes must call it."""
    config, file = checkpoint.config("transformer"), checkpoint.transformer
    if file is not None and is_quantized(file):
        module = build_module("transformer", config, dtype)
        with open_quantized(file, weight_shapes(module), dtype) as stored:
            positions = _positions(stored)
            rows: dict[str, Rows | Stacked] = {
                name: Stacked(weight.layers()) if name.startswith(BLOCKS) else weight for name, weight in stored.items()
            }
            weights = dict(place_all((name, each, weight_sharding(name, plan, mesh)) for name, each in rows.items()))
        return PlacedTransformer(module, weights, positions)
    quantize, head_dim = quantization == "int8", config["attention_head_dim"]
    with open_module(checkpoint, "transformer", dtype) as opened:
        shapes = {name: weight.shape for name, weight in opened.weights.items()}
        changes = lora_changes(loras, shapes, f"checkpoint={checkpoint.name!r}")
        merged = {name: MergedWeight(opened.weights[name], change) for name, change in changes.items()}
        stock = {**opened.weights, **merged}
        positions = _positions(stock)
        placed = place_weights(stock, head_dim, plan, mesh, quantize)
    return PlacedTransformer(opened.module, placed, positions)


def _positions(weights: dict[str, Any]) -> np.ndarray | None:
    return read_whole(weights.pop(POSITIONS)) if POSITIONS in weights else None
