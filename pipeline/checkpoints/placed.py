"""A checkpoint's transformer on a mesh: its weights as the denoise step takes them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import Mesh

from pipeline.checkpoints.loading import Checkpoint, build_module, load_module, weight_shapes
from pipeline.checkpoints.lora import merge_loras
from pipeline.checkpoints.quantized import is_quantized, read_quantized
from pipeline.model.placement import put
from pipeline.model.sharding import ParallelPlan
from pipeline.model.weights import POSITIONS, place_weights, weight_sharding
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
    """Load a transformer, merge LoRAs, quantize, and place it. Raises CheckpointError."""
    config, file = checkpoint.config("transformer"), checkpoint.transformer
    if file is not None and is_quantized(file):

        def place(name: str, value: np.ndarray) -> Any:
            return value if name == POSITIONS else put(value, weight_sharding(name, plan, mesh))

        module = build_module("transformer", config, dtype)
        weights = read_quantized(file, weight_shapes(module), dtype, place)
        return PlacedTransformer(module, weights, weights.pop(POSITIONS, None))
    loaded = load_module(checkpoint, "transformer", dtype, place=lambda value: value)
    merge_loras(loaded.weights, loras, f"checkpoint={checkpoint.name!r}")
    positions = loaded.weights.pop(POSITIONS, None)
    quantize, head_dim = quantization == "int8", config["attention_head_dim"]
    placed = place_weights(loaded.weights, head_dim, plan, mesh, quantize)
    return PlacedTransformer(loaded.module, placed, positions)
