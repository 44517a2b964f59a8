"""Stage "denoise": T5 embeddings -> latents, with classifier-free guidance and the checkpoint's scheduler."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch

from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.placed import place_transformer
from pipeline.model.attention import describe_attention
from pipeline.model.denoise_step import DenoiseStep
from pipeline.model.placement import to_host
from pipeline.model.sharding import check_quantization, resolve_plan
from pipeline.model.transformer import TransformerShape
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest, LoraFile, Quantization
from pipeline.stages.denoise_loop import DenoiseLoop
from pipeline.stages.progress import StageClock
from pipeline.stages.resume import StateFile
from pipeline.stages.step_schedule import StepSchedule, embed_timesteps, step_schedule
from pipeline.stages.windows import Windows
from splash_attn.types import AttentionShape


class Denoiser:
    """A loaded transformer on a mesh. Keeps its compiled steps for the next requests; drop it to free its memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        attention: AttentionOptions,
        parallel: ParallelOptions | None = None,
        guided: bool = True,
        loras: Sequence[LoraFile] = (),
        quantization: Quantization | None = None,
    ):
        """Load transformer/ and the configurations of scheduler/ and vae/.

        guided: whether requests will use guidance; decides over dp where `parallel` leaves it open. loras: merged into
        the weights. quantization: of these.
        Raises CheckpointError, and RequestError where the plan does not fit the devices.
        """
        self.attention, self.devices = attention, jax.devices()
        self.configs = {part: checkpoint.config(part) for part in ("transformer", "vae", "scheduler")}
        config, num_devices = self.configs["transformer"], len(self.devices)
        self.plan = resolve_plan(parallel or ParallelOptions(), num_devices, guided, config["num_attention_heads"])
        check_quantization(quantization, self.plan)
        placed = place_transformer(checkpoint, dtype, self.plan, self.plan.mesh(self.devices), loras, quantization)
        self.module, self.weights = placed.module, placed.weights
        #: The checkpoint's own, [1, tokens, channels]; None where positions are computed.
        self.positions = placed.positions
        #: Of the kinds of steps of the last request, in words, what each is compiled with; empty but on TPUs.
        self.compiler_options: dict[str, dict[str, str]] = {}
        self._compiled: dict[Any, Any] = {}

    def denoise(
        self,
        request: GenerateRequest,
        embeddings: np.ndarray,
        clock: StageClock | None = None,
        latents: np.ndarray | None = None,
        state_file: StateFile | None = None,
        moments: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return latents [1, frames, channels, height, width] in the transformer's dtype, ready for the VAE stage.

        embeddings: [2 or 1, text tokens, text_embed_dim]: negative and positive, or positive alone without guidance.
        latents: initial noise, with padding frames; drawn from the request's seed without it.
        state_file: where to go on from, and to save to, also when `progress` raises. The caller removes it.
        moments: of the request's image or video, see `VaeEncoder.encode`.
        Raises NonFiniteError, and whatever the clock's `progress` raises, which is called once a step.
        """
        self.compiler_options = {}
        clock = clock or StageClock("denoise")
        return DenoiseLoop(self, request, embeddings, clock, latents, state_file, moments).run()

    def describe_attention(self, request: GenerateRequest, text_seq_len: int) -> dict[str, Any]:
        """Describe which attention runs for a request, and why; JSON-able."""
        sizes = TransformerShape.from_config(self.module.config)
        seq_len = text_seq_len + self.windows(request).seen.num_patches
        shape = AttentionShape(len(request.prompts), sizes.num_heads, seq_len, seq_len, sizes.head_dim)
        return describe_attention(self.attention, shape, request.dtype)

    def windows(self, request: GenerateRequest) -> Windows:
        """Return the windows of a request, with the sizes of its latents."""
        return Windows.from_request(request, self.configs["transformer"], self.configs["vae"])

    def schedule(self, request: GenerateRequest, timesteps: np.ndarray) -> StepSchedule:
        """Return which of a request's steps run the blocks. timesteps: [steps], what the model is told."""
        shape = TransformerShape.from_config(self.module.config)

        def embed(timesteps: np.ndarray) -> np.ndarray:
            names = [name for name in self.weights if "_embedding." in name]
            return embed_timesteps({name: to_host(self.weights[name]) for name in names}, shape, timesteps)

        return step_schedule(request.cache, request.do_classifier_free_guidance, timesteps, embed)

    def program(self, step: DenoiseStep, arguments: tuple[Any, ...], clock: StageClock) -> Any:
        """Return the step compiled for arguments after the weights, from before where there is one."""
        self.compiler_options[str(step.work)] = step.options(self.weights)
        kind = step.layout, step.guided, step.noisy, step.reuse, step.work
        key = (*kind, tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments)))
        if key not in self._compiled:
            with clock.measure("compile"), jax.set_mesh(step.mesh):
                self._compiled[key] = step.jitted(self.weights).lower(self.weights, *arguments).compile()
        return self._compiled[key]
