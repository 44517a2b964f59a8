"""Stage "denoise": T5 embeddings -> latents, with classifier-free guidance and the checkpoint's scheduler."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.placed import place_transformer
from pipeline.model.attention import describe_attention
from pipeline.model.denoise_step import DenoiseStep
from pipeline.model.latents import (
    LatentGeometry,
    from_rows,
    position_rows,
    rotary_embedding,
    rotary_rows,
    to_rows,
)
from pipeline.model.noise_schedule import build_scheduler, guidance_scales, step_table
from pipeline.model.placement import put, to_host
from pipeline.model.sharding import ParallelPlan, check_quantization, resolve_plan
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.model.transformer import TokenLayout, TransformerShape
from pipeline.requests.errors import NonFiniteError
from pipeline.requests.media import read_latents
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest, LoraFile, Quantization
from pipeline.stages.conditioning import image_condition, noisy_video, sample_posterior
from pipeline.stages.progress import Interrupted, StageClock, StageEvent
from pipeline.stages.resume import DenoiseState, StateFile
from pipeline.stages.windows import Windows
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

    Raises CheckpointError when the transformer is not of CogVideoX's kind.
    """
    shape = TransformerShape.from_config(module.config)
    stock = plan.uses_stock_block
    layout = TokenLayout(text_seq_len, geometry.num_patches, plan.sequence_shards, padded=not stock)
    stock_block = module.transformer_blocks[0] if stock else None
    return DenoiseStep(shape, layout, plan, plan.mesh(devices), attention, guided, noisy, stock_block)


class DenoiseLoop:
    """Run the steps of one request, from the first or a saved state, with the same bits; see `Denoiser.denoise`."""

    def __init__(
        self,
        denoiser: "Denoiser",
        request: GenerateRequest,
        embeddings: np.ndarray,
        clock: StageClock,
        latents: np.ndarray | None,
        state_file: StateFile | None,
        moments: np.ndarray | None,
    ):
        self._denoiser, self._clock, self._state_file = denoiser, clock, state_file
        self._windows = windows = denoiser.windows(request)
        self._geometry = geometry = windows.whole
        scheduler = build_scheduler(denoiser.configs["scheduler"], request.scheduler)
        self._table = table = step_table(scheduler, request.num_inference_steps, request.steps_left_out)
        self._step = step = build_step(
            denoiser.module,
            windows.seen,
            embeddings.shape[1],
            denoiser.plan,
            denoiser.devices,
            attention=denoiser.attention,
            guided=request.do_classifier_free_guidance,
            noisy=table.needs_noise,
        )
        rotary = rotary_embedding(windows.seen, denoiser.configs["transformer"])
        tables = rotary if step.plan.uses_stock_block or rotary is None else rotary_rows(rotary, step.layout)
        placed = None if tables is None else tuple(put(each, step.sharding("rotary")) for each in tables)
        self._fixed = put(embeddings, step.sharding("embeddings")), placed
        self._guidance = guidance_scales(request.guidance_scale, table.timesteps, request.use_dynamic_cfg)
        self._dtype = getattr(torch, request.dtype)
        self._generator = torch.Generator().manual_seed(request.seed)
        encoded = None if moments is None else sample_posterior(moments, self._generator, self._dtype)
        self._conditions = self._place_conditions(encoded)
        saved = state_file.load() if state_file is not None else None
        if saved is not None:
            self._generator.set_state(torch.from_numpy(saved.generator))
            clock.timings.step_times_s[:] = saved.step_times_s
            clock.timings.run_time_s += sum(saved.step_times_s)
            self._start, sample, x0 = saved.step, saved.sample, saved.x0
        else:
            if latents is None:
                # As diffusers' pipeline draws it on the CPU for the same seed, dtype and shape.
                if request.latents is not None:
                    noise = read_latents(request.latents, geometry.shape).to(self._dtype)
                else:
                    noise = torch.randn(geometry.shape, generator=self._generator, dtype=self._dtype)
                if encoded is not None and "image" not in self._conditions:
                    noise = noisy_video(encoded, noise, geometry, denoiser.configs["vae"], scheduler, table.timesteps)
                latents = torch_to_numpy(noise * table.init_noise_sigma)
            self._start, sample, x0 = 0, latents, np.zeros(geometry.shape, np.float32)
        #: The sample and x0: rows on the devices; with several windows, latents on the host.
        self._state: list[Any] = [sample, x0] if windows.several else self._place_state(sample, x0)

    def _place_state(self, sample: np.ndarray, x0: np.ndarray) -> list[jax.Array]:
        named = (("sample", sample), ("x0", x0))
        return [put(self._to_rows(value), self._step.sharding(name)) for name, value in named]

    def _place_conditions(self, encoded: torch.Tensor | None) -> dict[str, jax.Array]:
        """Place the arguments of `TransformerShape.condition_channels`. encoded: latents of the image or video."""
        step, configs, values = self._step, self._denoiser.configs, {}
        if "image" in step.shape.condition_channels:
            assert encoded is not None, "checked before: an image-to-video model has an image"
            values["image"] = self._to_rows(torch_to_numpy(image_condition(encoded, self._geometry, configs["vae"])))
        if "positions" in step.shape.condition_channels:
            learned = self._denoiser.positions
            values["positions"] = position_rows(self._windows.seen, configs["transformer"], step.layout, learned)
        dtype = jnp.dtype(str(self._dtype).removeprefix("torch."))
        return {name: put(value.astype(dtype), step.sharding("condition")) for name, value in values.items()}

    def run(self) -> np.ndarray:
        """Run the steps that are left; return latents without padding frames."""
        total = len(self._table.timesteps)
        # start == total: interrupted when all was done but this call
        arguments = self._arguments(min(self._start, total - 1))
        program = self._denoiser.program(self._step, arguments[0], self._clock)
        with self._clock.measure("run"):
            self._clock.start(total, self._tell)
            for index in range(self._start, total):
                if index > self._start:
                    arguments = self._arguments(index)
                if not self._advance(program, arguments):
                    raise NonFiniteError(
                        f"denoise: step {index + 1} of {total}: the latents hold NaN or infinity; "
                        "try dtype=float32 or a lower guidance_scale"
                    )
                self._clock.tick(functools.partial(self._video_latents, self._state[1]))
        return self._video_latents(self._state[0])

    def _advance(self, program: Any, arguments: list[tuple[Any, ...]]) -> bool:
        """Run a step, on each window; empties `arguments`, which are donated. Returns whether all of it is finite."""
        results = []
        while arguments:
            results.append(program(self._denoiser.weights, *arguments.pop(0)))
        if not self._windows.several:
            self._state = list(results[0][:2])
        else:
            layout, seen = self._step.layout, self._windows.seen
            for index, before in enumerate(self._state):
                parts = [from_rows(to_host(result[index]), seen, layout) for result in results]
                self._state[index] = self._windows.blend(parts).astype(before.dtype)
        return all(bool(result[2]) for result in results)

    def _arguments(self, index: int) -> list[tuple[Any, ...]]:
        """Return what the program takes after the weights, for each window; draws the step's noise."""
        step, table, cut = self._step, self._table, self._windows.cut
        noise = self._noise(index)
        scalars = (
            np.asarray(table.timesteps[index], np.int32),
            np.asarray(self._guidance[index], np.float32),
            table.coefficients[index].astype(np.float32),
        )
        states = [self._state]
        if self._windows.several:
            states = [self._place_state(*parts) for parts in zip(*map(cut, self._state), strict=True)]
        noises = [self._to_rows(part) for part in cut(noise)] if noise.ndim else [noise] * len(states)
        return [
            (
                *state,
                put(part, step.sharding("noise")),
                *self._fixed,
                *(put(scalar, step.sharding("scalar")) for scalar in scalars),
                self._conditions,
            )
            for state, part in zip(states, noises, strict=True)
        ]

    def _noise(self, index: int) -> np.ndarray:
        if not self._table.needs_noise:
            return np.zeros((), np.float32)
        noise = torch.zeros(self._geometry.shape, dtype=self._dtype)
        for _ in range(self._table.noise_draws[index]):
            noise = torch.randn(self._geometry.shape, generator=self._generator, dtype=self._dtype)
        return torch_to_numpy(noise)

    def _tell(self, event: StageEvent) -> None:
        """Pass on a step's event, and save its state. Called within the clock's tick, which counts none of it."""
        file, new = self._state_file, event.step > self._start
        due = new and file is not None and file.due(event.step, self._clock.timings.step_times_s)
        if due:
            self._save(event.step)
        try:
            self._clock.progress(event if event.step else dataclasses.replace(event, step=self._start))
        except BaseException as error:
            # Fetching takes all processes, and others may not be interrupted, or at another step.
            together = jax.process_count() == 1 or (isinstance(error, Interrupted) and error.everywhere)
            if new and file is not None and not due and together:
                self._save(event.step)
            raise

    def _save(self, steps_done: int) -> None:
        assert self._state_file is not None
        sample, x0 = map(self._latents, self._state)
        generator = self._generator.get_state().numpy().copy()
        self._state_file.save(DenoiseState(steps_done, sample, x0, generator, self._clock.timings.step_times_s))

    def _to_rows(self, latents: np.ndarray) -> np.ndarray:
        return to_rows(latents, self._windows.seen, self._step.layout)

    def _latents(self, state: Any) -> np.ndarray:
        return state if self._windows.several else from_rows(to_host(state), self._geometry, self._step.layout)

    def _video_latents(self, state: Any) -> np.ndarray:
        return self._latents(state)[:, self._geometry.padding_frames :]


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

    def program(self, step: DenoiseStep, arguments: tuple[Any, ...], clock: StageClock) -> Any:
        """Return the step compiled for arguments after the weights, from before where there is one."""
        key = (step.layout, step.guided, step.noisy, tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments)))
        if key not in self._compiled:
            with clock.measure("compile"), jax.set_mesh(step.mesh):
                self._compiled[key] = step.jitted(self.weights).lower(self.weights, *arguments).compile()
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
    conditions = {
        name: array("condition", dtype, layout.rows, channels)
        for name, channels in step.shape.condition_channels.items()
    }
    return (
        array("sample", dtype, layout.rows, channels),
        array("x0", jnp.float32, layout.rows, channels),
        array("noise", dtype, layout.rows, channels) if step.noisy else array("noise", jnp.float32),
        array("embeddings", dtype, 2 if step.guided else 1, layout.text, config["text_embed_dim"]),
        (rotary, rotary) if step.shape.rotary else None,
        array("scalar", jnp.int32),
        array("scalar", jnp.float32),
        array("scalar", jnp.float32, 6),
        conditions,
    )
