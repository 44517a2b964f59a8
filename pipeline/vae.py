"""Stage "vae": latents -> frames, with the stock decoder of AutoencoderKLCogVideoX.

As stock, frames are decoded in batches of two latent frames (three in the first, for an odd count), each batch handing
the ends of its activations (the convolution cache) to the next. Two compiled programs serve any length.

Over several devices a batch is split along its width, or height, whatever divides better; XLA's partitioner exchanges
the edges that convolutions need and sums the group norms' statistics over the whole, so that nothing is approximated.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec

from pipeline.errors import NonFiniteError
from pipeline.loading import Checkpoint, LoadedModule, load_module
from pipeline.placement import SPLIT, put, split_mesh, to_host
from pipeline.profiling import Progress, StageTimings, StepClock, no_progress
from pipeline.torchax_bridge import jax_function
from pipeline.vae_modules import adapt

# Convolutions of kernel size 1 need nothing of the batch before. Stock keeps all their input as "cache" nevertheless.
_UNUSED_CACHES = {"conv_y", "conv_b"}
DECODER_PREFIXES = ("decoder.", "post_quant_conv.")


class VaeDecoder:
    """A loaded VAE decoder. Keeps its compiled programs for the next latents; drop the object to free its memory."""

    def __init__(self, loaded: LoadedModule, config: Mapping[str, Any], devices: Sequence[jax.Device]):
        self._weights = loaded.weights
        self._devices = devices
        self._scaling_factor = float(config["scaling_factor"])
        self._frame_batch_size = int(loaded.module.num_latent_frames_batch_size)  # type: ignore[arg-type] # an attribute, not a submodule
        self._decode_batch = decode_function(loaded.module)
        self._compiled: dict[Any, Any] = {}

    @classmethod
    def load(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> Self:
        """Load the decoder's half of vae/. Raises CheckpointError."""
        devices = jax.devices()
        everywhere = NamedSharding(split_mesh(devices, 1), PartitionSpec())
        loaded = load_module(
            checkpoint,
            "vae",
            dtype,
            keep=lambda name: name.startswith(DECODER_PREFIXES),
            place=lambda name, value: put(value, everywhere),
        )
        return cls(loaded, checkpoint.config("vae"), devices)

    def decode(
        self,
        latents: np.ndarray,
        timings: StageTimings | None = None,
        progress: Progress = no_progress,
        quantize: bool = True,
    ) -> np.ndarray:
        """Frames [frames, height, width, 3]: uint8, or float32 in [0, 1] without `quantize`.

        latents: [1, latent frames, channels, height, width]. Raises NonFiniteError, and whatever `progress` raises,
        which is called once a batch of latent frames.
        """
        timings = timings or StageTimings("vae")
        batches = list(frame_batches(latents.shape[1], self._frame_batch_size))
        sharding = latent_sharding(latents.shape, self._devices)
        inputs = [put(latents[:, start:stop], sharding) for start, stop in batches]
        programs = self._compile(inputs, quantize, timings, progress)
        frames, cache = [], None
        with timings.measure("run", no_progress):
            clock = StepClock(timings, len(batches), progress)
            for index, (batch, program) in enumerate(zip(inputs, programs, strict=True)):
                decoded, cache, finite = program(self._weights, batch, cache)
                if not bool(finite):
                    start, stop = batches[index]
                    raise NonFiniteError(
                        f"vae: batch {index + 1} of {len(batches)} (latent frames {start} to {stop - 1}): the frames "
                        "hold NaN or infinity; try dtype=float32"
                    )
                frames.append(to_host(decoded))
                clock.tick()
        return np.concatenate(frames)

    def _compile(
        self, batches: Sequence[jax.Array], quantize: bool, timings: StageTimings, progress: Progress
    ) -> list[Any]:
        """The compiled program of each batch; all but the first are the same one."""
        programs, cache = [], None
        for batch in batches:
            key = (batch.shape, batch.dtype, cache is None, quantize)
            sharding = batch.sharding
            assert isinstance(sharding, NamedSharding)
            if key not in self._compiled:
                with timings.measure("compile", progress):
                    program = decode_program(self._decode_batch, self._scaling_factor, quantize, sharding)
                    lowered = program.lower(self._weights, batch, cache)
                    self._compiled[key] = (lowered.compile(), cache_like(lowered.out_info[1], sharding))
            program, cache = self._compiled[key]
            programs.append(program)
        return programs


def decode_program(decode_batch: Any, scaling_factor: float, quantize: bool, sharding: NamedSharding) -> Any:
    """(weights, latents of a batch, cache) -> (frames, cache, whether all is finite), under jit, the cache donated.

    decode_batch: `_decode_batch` as a JAX function. sharding: of the latents; frames and cache are split alike.
    """
    split = "width" if sharding.spec and len(sharding.spec) == 5 and sharding.spec[4] else "height"
    frames_spec = PartitionSpec(None, None, SPLIT) if split == "width" else PartitionSpec(None, SPLIT)

    @jax.named_scope("vae")
    def program(weights: Any, latents: jax.Array, cache: Any) -> Any:
        video, cache = decode_batch(weights, latents / scaling_factor, cache)
        video = video.astype(jnp.float32)
        frames = jnp.clip(video[0].transpose(1, 2, 3, 0) / 2 + 0.5, 0, 1)
        if quantize:
            frames = jnp.round(frames * 255).astype(jnp.uint8)
        return frames, cache, jnp.isfinite(video).all()

    # One sharding stands for all leaves of the cache, which are [1, channels, frames, height, width] like the latents.
    outputs = (NamedSharding(sharding.mesh, frames_spec), sharding, NamedSharding(sharding.mesh, PartitionSpec()))
    return jax.jit(program, donate_argnums=2, out_shardings=outputs)


def cache_like(cache: Any, sharding: NamedSharding) -> Any:
    """Abstract arrays of a cache, split as the program returns it."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache)


def latent_sharding(shape: Sequence[int], devices: Sequence[jax.Device]) -> NamedSharding:
    """Latents [1, frames, channels, height, width] split along width or height over as many devices as divide it."""
    *_, height, width = shape
    by_width, by_height = split_mesh(devices, width), split_mesh(devices, height)
    if by_width.shape[SPLIT] >= by_height.shape[SPLIT]:
        return NamedSharding(by_width, PartitionSpec(None, None, None, None, SPLIT))
    return NamedSharding(by_height, PartitionSpec(None, None, None, SPLIT))


def decode_function(vae: torch.nn.Module) -> Any:
    """`(weights, latents of a batch, cache) -> (video, cache)` of a stock VAE, for `decode_program`."""
    adapt(vae)
    return jax_function(vae, _decode_batch)


def _decode_batch(vae: Any, latents: torch.Tensor, cache: dict[str, Any] | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents [1, frames, channels, height, width] -> video [1, 3, frames, height, width] and the next cache."""
    latents = latents.permute(0, 2, 1, 3, 4)
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    video, cache = vae.decoder(latents, conv_cache=cache)
    return video, _used_caches(cache)


def _used_caches(cache: dict[str, Any]) -> dict[str, Any]:
    used = {name: value for name, value in cache.items() if name not in _UNUSED_CACHES and value is not None}
    return {name: _used_caches(value) if isinstance(value, dict) else value for name, value in used.items()}


def frame_batches(num_frames: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each batch of latent frames; the remainder goes with the first, as in stock."""
    start, stop = 0, min(batch_size + num_frames % batch_size, num_frames)
    while start < num_frames:
        yield start, stop
        start, stop = stop, stop + batch_size
