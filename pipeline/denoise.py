"""Stage "denoise": T5 embeddings -> latents, with classifier-free guidance and the checkpoint's scheduler."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pipeline.attention import SplashAttentionProcessor, describe_attention
from pipeline.errors import CheckpointError, NonFiniteError
from pipeline.loading import Checkpoint, LoadedModule, load_module
from pipeline.profiling import Progress, StageTimings, StepClock, no_progress
from pipeline.request import AttentionOptions, GenerateRequest
from pipeline.schedule import StepTable, build_scheduler, guidance_scales, step_table
from pipeline.torchax_bridge import jax_function, torch_to_numpy


@dataclasses.dataclass(frozen=True)
class LatentGeometry:
    """Sizes of the latents of one video.

    num_frames: latent frames that are decoded. padding_frames: leading ones that only fill the last temporal patch;
    they are denoised along and then dropped. height, width: in latents.
    """

    num_frames: int
    padding_frames: int
    num_channels: int
    height: int
    width: int

    @classmethod
    def of(cls, request: GenerateRequest, transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Self:
        """The geometry from a request and the configurations of transformer/ and vae/."""
        spatial = 2 ** (len(vae["block_out_channels"]) - 1)
        num_frames = (request.num_frames - 1) // int(vae["temporal_compression_ratio"]) + 1
        return cls(
            num_frames=num_frames,
            padding_frames=-num_frames % (transformer.get("patch_size_t") or 1),
            num_channels=transformer["in_channels"],
            height=request.height // spatial,
            width=request.width // spatial,
        )

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """[batch, frames with padding, channels, height, width], what the transformer sees."""
        return (1, self.num_frames + self.padding_frames, self.num_channels, self.height, self.width)


def initial_noise(request: GenerateRequest, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """The noise that diffusers' pipeline draws on the CPU for the same seed, dtype and shape."""
    return torch.randn(shape, generator=generator, dtype=getattr(torch, request.dtype))


def rotary_embedding(geometry: LatentGeometry, transformer: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray] | None:
    """Cosines and sines, each float32 [video tokens, head_dim], as diffusers makes them for CogVideoX 1.5 ("slice").

    None for a transformer without rotary embeddings. Raises CheckpointError for a CogVideoX 1.0 transformer.
    """
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    if not transformer.get("use_rotary_positional_embeddings"):
        return None
    patch_size, patch_size_t = transformer["patch_size"], transformer.get("patch_size_t")
    if patch_size_t is None:
        raise CheckpointError(
            "transformer/config.json has no patch_size_t: a CogVideoX 1.0 checkpoint; expected 1.5, "
            "e.g. model=cogvideox1.5-5b"
        )
    cos, sin = get_3d_rotary_pos_embed(
        embed_dim=transformer["attention_head_dim"],
        crops_coords=None,
        grid_size=(geometry.height // patch_size, geometry.width // patch_size),
        temporal_size=geometry.shape[1] // patch_size_t,
        grid_type="slice",
        max_size=(transformer["sample_height"] // patch_size, transformer["sample_width"] // patch_size),
    )
    return torch_to_numpy(cos.float()), torch_to_numpy(sin.float())


def denoise_step(transformer: Any, do_classifier_free_guidance: bool) -> Any:
    """One denoising step as a pure function of arrays, for `jax.jit`.

    transformer: `(weights, **inputs) -> (prediction,)`. The function takes

    - weights: of the transformer
    - latents: [1, frames, channels, height, width] in the transformer's dtype
    - old_x0: the x0 of the step before, float32 of the same shape (zeros at first)
    - noise: of the same shape, or a scalar 0 for schedulers without noise
    - embeddings: [2 or 1, text tokens, text_embed_dim]: negative, positive; positive alone without guidance
    - rotary: cosines and sines, or None
    - timestep: int32 []; guidance_scale: float32 []; coefficients: float32 [6], a row of `StepTable`

    and returns (latents, x0, whether all latents are finite). Guidance and scheduler are computed in float32.
    """

    def step(weights, latents, old_x0, noise, embeddings, rotary, timestep, guidance_scale, coefficients):
        batch_size = embeddings.shape[0]
        (prediction,) = transformer(
            weights,
            hidden_states=jnp.broadcast_to(latents, (batch_size, *latents.shape[1:])),
            encoder_hidden_states=embeddings,
            timestep=jnp.broadcast_to(timestep, (batch_size,)),
            image_rotary_emb=rotary,
            return_dict=False,
        )
        prediction = prediction.astype(jnp.float32)
        if do_classifier_free_guidance:
            negative, positive = jnp.split(prediction, 2)
            prediction = negative + guidance_scale * (positive - negative)
        x0_sample, x0_model, prev_sample, prev_x0, prev_old_x0, prev_noise = coefficients
        sample = latents.astype(jnp.float32)
        x0 = x0_sample * sample + x0_model * prediction
        sample = prev_sample * sample + prev_x0 * x0 + prev_old_x0 * old_x0 + prev_noise * noise.astype(jnp.float32)
        return sample.astype(latents.dtype), x0, jnp.isfinite(sample).all()

    return step


class Denoiser:
    """A loaded transformer. Keeps its compiled steps for the next requests; drop the object to free its memory."""

    def __init__(
        self,
        loaded: LoadedModule,
        transformer_config: Mapping[str, Any],
        vae_config: Mapping[str, Any],
        scheduler_config: Mapping[str, Any],
        attention: AttentionOptions,
    ):
        module: Any = loaded.module
        module.set_attn_processor(SplashAttentionProcessor(attention))
        self._attention = attention
        self._weights = loaded.weights
        self._transformer = jax_function(loaded.module)
        self._transformer_config = transformer_config
        self._vae_config = vae_config
        self._scheduler_config = scheduler_config
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype, attention: AttentionOptions) -> Self:
        """Load transformer/ and the configurations of scheduler/ and vae/. Raises CheckpointError."""
        return cls(
            load_module(checkpoint, "transformer", dtype),
            checkpoint.config("transformer"),
            checkpoint.config("vae"),
            checkpoint.config("scheduler"),
            attention,
        )

    def denoise(
        self,
        request: GenerateRequest,
        embeddings: np.ndarray,
        timings: StageTimings | None = None,
        progress: Progress = no_progress,
        latents: np.ndarray | None = None,
    ) -> np.ndarray:
        """Latents [1, frames, channels, height, width] in the transformer's dtype, ready for the VAE stage.

        embeddings: [2 or 1, text tokens, text_embed_dim]: negative and positive, or positive alone without guidance.
        latents: initial noise, with padding frames; drawn from the request's seed without it.
        Raises NonFiniteError, and whatever `progress` raises, which is called once a step.
        """
        timings = timings or StageTimings("denoise")
        geometry = LatentGeometry.of(request, self._transformer_config, self._vae_config)
        scheduler = build_scheduler(self._scheduler_config, request.scheduler)
        table = step_table(scheduler, request.num_inference_steps)
        guidance = guidance_scales(request.guidance_scale, table.timesteps, request.use_dynamic_cfg)
        generator = torch.Generator().manual_seed(request.seed)
        if latents is None:
            latents = torch_to_numpy(initial_noise(request, geometry.shape, generator) * table.init_noise_sigma)
        state = (jnp.asarray(latents), jnp.zeros(geometry.shape, jnp.float32))
        fixed = (jnp.asarray(embeddings), _to_jax(rotary_embedding(geometry, self._transformer_config)))

        def arguments(index: int) -> tuple[Any, ...]:
            noise = _step_noise(table, index, geometry.shape, generator, getattr(torch, request.dtype))
            scalars = np.int32(table.timesteps[index]), np.float32(guidance[index])
            return (self._weights, *state, noise, *fixed, *scalars, table.coefficients[index].astype(np.float32))

        first = arguments(0)
        step = self._compile(first, request.do_classifier_free_guidance, timings, progress)
        with timings.measure("run", progress):
            clock = StepClock(timings, len(table.timesteps), progress)
            for index in range(len(table.timesteps)):
                *state, finite = step(*(first if index == 0 else arguments(index)))
                if not bool(finite):
                    raise NonFiniteError(
                        f"denoise: step {index + 1} of {len(table.timesteps)}: the latents hold NaN or infinity; "
                        "try dtype=float32 or a lower guidance_scale"
                    )
                clock.tick()
        return np.asarray(state[0])[:, geometry.padding_frames :]

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

    def _compile(self, arguments: tuple[Any, ...], guided: bool, timings: StageTimings, progress: Progress) -> Any:
        key = (guided, tuple((x.shape, x.dtype) for x in jax.tree.leaves(arguments[1:])))
        if key not in self._compiled:
            with timings.measure("compile", progress):
                self._compiled[key] = jax.jit(denoise_step(self._transformer, guided)).lower(*arguments).compile()
        return self._compiled[key]


def _step_noise(
    table: StepTable, index: int, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> jax.Array:
    if not table.needs_noise:
        return jnp.zeros((), jnp.float32)
    noise = torch.zeros(shape, dtype=dtype)
    for _ in range(table.noise_draws[index]):
        noise = torch.randn(shape, generator=generator, dtype=dtype)
    return jnp.asarray(torch_to_numpy(noise))


def _to_jax(arrays: tuple[np.ndarray, ...] | None) -> tuple[jax.Array, ...] | None:
    return None if arrays is None else tuple(jnp.asarray(array) for array in arrays)
