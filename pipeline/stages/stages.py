"""The three stages, text -> denoise -> vae, each loaded when a request first wants it and kept by its key."""

import dataclasses
import functools
import gc
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np
import torch

from pipeline.checkpoints.loading import Checkpoint, import_libraries
from pipeline.model.sharding import ParallelPlan, resolve_plan
from pipeline.requests.errors import CheckpointError, DeviceMemoryError
from pipeline.requests.parallel_options import ParallelOptions
from pipeline.requests.request import GenerateRequest, Stage
from pipeline.stages.denoise import Denoiser
from pipeline.stages.progress import Progress, StageTimings, no_progress
from pipeline.stages.resume import StateFile
from pipeline.stages.text import TextEncoder
from pipeline.stages.vae import VaeDecoder

#: (stage, key, load) -> the loaded stage of this key, from before or by calling `load`.
KeepLoaded = Callable[[Stage, Hashable, Callable[[], Any]], Any]
_Method = TypeVar("_Method", bound=Callable[..., np.ndarray])


@dataclasses.dataclass(frozen=True)
class StageContext:
    """One request as a stage sees it.

    identities: of the weights of the stages to run, see `Checkpoint.identities`. timings: of the stage being run; None
    where nobody wants them.
    """

    checkpoint: Checkpoint
    request: GenerateRequest
    identities: Mapping[Stage, str]
    parallel: ParallelOptions = dataclasses.field(default_factory=ParallelOptions)
    progress: Progress = no_progress
    timings: StageTimings | None = None

    @property
    def plan(self) -> ParallelPlan:
        """How the denoise stage shares the devices here. Raises RequestError for a plan that does not fit them."""
        num_heads = _num_heads(self.checkpoint, self.identities["denoise"])
        return resolve_plan(self.parallel, jax.device_count(), self.request.do_classifier_free_guidance, num_heads)

    def loaded_key(self, stage: Stage) -> Hashable:
        """Return what tells a loaded stage from others: contexts with equal keys share it. Raises RequestError."""
        key = self.identities[stage], self.request.dtype
        return (*key, self.request.attention, self.plan) if stage == "denoise" else key


@functools.cache  # a batch asks for every line, and the Hub answers over the network
def _num_heads(checkpoint: Checkpoint, identity: str) -> int:
    """Read the transformer's number of heads. identity: of its weights, so that a changed folder is read anew."""
    try:
        return checkpoint.config("transformer")["num_attention_heads"]
    except KeyError as error:
        raise CheckpointError(
            f"checkpoint={checkpoint.name!r}: transformer/config.json has no {error}; expected CogVideoX 1.5's"
        ) from error


class LoadedStages:
    """Loaded stages (weights and compiled programs), at most one of each kind."""

    def __init__(self) -> None:
        self._held: dict[Stage, tuple[Hashable, Any]] = {}

    def get(self, stage: Stage, key: Hashable, load: Callable[[], Any]) -> Any:
        """Return the loaded stage of this key; another of its kind is dropped before it is loaded."""
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


def _runs(stage: Stage) -> Callable[[_Method], _Method]:
    """Decorate a method that runs a stage: a full device memory becomes a DeviceMemoryError."""

    def decorate(method: _Method) -> _Method:
        @functools.wraps(method)
        def run(self: "Stages", context: StageContext, *args: Any, **kwargs: Any) -> np.ndarray:
            import_libraries()
            try:
                return method(self, context, *args, **kwargs)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
            # Outside the except clause: the error's traceback holds the stage's arrays.
            request = context.request
            raise DeviceMemoryError(
                f"{stage}: not enough device memory for {request.width}x{request.height}, {request.num_frames} "
                f"frames, {request.dtype}; try a smaller size, fewer frames, or dtype=bfloat16"
            )

        return cast(_Method, run)

    return decorate


class Stages:
    """Runs the stages of requests. Every method raises DeviceMemoryError besides what its stage raises."""

    def __init__(self, keep_loaded: KeepLoaded):
        self._keep_loaded = keep_loaded

    @_runs("text")
    def encode(self, context: StageContext, prompts: list[str]) -> np.ndarray:
        """Encode prompts to T5 embeddings [prompts, text tokens, text_embed_dim]."""
        encoder = self._get("text", context, TextEncoder.load)
        return encoder.encode(prompts, context.timings, context.progress)

    @_runs("denoise")
    def denoise(
        self,
        context: StageContext,
        embeddings: np.ndarray,
        latents: np.ndarray | None = None,
        state_file: StateFile | None = None,
    ) -> np.ndarray:
        """Denoise latents [1, frames, channels, height, width]; arguments as of `Denoiser.denoise`."""
        denoiser = self.denoiser(context)
        return denoiser.denoise(context.request, embeddings, context.timings, context.progress, latents, state_file)

    @_runs("vae")
    def decode(self, context: StageContext, latents: np.ndarray, quantize: bool = True) -> np.ndarray:
        """Decode latents to frames [frames, height, width, 3]: uint8, or float32 in [0, 1] without `quantize`."""
        decoder = self._get("vae", context, VaeDecoder.load)
        return decoder.decode(latents, context.timings, context.progress, quantize)

    def denoiser(self, context: StageContext) -> Denoiser:
        """Return the loaded denoise stage of a request."""
        request = context.request
        guided = request.do_classifier_free_guidance
        return self._get("denoise", context, Denoiser.load, request.attention, context.parallel, guided)

    def _get(self, stage: Stage, context: StageContext, load: Callable[..., Any], *options: Any) -> Any:
        def load_timed() -> Any:
            timings = context.timings or StageTimings(stage)
            with timings.measure("load", context.progress):
                return load(context.checkpoint, getattr(torch, context.request.dtype), *options)

        return self._keep_loaded(stage, context.loaded_key(stage), load_timed)
