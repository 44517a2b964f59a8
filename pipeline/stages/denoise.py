"""Stage "denoise": T5 embeddings -> latents, with classifier-free guidance and the checkpoint's scheduler."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pipeline.checkpoints.loading import Checkpoint, LoadedModule, load_module
from pipeline.model.attention import describe_attention
from pipeline.model.denoise_step import DenoiseStep
from pipeline.model.latents import LatentGeometry, from_rows, initial_noise, rotary_embedding, rotary_rows, to_rows
from pipeline.model.placement import put, to_host
from pipeline.model.schedule import StepTable, build_scheduler, guidance_scales, step_table
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.model.transformer import TokenLayout, TransformerShape
from pipeline.model.weights import place_weights
from pipeline.requests.errors import NonFiniteError
from pipeline.requests.plans import ParallelOptions, ParallelPlan, build_mesh, resolve_plan
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.stages.progress import Progress, StageEvent, StageTimings, StepClock, no_progress
from pipeline.stages.resume import DenoiseState, StateFile, generator_state, restore_generator


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
    """The step for a stock transformer (on the meta device will do), sizes of a request, and a plan.

    Raises CheckpointError when the transformer is not of CogVideoX 1.5's kind.
    """
    shape = TransformerShape.of(module.config)
    shards = plan.model if plan.splits_sequence else 1
    layout = TokenLayout(text_seq_len, geometry.num_patches(shape), shards, padded=plan.plan != "seed_tp")
    stock_block = module.transformer_blocks[0] if plan.plan == "seed_tp" else None
    mesh = build_mesh(plan, devices)
    return DenoiseStep(shape, layout, plan, mesh, attention, guided, noisy, stock_block)


class Denoiser:
    """A loaded transformer on a mesh. Keeps its compiled steps for the next requests; drop it to free its memory."""

    def __init__(
        self,
        loaded: LoadedModule,
        transformer_config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        scheduler_config: Mapping[str, Any],
        attention: AttentionOptions,
        plan: ParallelPlan,
        devices: Sequence[jax.Device],
    ):
        self._module: Any = loaded.module
        self._attention = attention
        self.plan = plan
        self._devices = devices
        mesh = build_mesh(plan, devices)
        self._weights = place_weights(loaded.weights, transformer_config["attention_head_dim"], plan, mesh)
        self._transformer_config = transformer_config
        self._vae_config = vae_config
        self._scheduler_config = scheduler_config
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        attention: AttentionOptions,
        parallel: ParallelOptions | None = None,
        guided: bool = True,
    ) -> Self:
        """Load transformer/ and the configurations of scheduler/ and vae/.

        guided: whether requests will use guidance; decides over dp where `parallel` leaves it open.
        Raises CheckpointError, and RequestError where the plan does not fit the devices.
        """
        config = checkpoint.config("transformer")
        devices = jax.devices()
        plan = resolve_plan(parallel or ParallelOptions(), len(devices), guided, config["num_attention_heads"])
        loaded = load_module(checkpoint, "transformer", dtype, place=lambda name, value: value)
        configs = checkpoint.config("vae"), checkpoint.config("scheduler")
        return cls(loaded, config, *configs, attention, plan, devices)

    def denoise(
        self,
        request: GenerateRequest,
        embeddings: np.ndarray,
        timings: StageTimings | None = None,
        progress: Progress = no_progress,
        latents: np.ndarray | None = None,
        state_file: StateFile | None = None,
    ) -> np.ndarray:
        """Latents [1, frames, channels, height, width] in the transformer's dtype, ready for the VAE stage.

        embeddings: [2 or 1, text tokens, text_embed_dim]: negative and positive, or positive alone without guidance.
        latents: initial noise, with padding frames; drawn from the request's seed without it.
        state_file: where to go on from, and to save to, also when `progress` raises. The caller removes it.
        Raises NonFiniteError, and whatever `progress` raises, which is called once a step.
        """
        timings = timings or StageTimings("denoise")
        geometry = LatentGeometry.of(request, self._transformer_config, self._vae_config)
        scheduler = build_scheduler(self._scheduler_config, request.scheduler)
        table = step_table(scheduler, request.num_inference_steps)
        guidance = guidance_scales(request.guidance_scale, table.timesteps, request.use_dynamic_cfg)
        step = build_step(
            self._module,
            geometry,
            embeddings.shape[1],
            self.plan,
            self._devices,
            attention=self._attention,
            guided=request.do_classifier_free_guidance,
            noisy=table.needs_noise,
        )
        generator = torch.Generator().manual_seed(request.seed)

        def rows(latents: np.ndarray) -> np.ndarray:
            return to_rows(latents, geometry, step.shape, step.layout)

        def all_latents(rows: jax.Array) -> np.ndarray:
            return from_rows(to_host(rows), geometry, step.shape, step.layout)

        def video_latents(rows: jax.Array) -> np.ndarray:
            return all_latents(rows)[:, geometry.padding_frames :]

        saved = state_file.load() if state_file is not None else None
        if saved is not None:
            restore_generator(generator, saved.generator)
            timings.step_times_s[:] = saved.step_times_s
            timings.run_time_s += sum(saved.step_times_s)
            start, sample, x0 = saved.step, rows(saved.sample), rows(saved.x0)
        else:
            if latents is None:
                latents = torch_to_numpy(initial_noise(request, geometry.shape, generator) * table.init_noise_sigma)
            start, sample = 0, rows(latents)
            x0 = np.zeros(sample.shape, np.float32)
        state = [put(sample, step.sharding("sample")), put(x0, step.sharding("x0"))]
        tables = rotary_embedding(geometry, self._transformer_config)
        if self.plan.plan != "seed_tp":
            tables = rotary_rows(tables, step.layout)
        fixed = (
            put(embeddings, step.sharding("embeddings")),
            tuple(put(table, step.sharding("rotary")) for table in tables),
        )

        def arguments(index: int) -> tuple[Any, ...]:
            noise = _step_noise(table, index, geometry.shape, generator, getattr(torch, request.dtype))
            scalars = (
                np.asarray(table.timesteps[index], np.int32),
                np.asarray(guidance[index], np.float32),
                table.coefficients[index].astype(np.float32),
            )
            return (
                *state,
                put(noise if noise.ndim == 0 else rows(noise), step.sharding("noise")),
                *fixed,
                *(put(scalar, step.sharding("scalar")) for scalar in scalars),
            )

        def save(done: int) -> None:
            assert state_file is not None
            arrays = (all_latents(state[0]), all_latents(state[1]), generator_state(generator))
            state_file.save(DenoiseState(done, *arrays, timings.step_times_s))

        def tell(event: StageEvent) -> None:
            """Of a step, and save its state. Called within the clock's tick, which counts none of it as a step's."""
            due = event.step > start and state_file is not None and state_file.due(event.step, timings.step_times_s)
            if due:
                save(event.step)
            try:
                progress(event if event.step else dataclasses.replace(event, step=start))
            except BaseException:
                # Other processes may not be interrupted, or at another step, and fetching takes all of them.
                if event.step > start and state_file is not None and not due and jax.process_count() == 1:
                    save(event.step)
                raise

        total = len(table.timesteps)
        first = arguments(min(start, total - 1))  # start == total: interrupted when all was done but this call
        program = self._compile(step, first, timings, progress)
        with timings.measure("run", progress):
            clock = StepClock(timings, total, tell)
            for index in range(start, total):
                *state, finite = program(self._weights, *(first if index == start else arguments(index)))
                first = ()  # donated
                if not bool(finite):
                    raise NonFiniteError(
                        f"denoise: step {index + 1} of {total}: the latents hold NaN or infinity; "
                        "try dtype=float32 or a lower guidance_scale"
                    )
                clock.tick(functools.partial(video_latents, state[1]))
        return video_latents(state[0])

    def describe_attention(self, request: GenerateRequest, text_seq_len: int) -> dict[str, Any]:
        """What attention runs as for a request, and why; JSON-able."""
        config = self._transformer_config
        geometry = LatentGeometry.of(request, config, self._vae_config)
        _, num_frames, _, height, width = geometry.shape
        patch_size = config["patch_size"]
        video_seq_len = num_frames // config["patch_size_t"] * (height // patch_size) * (width // patch_size)
        return describe_attention(
            self._attention,
            batch_size=2 if request.do_classifier_free_guidance else 1,
            num_heads=config["num_attention_heads"],
            seq_len=text_seq_len + video_seq_len,
            head_dim=config["attention_head_dim"],
            dtype=request.dtype,
        )

    def _compile(self, step: DenoiseStep, arguments: tuple[Any, ...], timings: StageTimings, progress: Progress) -> Any:
        key = (step.layout, step.guided, step.noisy, tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments)))
        if key not in self._compiled:
            with timings.measure("compile", progress):
                self._compiled[key] = step.compile(self._weights, *arguments)
        return self._compiled[key]


def _step_noise(
    table: StepTable, index: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> np.ndarray:
    if not table.needs_noise:
        return np.zeros((), np.float32)
    noise = torch.zeros(shape, dtype=dtype)
    for _ in range(table.noise_draws[index]):
        noise = torch.randn(shape, generator=generator, dtype=dtype)
    return torch_to_numpy(noise)


def abstract_arguments(step: DenoiseStep, config: Mapping[str, Any], dtype: Any) -> tuple[Any, ...]:
    """The arguments of the step's program after the weights, as ShapeDtypeStructs with shardings.

    config: of the transformer. dtype: of weights, embeddings and latents.
    """

    def array(name: str, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=step.sharding(name))

    layout, channels = step.layout, step.shape.patch_channels
    half = step.shape.head_dim // 2
    table = (layout.video, 2 * half) if step.plan.plan == "seed_tp" else (half, layout.rows)
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
