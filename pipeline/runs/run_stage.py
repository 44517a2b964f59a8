"""Runs one stage of one request. What a stage loads stays for the next request until it is dropped."""

import functools
import gc
import hashlib
import json
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from pipeline.checkpoints.loading import Checkpoint, import_libraries
from pipeline.requests.errors import CheckpointError, DeviceMemoryError
from pipeline.requests.plans import ParallelOptions, resolve_plan
from pipeline.requests.request import GenerateRequest, Stage
from pipeline.requests.run_options import RunOptions
from pipeline.runs import records
from pipeline.runs.outputs import StageKey
from pipeline.runs.preview import PreviewWriter
from pipeline.stages.denoise import Denoiser
from pipeline.stages.progress import Progress, StageTimings
from pipeline.stages.resume import StateFile
from pipeline.stages.text import TextEncoder
from pipeline.stages.vae import VaeDecoder
from splash_workbench.status import is_out_of_memory


class LoadedStages:
    """Loaded stages (weights and compiled programs), at most one of each kind."""

    def __init__(self) -> None:
        self._held: dict[Stage, tuple[Hashable, Any]] = {}

    def get(self, stage: Stage, key: Hashable, load: Callable[[], Any]) -> Any:
        """The loaded stage of this key; another of its kind is dropped before it is loaded."""
        if stage in self._held and self._held[stage][0] != key:
            self.drop(stage)
        if stage not in self._held:
            self._held[stage] = key, load()
        return self._held[stage][1]

    def holds(self, stage: Stage) -> bool:
        return stage in self._held

    def drop(self, *stages: Stage) -> None:
        """Free the memory of these stages."""
        for stage in stages:
            self._held.pop(stage, None)
        gc.collect()  # torch modules are cyclic


def run_stage(
    request: GenerateRequest,
    checkpoint: Checkpoint,
    key: StageKey,
    inputs: Mapping[str, np.ndarray],
    run_dir: Path,
    timings: StageTimings,
    options: RunOptions,
    loaded: LoadedStages,
    progress: Progress,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The stage's arrays, and details for its JSON file. Raises DeviceMemoryError besides what the stage raises."""
    import_libraries()
    run: Callable[..., tuple[dict[str, np.ndarray], dict[str, Any]]]
    run = {"text": _run_text, "denoise": _run_denoise, "vae": _run_vae}[key.stage]
    try:
        return run(request, checkpoint, key, inputs, run_dir, timings, options, loaded, progress)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"{key.stage}: not enough device memory for {request.width}x{request.height}, {request.num_frames} frames, "
            f"{request.dtype}; try a smaller size, fewer frames, or dtype=bfloat16"
        )
    # Outside the except clause: the error's traceback holds the stage's arrays.
    raise DeviceMemoryError(message)


def text_key(request: GenerateRequest, key: StageKey) -> Hashable:
    """Requests with equal ones share a loaded text stage. key: of any stage's output."""
    return key.fields["text_weights"], request.dtype


def denoise_key(request: GenerateRequest, key: StageKey, checkpoint: Checkpoint, parallel: ParallelOptions) -> Hashable:
    """Requests with equal ones share a loaded denoise stage. Raises RequestError for a plan that does not fit."""
    guided, num_heads = request.do_classifier_free_guidance, _num_heads(checkpoint)
    plan = resolve_plan(parallel, jax.device_count(), guided, num_heads)
    return key.fields["denoise_weights"], request.dtype, request.attention, plan


@functools.cache  # a batch asks for every line, and the Hub answers over the network
def _num_heads(checkpoint: Checkpoint) -> int:
    try:
        return checkpoint.config("transformer")["num_attention_heads"]
    except KeyError as error:
        raise CheckpointError(
            f"checkpoint={checkpoint.name!r}: transformer/config.json has no {error}; expected CogVideoX 1.5's"
        ) from error


def _dtype(request: GenerateRequest) -> torch.dtype:
    return getattr(torch, request.dtype)


def _run_text(request, checkpoint, key, inputs, run_dir, timings, options, loaded, progress):  # type: ignore[no-untyped-def]
    def load() -> TextEncoder:
        with timings.measure("load", progress):
            return TextEncoder.load(checkpoint, _dtype(request))

    encoder = loaded.get("text", text_key(request, key), load)
    if not request.do_classifier_free_guidance:
        return {"prompt_embeds": encoder.encode([request.prompt], timings, progress)}, {}
    negative, positive = encoder.encode([request.negative_prompt, request.prompt], timings, progress)
    return {"prompt_embeds": positive[None], "negative_prompt_embeds": negative[None]}, {}


def _run_denoise(request, checkpoint, key, inputs, run_dir, timings, options, loaded, progress):  # type: ignore[no-untyped-def]
    guided = request.do_classifier_free_guidance

    def load() -> Denoiser:
        with timings.measure("load", progress):
            return Denoiser.load(checkpoint, _dtype(request), request.attention, options.parallel, guided)

    denoiser = loaded.get("denoise", denoise_key(request, key, checkpoint, options.parallel), load)
    names = ("negative_prompt_embeds", "prompt_embeds") if guided else ("prompt_embeds",)
    embeddings = np.concatenate([inputs[name] for name in names])
    plan = denoiser.plan.to_dict()
    state_file = StateFile(run_dir, _state_fingerprint(key, plan), options.checkpoint_every, options.resume)
    if options.preview_every:
        progress = PreviewWriter(run_dir, options.preview_every, progress)
    latents = denoiser.denoise(request, embeddings, timings, progress, state_file=state_file)
    return {"latents": latents}, {
        "attention": denoiser.describe_attention(request, embeddings.shape[1]),
        "parallel": plan,
        "resumed_at_step": state_file.resumed_at_step,
    }


def _state_fingerprint(key: StageKey, plan: Mapping[str, Any]) -> str:
    """Of everything that the bits depend on: another plan, device or compiler sums in another order."""
    device = jax.devices()[0]
    described = [key.fingerprint, plan, device.platform, device.device_kind, records.package_versions()]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _run_vae(request, checkpoint, key, inputs, run_dir, timings, options, loaded, progress):  # type: ignore[no-untyped-def]
    def load() -> VaeDecoder:
        with timings.measure("load", progress):
            return VaeDecoder.load(checkpoint, _dtype(request))

    decoder = loaded.get("vae", (key.fields["vae_weights"], request.dtype), load)
    return {"frames": decoder.decode(inputs["latents"], timings, progress)}, {}
