"""What a request leaves open to its quality, its checkpoint and the platform, filled in before any work."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from pipeline.checkpoints.loading import Checkpoint, with_defaults
from pipeline.checkpoints.magcache import ratios_path, read_ratios
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.model.transformer import TransformerShape
from pipeline.requests.errors import RequestError
from pipeline.requests.models import current_id
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest
from pipeline.requests.reuse import PRESETS


def settle(request: GenerateRequest, checkpoint: Checkpoint) -> GenerateRequest:
    """Return the request with its quality's choices in it. Raises RequestError where the checkpoint does not allow it.

    int8 of attention is the kernel's: where XLA's attention runs, a preset leaves that exact.
    """
    preset, cache, attention = PRESETS[request.quality], request.cache, request.attention
    if preset.int8 and attention.qk_dtype is None and attention.variant is None and _runs_kernel(request):
        attention = dataclasses.replace(attention, qk_dtype="int8")
    name = current_id(request.checkpoint)
    if cache.method == "teacache" or (cache.method is None and preset.teacache is not None):
        name = base_checkpoint(name, checkpoint.config("transformer"))
    cache = preset.cache(cache, name)
    if cache.method == "magcache":
        path = ratios_path(checkpoint) if cache.ratios is None else Path(cache.ratios)
        read_ratios(path)
        cache = dataclasses.replace(cache, ratios=str(path))
    if not request.do_classifier_free_guidance:
        cache = dataclasses.replace(cache, unconditional_every=1)  # there is no negative prompt to be left out
    return dataclasses.replace(request, attention=attention, cache=cache)


def settle_parallel(parallel: ParallelOptions, request: GenerateRequest) -> ParallelOptions:
    """Return the options with all devices for both prompts where steps leave one out. Raises RequestError."""
    if (request.cache.unconditional_every or 1) == 1:
        return parallel
    if parallel.dp == 2:
        raise RequestError(
            "parallel.dp=2: half of the devices would wait in steps without the negative prompt; expected "
            f"parallel.dp=1 with cache.unconditional_every={request.cache.unconditional_every}"
        )
    return dataclasses.replace(parallel, dp=1)


def base_checkpoint(name: str, transformer: Mapping[str, Any]) -> str:
    """Return the published checkpoint that one is, or is of the shape of; `name` where there is none.

    transformer: its configuration, with diffusers' defaults.
    """
    if name in PUBLISHED_CONFIGS:
        return name
    shape = TransformerShape.from_config(transformer)
    for published, configs in PUBLISHED_CONFIGS.items():
        if TransformerShape.from_config(with_defaults("transformer", configs["transformer"])) == shape:
            return published
    return name


def _runs_kernel(request: GenerateRequest) -> bool:
    implementation = request.attention.implementation
    return implementation != "xla" and (implementation is not None or jax.default_backend() == "tpu")
