"""The three stages as functions of what flows between nodes, each a call of the same stage in `pipeline`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from . import models, settings


@dataclasses.dataclass(frozen=True)
class Embeds:
    """COGVIDEOX_EMBEDS. prompts: embeddings [2, text tokens, text_embed_dim], of the negative prompt and the prompt."""

    checkpoint: Any  # pipeline.checkpoints.loading.Checkpoint
    prompt: str
    negative_prompt: str
    dtype: str
    prompts: np.ndarray


@dataclasses.dataclass(frozen=True)
class Latents:
    """COGVIDEOX_LATENTS. latents: [1, frames, channels, height, width] in the request's dtype."""

    checkpoint: Any  # pipeline.checkpoints.loading.Checkpoint
    request: Any  # pipeline.requests.request.GenerateRequest
    latents: np.ndarray


@contextlib.contextmanager
def _running(stage: str) -> Iterator[None]:
    """torch as the pipeline needs it (ComfyUI runs nodes in inference mode), and one message for full memory."""
    import jax

    from pipeline.checkpoints.loading import import_libraries
    from pipeline.requests.errors import PipelineError
    from splash_workbench.status import is_out_of_memory

    import_libraries()
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        models.release()
        raise PipelineError(
            f"{stage}: not enough device memory; loaded models were freed, so the same may work now; else take a "
            "smaller size, fewer frames, dtype=bfloat16, or more devices"
        ) from error


def encode(prompt: str, negative_prompt: str, model_id: str, dtype: str, progress: Any) -> Embeds:
    """Stage "text"."""
    settings.require_packages()
    from pipeline.requests.request import GenerateRequest
    from pipeline.stages.progress import StageTimings
    from pipeline.stages.text import TextEncoder

    dtype = settings.resolve_dtype(dtype, model_id)
    GenerateRequest(prompt=prompt, negative_prompt=negative_prompt, checkpoint=model_id, dtype=dtype)  # type: ignore[arg-type]
    timings = StageTimings("text")
    with _running("text"):
        checkpoint = settings.find_checkpoint(model_id)

        def load() -> TextEncoder:
            with timings.measure("load", progress):
                return TextEncoder.load(checkpoint, getattr(torch, dtype))

        key = ("text", checkpoint.identity("tokenizer", "text_encoder"), dtype)
        encoder = models.loaded_stage(key, load)
        prompts = encoder.encode([negative_prompt, prompt], timings, progress)
    return Embeds(checkpoint, prompt, negative_prompt, dtype, prompts)


def sampling_request(
    embeds: Embeds | None, *, kernel: str, parallel_plan: str, num_devices: int, **fields: Any
) -> tuple[Any, Any]:
    """The checked request of the sampler's widgets and its parallel options, against the devices here.

    embeds: None while the text is not encoded yet. Raises RequestError.
    """
    settings.require_packages()
    from pipeline.requests.request import GenerateRequest

    known: dict[str, Any] = {"prompt": "not known yet"}
    if embeds is not None:
        known = {
            "prompt": embeds.prompt,
            "negative_prompt": embeds.negative_prompt,
            "checkpoint": embeds.checkpoint.name,
            "dtype": embeds.dtype,
        }
    request = GenerateRequest(**known, **fields, attention=settings.attention_options(kernel))
    parallel = settings.parallel_options(parallel_plan, num_devices)
    settings.check_devices(request.attention, parallel)
    return request, parallel


def denoise(embeds: Embeds, request: Any, parallel: Any, progress: Any) -> Latents:
    """Stage "denoise"."""
    import jax

    from pipeline.requests.plans import resolve_plan
    from pipeline.stages.denoise import Denoiser
    from pipeline.stages.progress import StageTimings

    checkpoint, guided = embeds.checkpoint, request.do_classifier_free_guidance
    timings = StageTimings("denoise")
    with _running("denoise"):
        num_heads = checkpoint.config("transformer")["num_attention_heads"]
        plan = resolve_plan(parallel, jax.device_count(), guided, num_heads)

        def load() -> Denoiser:
            with timings.measure("load", progress):
                return Denoiser.load(checkpoint, getattr(torch, request.dtype), request.attention, parallel, guided)

        identity = checkpoint.identity("transformer", "scheduler")
        denoiser = models.loaded_stage(("denoise", identity, request.dtype, request.attention, plan), load)
        prompts = embeds.prompts if guided else embeds.prompts[1:]
        latents = denoiser.denoise(request, prompts, timings, progress)
    return Latents(checkpoint, request, latents)


def decode(latents: Latents, progress: Any) -> torch.Tensor:
    """Stage "vae". Frames as ComfyUI's IMAGE: float32 [frames, height, width, 3] in 0 to 1."""
    settings.require_packages()
    from pipeline.stages.progress import StageTimings
    from pipeline.stages.vae import VaeDecoder

    dtype, timings = latents.request.dtype, StageTimings("vae")
    with _running("vae"):

        def load() -> VaeDecoder:
            with timings.measure("load", progress):
                return VaeDecoder.load(latents.checkpoint, getattr(torch, dtype))

        decoder = models.loaded_stage(("vae", latents.checkpoint.identity("vae"), dtype), load)
        frames = decoder.decode(latents.latents, timings, progress, quantize=False)
        return torch.from_numpy(np.array(frames))  # a copy: JAX's arrays are read-only
