"""Stage "denoise": T5 embeddings -> latents, with classifier-free guidance and the checkpoint's scheduler."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pipeline.checkpoints.loading import Checkpoint, load_module
from pipeline.model.attention import describe_attention
from pipeline.model.denoise_step import DenoiseStep
from pipeline.model.latents import LatentGeometry, rotary_embedding
from pipeline.model.noise_schedule import build_scheduler, step_table
from pipeline.model.sharding import ParallelPlan, resolve_plan
from pipeline.model.transformer import TokenLayout, TransformerShape
from pipeline.model.weights import place_weights
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.stages.denoise_loop import DenoiseLoop
from pipeline.stages.progress import StageClock
from pipeline.stages.resume import StateFile
from splash_attn.types import AttentionShape


def build_step(
    module: Any,
    geometry: LatentGeometry,
    text_seq_len: int,
    plan: ParallelPlan,
    devices: Sequence[jax.Device],
    *,
    attention: AttentionOptions,
    guided: bool,
    noisy: bool,
) -> DenoiseStep:
    """Return the step for a stock transformer (on the meta device will do), sizes of a request, and a plan.

    Raises CheckpointError when the transformer is not of CogVideoX 1.5's kind.
    """
    shape = TransformerShape.from_config(module.config)
    stock = plan.uses_stock_block
    layout = TokenLayout(text_seq_len, geometry.num_patches(shape), plan.sequence_shards, padded=not stock)
    stock_block = module.transformer_blocks[0] if stock else None
    return DenoiseStep(shape, layout, plan, plan.mesh(devices), attention, guided, noisy, stock_block)


class Denoiser:
    """A loaded transformer on a mesh. Keeps its compiled steps for the next requests; drop it to free its memory."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        attention: AttentionOptions,
        parallel: ParallelOptions | None = None,
        guided: bool = True,
    ):
        """Load transformer/ and the configurations of scheduler/ and vae/.

        guided: whether requests will use guidance; decides over dp where `parallel` leaves it open.
        Raises CheckpointError, and RequestError where the plan does not fit the devices.
        """
        self._configs = {part: checkpoint.config(part) for part in ("transformer", "vae", "scheduler")}
        config = self._configs["transformer"]
        self._attention, self._devices = attention, jax.devices()
        num_devices = len(self._devices)
        self._plan = resolve_plan(parallel or ParallelOptions(), num_devices, guided, config["num_attention_heads"])
        loaded = load_module(checkpoint, "transformer", dtype, place=lambda name, value: value)
        self._module: Any = loaded.module
        mesh = self._plan.mesh(self._devices)
        self._weights = place_weights(loaded.weights, config["attention_head_dim"], self._plan, mesh)
        self._compiled: dict[Any, Any] = {}

    def denoise(
        self,
        request: GenerateRequest,
        embeddings: np.ndarray,
        clock: StageClock | None = None,
        latents: np.ndarray | None = None,
        state_file: StateFile | None = None,
    ) -> np.ndarray:
        """Return latents [1, frames, channels, height, width] in the transformer's dtype, ready for the VAE stage.

        embeddings: [2 or 1, text tokens, text_embed_dim]: negative and positive, or positive alone without guidance.
        latents: initial noise, with padding frames; drawn from the request's seed without it.
        state_file: where to go on from, and to save to, also when `progress` raises. The caller removes it.
        Raises NonFiniteError, and whatever the clock's `progress` raises, which is called once a step.
        """
        clock, geometry = clock or StageClock("denoise"), self._geometry(request)
        scheduler = build_scheduler(self._configs["scheduler"], request.scheduler)
        table = step_table(scheduler, request.num_inference_steps)
        step = build_step(
            self._module,
            geometry,
            embeddings.shape[1],
            self._plan,
            self._devices,
            attention=self._attention,
            guided=request.do_classifier_free_guidance,
            noisy=table.needs_noise,
        )
        loop = DenoiseLoop(request, step, geometry, table, clock, state_file, latents)
        rotary = rotary_embedding(geometry, self._configs["transformer"])
        return loop.run(self._weights, embeddings, rotary, lambda arguments: self._compile(step, arguments, clock))

    def describe_attention(self, request: GenerateRequest, text_seq_len: int) -> dict[str, Any]:
        """Describe which attention runs for a request, and why; JSON-able."""
        sizes = TransformerShape.from_config(self._module.config)
        seq_len = text_seq_len + self._geometry(request).num_patches(sizes)
        shape = AttentionShape(len(request.prompts), sizes.num_heads, seq_len, seq_len, sizes.head_dim)
        return describe_attention(self._attention, shape, request.dtype)

    def _geometry(self, request: GenerateRequest) -> LatentGeometry:
        return LatentGeometry.from_request(request, self._configs["transformer"], self._configs["vae"])

    def _compile(self, step: DenoiseStep, arguments: tuple[Any, ...], clock: StageClock) -> Any:
        key = (step.layout, step.guided, step.noisy, tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments)))
        if key not in self._compiled:
            with clock.measure("compile"):
                self._compiled[key] = step.compile(self._weights, *arguments)
        return self._compiled[key]


def abstract_arguments(step: DenoiseStep, config: Mapping[str, Any], dtype: Any) -> tuple[Any, ...]:
    """Return the arguments of the step's program after the weights, as ShapeDtypeStructs with shardings.

    config: of the transformer. dtype: of weights, embeddings and latents.
    """

    def array(name: str, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=step.sharding(name))

    layout, channels = step.layout, step.shape.patch_channels
    half = step.shape.head_dim // 2
    table = (layout.video, 2 * half) if step.plan.uses_stock_block else (half, layout.rows)
    rotary = array("rotary", jnp.float32, *table)
    return (
        array("sample", dtype, layout.rows, channels),
        array("x0", jnp.float32, layout.rows, channels),
        array("noise", dtype, layout.rows, channels) if step.noisy else array("noise", jnp.float32),
        array("embeddings", dtype, 2 if step.guided else 1, layout.text, config["text_embed_dim"]),
        (rotary, rotary),
        array("scalar", jnp.int32),
        array("scalar", jnp.float32),
        array("scalar", jnp.float32, 6),
    )
