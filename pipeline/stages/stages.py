"""The three stages, text -> denoise -> vae, each loaded when a request first wants it and kept by its key.

The VAE's encoder, which an image or a video needs before it is denoised, is loaded and kept like a stage.
"""

import dataclasses
import functools
import gc
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

from pipeline.checkpoints.loading import Checkpoint, import_libraries
from pipeline.checkpoints.lora import lora_identity
from pipeline.checkpoints.stored import reads_so_far
from pipeline.model.sharding import ParallelPlan, check_quantization, resolve_plan
from pipeline.requests.errors import DeviceMemoryError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest, Stage
from pipeline.stages.conditioning import source_frames
from pipeline.stages.denoise import Denoiser
from pipeline.stages.presets import settle_here, settle_parallel
from pipeline.stages.progress import StageClock, Work
from pipeline.stages.resume import StateFile
from pipeline.stages.text import TextEncoder
from pipeline.stages.vae import VaeDecoder, VaeEncoder
from splash_workbench.trial_status import is_out_of_memory

logger = logging.getLogger(__name__)

#: (stage, key, load) -> the loaded stage of this key, from before or by calling `load`.
KeepLoaded = Callable[[Work, Hashable, Callable[[], Any]], Any]
_CLASSES: Mapping[Work, Any] = {"text": TextEncoder, "encode": VaeEncoder, "denoise": Denoiser, "vae": VaeDecoder}


@dataclasses.dataclass(frozen=True)
class StageContext:
    """One request as a stage sees it, with what its quality chooses filled in. Raises RequestError.

    identities: of the weights of the stages to run, see `Checkpoint.identities`. clock: of the stage being run; None
    where nobody wants its times.
    """

    checkpoint: Checkpoint
    request: GenerateRequest
    identities: Mapping[Stage, str]
    parallel: ParallelOptions = dataclasses.field(default_factory=ParallelOptions)
    clock: StageClock | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "request", settle_here(self.request, self.checkpoint))
        object.__setattr__(self, "parallel", settle_parallel(self.parallel, self.request))

    @property
    def plan(self) -> ParallelPlan:
        """How the denoise stage shares the devices here. Raises RequestError for a plan that does not fit them."""
        num_heads, guided = (
            _num_heads(self.checkpoint, self.identities["denoise"]),
            self.request.do_classifier_free_guidance,
        )
        plan = resolve_plan(self.parallel, jax.device_count(), guided, num_heads)
        check_quantization(self.request.quantization, plan)
        return plan

    def loaded_key(self, stage: Work) -> Hashable:
        """Return what tells a loaded stage from others: contexts with equal keys share it. Raises RequestError."""
        request = self.request
        key = self.identities["vae" if stage == "encode" else stage], request.dtype
        if stage != "denoise":
            return key
        return (*key, request.attention, self.plan, lora_identity(request.lora), request.quantization)


@functools.cache  # a batch asks for every line, and the Hub answers over the network
def _num_heads(checkpoint: Checkpoint, identity: str) -> int:
    """Read the transformer's number of heads. identity: of its weights, so that a changed folder is read anew."""
    return checkpoint.config("transformer")["num_attention_heads"]


class Stages:
    """Run the stages of requests. Every stage's method raises DeviceMemoryError besides what the stage raises.

    keep_loaded: keeps loaded stages (weights and compiled programs); None: kept here, at most one of each kind.
    """

    def __init__(self, keep_loaded: KeepLoaded | None = None):
        self._keep_loaded = keep_loaded
        self._held: dict[Work, tuple[Hashable, Any]] = {}

    def holds(self, *stages: Work) -> bool:
        return self._held.keys() >= set(stages)

    def drop(self, stage: Work) -> None:
        """Free the memory of a stage; with "denoise" that of the encoder, which works for it."""
        for each in (stage, "encode") if stage == "denoise" else (stage,):
            self._held.pop(each, None)
        gc.collect()  # torch modules are cyclic

    def _hold(self, stage: Work, key: Hashable, load: Callable[[], Any]) -> Any:
        if stage in self._held and self._held[stage][0] != key:
            self.drop(stage)
        if stage not in self._held:
            self._held[stage] = key, load()
        return self._held[stage][1]

    def encode(self, context: StageContext, prompts: list[str]) -> np.ndarray:
        """Encode prompts to T5 embeddings [prompts, text tokens, text_embed_dim]."""
        return self._run("text", context, lambda text: text.encode(prompts, context.clock))

    def encode_source(self, context: StageContext, pictures: Sequence[Any] | None = None) -> np.ndarray | None:
        """Encode the request's image or video, see `VaeEncoder.encode`; None without.

        pictures: PIL images instead of the file. The encoder's identity is that of the stage "vae". RequestError.
        """
        if not context.request.encodes:
            return None
        frames = source_frames(context.request, pictures)  # first: loading takes longer
        return self._run("encode", context, lambda encoder: encoder.encode(frames, context.clock))

    def denoise(
        self,
        context: StageContext,
        embeddings: np.ndarray,
        latents: np.ndarray | None = None,
        state_file: StateFile | None = None,
        moments: np.ndarray | None = None,
    ) -> np.ndarray:
        """Denoise latents [1, frames, channels, height, width]; arguments as of `Denoiser.denoise`."""
        arguments = (context.request, embeddings, context.clock, latents, state_file, moments)
        return self._run("denoise", context, lambda denoiser: denoiser.denoise(*arguments))

    def decode(self, context: StageContext, latents: np.ndarray, quantize: bool = True) -> np.ndarray:
        """Decode latents to frames [frames, height, width, 3]: uint8, or float32 in [0, 1] without `quantize`."""
        return self._run("vae", context, lambda decoder: decoder.decode(latents, context.clock, quantize))

    def loaded(self, stage: Work, context: StageContext) -> Any:
        """Return the loaded stage of a request: a TextEncoder, VaeEncoder, Denoiser or VaeDecoder."""
        request = context.request
        options: tuple[Any, ...] = ()
        if stage == "denoise":
            guided = request.do_classifier_free_guidance
            options = request.attention, context.parallel, guided, request.lora, request.quantization

        def load() -> Any:
            clock, before = context.clock or StageClock(stage), reads_so_far()
            with clock.measure("load"):
                loaded = _CLASSES[stage](context.checkpoint, getattr(torch, request.dtype), *options)
            now, timings = reads_so_far(), clock.timings
            timings.read_bytes += now.read_bytes - before.read_bytes
            timings.stored_bytes += now.stored_bytes - before.stored_bytes
            logger.info(
                "%s: read %.2f GB of %.2f GB from storage on this host",
                stage,
                timings.read_bytes / 1e9,
                timings.stored_bytes / 1e9,
            )
            return loaded

        return (self._keep_loaded or self._hold)(stage, context.loaded_key(stage), load)

    def _run(self, stage: Work, context: StageContext, compute: Callable[[Any], np.ndarray]) -> np.ndarray:
        import_libraries()
        try:
            return compute(self.loaded(stage, context))
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except clause: the error's traceback holds the stage's arrays.
        request = context.request
        raise DeviceMemoryError(
            f"{stage}: not enough device memory for {request.width}x{request.height}, {request.num_frames} frames, "
            f"{request.dtype}; try a smaller size, fewer frames, or dtype=bfloat16"
        )
