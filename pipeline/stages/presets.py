"""What a request leaves open to its quality, its checkpoint and the platform, filled in before any work."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from pipeline.checkpoints.loading import Checkpoint, with_defaults
from pipeline.checkpoints.magcache import own_ratios, read_ratios
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.model.transformer import TransformerShape
from pipeline.requests.errors import RequestError
from pipeline.requests.models import current_id
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest
from pipeline.requests.reuse import PRESETS
from splash_workbench.files import user_path

#: Kinds of devices for which rates of bfloat16 and fp8 are published and none of int8
#: (https://cloud.google.com/tpu/docs/tpu7x): a step of the 720p video in int8 is slower by a sixth there (predicted,
#: docs/scale.md).
WITHOUT_INT8 = frozenset({"TPU7x"})


def settle(
    request: GenerateRequest,
    transformer: Callable[[], Mapping[str, Any]],
    ratios: Callable[[], Path],
    device_kind: str | None,
) -> GenerateRequest:
    """Return the request with its quality's choices in it. RequestError where the checkpoint does not allow it.

    Attention in int8 is the kernel's: where XLA's attention runs, a preset leaves it exact. On devices WITHOUT_INT8 it
    takes int8 for nothing; what the request itself asks for stays.

    Args:
      transformer: its configuration, with diffusers' defaults; called where a cache needs it.
      ratios: where the checkpoint's ratios are; called by magcache without a path.
      device_kind: of the TPU, on which the kernel runs where the request names no implementation; None: no TPU.
    """
    preset, cache, attention = PRESETS[request.quality], request.cache, request.attention
    kernel = attention.implementation != "xla" and (attention.implementation is not None or device_kind is not None)
    int8 = preset.int8 and device_kind not in WITHOUT_INT8
    if int8 and kernel and attention.qk_dtype is None and attention.variant is None:
        attention = dataclasses.replace(attention, qk_dtype="int8")
    quantization = request.quantization
    if quantization is None and preset.int8:
        quantization = "int8" if int8 else "none"
    name = current_id(request.checkpoint)
    if cache.method == "teacache" or (cache.method is None and preset.teacache is not None):
        name = base_checkpoint(name, transformer())
    cache = preset.cache(cache, name)
    if cache.method == "magcache":
        path = ratios() if cache.ratios is None else user_path(cache.ratios)
        read_ratios(path)
        cache = dataclasses.replace(cache, ratios=str(path))
    if not request.do_classifier_free_guidance:
        cache = dataclasses.replace(cache, unconditional_every=1)  # there is no negative prompt to be left out
    return dataclasses.replace(request, attention=attention, cache=cache, quantization=quantization)


def settle_here(request: GenerateRequest, checkpoint: Checkpoint) -> GenerateRequest:
    """Return `settle` for the devices that are here."""
    device_kind = jax.devices()[0].device_kind if jax.default_backend() == "tpu" else None
    return settle(request, lambda: checkpoint.config("transformer"), lambda: own_ratios(checkpoint), device_kind)


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
