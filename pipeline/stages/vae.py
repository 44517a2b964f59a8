"""Both halves of the VAE, with the weights of a stock AutoencoderKLCogVideoX.

VaeDecoder: stage "vae", latents -> frames. VaeEncoder: the frames of an image or a video -> latents.

As stock, frames are decoded in batches of two latent frames (three in the first, for an odd count) and encoded in
batches of eight frames (nine in the first), each batch handing the ends of its activations (the convolution cache) to
the next. Two compiled programs serve any length.

Over several devices a batch is split along its width, or height, whatever divides better; convolutions exchange the
edges that they need, and group norms sum their statistics over the whole, so that nothing is approximated.
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from pipeline.checkpoints.loading import Checkpoint, open_module
from pipeline.model.placement import SPLIT, Rows, place_all, put, split_mesh, to_host
from pipeline.model.vae.convolution import VMEM
from pipeline.model.vae.decoder import DecoderShape, decode
from pipeline.model.vae.encoder import encode
from pipeline.model.vae.fused import FusedLayer, can_fuse
from pipeline.model.vae.layers import DECODER_PREFIXES, ENCODER_PREFIXES, arrange
from pipeline.requests.errors import NonFiniteError, RequestError
from pipeline.stages.progress import StageClock
from splash_workbench.provenance import VAE_KERNEL_VARIABLE

#: Of the cache, [resnets, frames, columns, ...].
CACHE_SPEC = PartitionSpec(None, None, SPLIT)
#: TPUs whose matrix units are 128 wide; later ones' are 256.
_NARROW_TPUS = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite", "TPU v5", "TPU v5p", "TPU v5 lite", "TPU v5e")
#: On a CPU: programs that run as fast, for half of the CPU seconds to compile and two thirds of the memory (measured,
#: `make demo`'s video).
_CPU_OPTIONS: Any = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


@dataclasses.dataclass(frozen=True)
class _Arranged:
    """A weight as `arrange` returns it, which puts the rows last; see `pipeline.model.placement.Rows`."""

    weight: Rows
    divisible = True

    @property
    def axis(self) -> int:
        return 4 if len(self.shape) == 5 else 0

    @property
    def shape(self) -> tuple[int, ...]:
        return arrange(np.broadcast_to(np.zeros(()), self.weight.shape)).shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.weight.dtype

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        rows = np.empty((stop - start, *self.weight.shape[1:]), self.dtype)
        self.weight.read(start, stop, rows)
        out[...] = arrange(rows)


class _VaeHalf:
    """A loaded half of the VAE. Keeps its compiled programs for the next input; drop the object to free its memory."""

    _prefixes: tuple[str, ...]
    _input, _output = "", ""  # what they are, for messages

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype):
        """Load this half of vae/. Raises CheckpointError."""
        self._devices, self._dtype = jax.devices(), dtype
        everywhere = NamedSharding(split_mesh(self._devices, 1), PartitionSpec())
        with open_module(checkpoint, "vae", dtype, lambda name: name.startswith(self._prefixes)) as opened:
            stored = opened.weights.items()
            self._weights = dict(place_all((name, _Arranged(each), everywhere) for name, each in stored))
        module: Any = opened.module
        self._module = module
        self._shape = DecoderShape.from_config(module.config)
        self._compiled: dict[Any, Any] = {}

    def _run(
        self,
        inputs: Sequence[jax.Array],
        batches: Sequence[tuple[int, int]],
        kind: Hashable,
        program: Callable[[NamedSharding], Any],
        clock: StageClock,
    ) -> np.ndarray:
        """Return what the program makes of all inputs, one after the other. batches: start and stop of each.

        kind: tells this program from others of this half. Raises NonFiniteError, and what `clock.progress` raises.
        """
        programs = self._compile(inputs, kind, program, clock)
        outputs, cache = [], None
        with clock.measure("run"):
            clock.start(len(batches))
            for index, (batch, compiled) in enumerate(zip(inputs, programs, strict=True)):
                output, cache, finite = compiled(self._weights, batch, cache)
                if not bool(finite):
                    start, stop = batches[index]
                    raise NonFiniteError(
                        f"{clock.timings.stage}: batch {index + 1} of {len(batches)} ({self._input} {start} to "
                        f"{stop - 1}): the {self._output} hold NaN or infinity; try dtype=float32"
                    )
                outputs.append(to_host(output))
                clock.tick()
        return np.concatenate(outputs)

    def _compile(
        self,
        batches: Sequence[jax.Array],
        kind: Hashable,
        program: Callable[[NamedSharding], Any],
        clock: StageClock,
    ) -> list[Any]:
        """Return the compiled program of each batch; all but the first share one. New ones compile side by side."""
        keys = [(batch.shape, batch.dtype, index == 0, kind) for index, batch in enumerate(batches)]
        if not set(keys) <= set(self._compiled):
            with clock.measure("compile"):
                lowered: dict[Any, Any] = {}
                cache = None
                for key, batch in zip(keys, batches, strict=True):
                    assert isinstance(batch.sharding, NamedSharding)
                    if key not in lowered:
                        lowered[key] = program(batch.sharding).lower(self._weights, batch, cache)
                    cache = cache_like(lowered[key].out_info[1], batch.sharding)
                new = [key for key in lowered if key not in self._compiled]
                with ThreadPoolExecutor(len(new)) as pool:
                    self._compiled.update(zip(new, pool.map(lambda key: _compiled(lowered[key]), new), strict=True))
        return [self._compiled[key] for key in keys]


def _compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    if jax.default_backend() == "cpu":
        try:
            return lowered.compile(compiler_options=_CPU_OPTIONS)
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):  # a release of XLA without these flags
                raise
    return lowered.compile()


class VaeDecoder(_VaeHalf):
    """The decoder's half."""

    _prefixes = DECODER_PREFIXES
    _input, _output = "latent frames", "frames"

    def decode(self, latents: np.ndarray, clock: StageClock | None = None, quantize: bool = True) -> np.ndarray:
        """Decode to frames [frames, height, width, 3]: uint8, or float32 in [0, 1] without `quantize`.

        latents: [1, latent frames, channels, height, width]. Raises NonFiniteError, and whatever the clock's
        `progress` raises, which is called once a batch of latent frames.
        """
        batches = list(frame_batches(latents.shape[1], int(self._module.num_latent_frames_batch_size)))
        z = jax.ShapeDtypeStruct(latents.shape, latents.dtype)
        sharding = decoder_sharding(self._weights, z, self._shape, self._devices)
        inputs = [put(latents[:, start:stop], sharding) for start, stop in batches]

        def program(sharding: NamedSharding) -> Any:
            return decode_program(self._shape, quantize, sharding)

        return self._run(inputs, batches, quantize, program, clock or StageClock("vae"))


class VaeEncoder(_VaeHalf):
    """The encoder's half."""

    _prefixes = ENCODER_PREFIXES
    _input, _output = "frames", "latents"

    def encode(self, frames: np.ndarray, clock: StageClock | None = None) -> np.ndarray:
        """Encode to means and log variances, float32 [1, 2 channels, latent frames, height, width], as stock has them.

        frames: float32 [frames, height, width, 3] in [-1, 1]: one, or 8k + 1, or 8k. Raises NonFiniteError, and
        whatever the clock's `progress` raises, which is called once a batch of frames.
        """
        batches = list(frame_batches(len(frames), int(self._module.num_sample_frames_batch_size)))
        latents = (side // self._shape.spatial_factor for side in frames.shape[1:3])
        sharding = frame_sharding(latent_sharding((1, 1, 1, *latents), self._devices))
        frames = frames.astype(jnp.dtype(str(self._dtype).removeprefix("torch.")))
        inputs = [put(frames[start:stop], sharding) for start, stop in batches]

        def program(sharding: NamedSharding) -> Any:
            return encode_frames_program(self._shape, sharding)

        moments = self._run(inputs, batches, None, program, clock or StageClock("encode"))
        return moments.transpose(3, 0, 1, 2)[None]


def decode_program(shape: DecoderShape, quantize: bool, sharding: NamedSharding) -> Any:
    """Return (weights, latents of a batch, cache) -> (frames, cache, is all finite) under jit, the cache donated.

    sharding: of the latents [1, frames, channels, height, width], as `decoder_sharding` makes it.
    """
    mesh = sharding.mesh
    by_height = len(sharding.spec) == 4  # then height and width change places around the decoder
    frames_spec = PartitionSpec(None, SPLIT) if by_height else PartitionSpec(None, None, SPLIT)

    @jax.named_scope("vae")
    def program(weights: Any, latents: jax.Array, cache: Any) -> Any:
        z = (latents[0] / shape.scaling_factor).transpose(0, 2, 3, 1)
        if by_height:
            z = z.swapaxes(1, 2)
            weights = {name: x.swapaxes(0, 2) if x.ndim == 5 else x for name, x in weights.items()}
        layer = None
        if fuses(weights, z, shape, mesh.devices.flat[0]):
            layer = functools.partial(FusedLayer, vmem=VMEM[mesh.devices.flat[0].device_kind])
        paired = pays_in_pairs(weights, shape, mesh.devices.flat[0])
        video, cache = decode(weights, z, cache, shape, mesh.shape[SPLIT], paired, layer)
        video = video.swapaxes(1, 2) if by_height else video
        frames = jnp.clip(video / 2 + 0.5, 0, 1)
        if quantize:
            frames = jnp.round(frames * 255).astype(jnp.uint8)
        return frames, cache, lax.pmin(jnp.isfinite(video).all().astype(jnp.int32), SPLIT)

    over_mesh = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=(PartitionSpec(), sharding.spec, CACHE_SPEC),
        out_specs=(frames_spec, CACHE_SPEC, PartitionSpec()),
        check_vma=False,
    )
    return jax.jit(over_mesh, donate_argnums=2)


def pays_in_pairs(weights: Any, shape: DecoderShape, device: jax.Device) -> bool:
    """Return whether to decode frames in pairs: where channels fill half of a matrix unit at most, and off TPU."""
    channels = weights["decoder.conv_out.conv.weight"].shape[3]
    return shape.time_levels > 0 and channels <= 128 and device.device_kind not in _NARROW_TPUS


def fuses(weights: Any, z: Any, shape: DecoderShape, device: jax.Device) -> bool:
    """Return whether to decode by the kernel of `pipeline.model.vae.fused`: on v6e and v7x, bfloat16 of sizes it takes.

    z: a device's latents [frames, rows, columns, channels]. RequestError: VAE_KERNEL_VARIABLE is neither 0 nor 1.
    """
    if (wanted := os.environ.get(VAE_KERNEL_VARIABLE, "1")) not in ("0", "1"):
        raise RequestError(
            f"{VAE_KERNEL_VARIABLE}={wanted}: expected 0 (XLA's convolutions) or 1 (the kernel where it can)."
        )
    vmem = VMEM.get(device.device_kind)
    if wanted == "0" or vmem is None or z.dtype != jnp.bfloat16:
        return False
    _, rows, columns, _ = z.shape
    return can_fuse(weights, shape, rows, columns, pays_in_pairs(weights, shape, device), vmem)


def encode_frames_program(shape: DecoderShape, sharding: NamedSharding) -> Any:
    """Return (weights, frames of a batch, cache) -> (moments, cache, is all finite) under jit, the cache donated.

    sharding: of the frames [frames, height, width, 3], as `frame_sharding` makes it; the moments are split alike.
    """
    mesh = sharding.mesh
    by_height = len(sharding.spec) == 2  # then height and width change places around the encoder

    @jax.named_scope("encode")
    def program(weights: Any, frames: jax.Array, cache: Any) -> Any:
        if by_height:
            frames = frames.swapaxes(1, 2)
            weights = {name: x.swapaxes(0, 2) if x.ndim == 5 else x for name, x in weights.items()}
        moments, cache = encode(weights, frames, cache, shape, mesh.shape[SPLIT])
        moments = moments.swapaxes(1, 2) if by_height else moments
        return moments, cache, lax.pmin(jnp.isfinite(moments).all().astype(jnp.int32), SPLIT)

    over_mesh = jax.shard_map(
        program,
        mesh=mesh,
        in_specs=(PartitionSpec(), sharding.spec, CACHE_SPEC),
        out_specs=(sharding.spec, CACHE_SPEC, PartitionSpec()),
        check_vma=False,
    )
    return jax.jit(over_mesh, donate_argnums=2)


def cache_like(cache: Any, sharding: NamedSharding) -> Any:
    """Return abstract arrays of a cache, split as the program returns it. sharding: of the latents."""
    sharding = NamedSharding(sharding.mesh, CACHE_SPEC)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache)


def decoder_sharding(
    weights: Any, latents: jax.ShapeDtypeStruct, shape: DecoderShape, devices: Sequence[jax.Device]
) -> NamedSharding:
    """Split latents as `latent_sharding`, or over half as many devices where only then the decoder `fuses`.

    Two groups of devices decode the same then, e.g. 720p on 16 chips: XLA's convolutions of a sixteenth of the columns
    were not compiled after 50 minutes.
    """
    widest = latent_sharding(latents.shape, devices)
    _, frames, channels, *sides = latents.shape
    split = widest.mesh.shape[SPLIT]
    splits = (split, split // 2) if split % 2 == 0 else (split,)
    for split, by_width in itertools.product(splits, (True, False)):
        rows, columns = sides if by_width else reversed(sides)
        z = jax.ShapeDtypeStruct((frames, rows, columns // split, channels), latents.dtype)
        if columns % split == 0 and fuses(weights, z, shape, devices[0]):
            return NamedSharding(split_mesh(devices, split), _latent_spec(by_width))
    return widest


def latent_sharding(shape: Sequence[int], devices: Sequence[jax.Device]) -> NamedSharding:
    """Split latents [1, frames, channels, height, width] by width or height over as many devices as divide it."""
    *_, height, width = shape
    by_width, by_height = split_mesh(devices, width), split_mesh(devices, height)
    if by_width.shape[SPLIT] >= by_height.shape[SPLIT]:
        return NamedSharding(by_width, _latent_spec(by_width=True))
    return NamedSharding(by_height, _latent_spec(by_width=False))


def _latent_spec(by_width: bool) -> PartitionSpec:
    return PartitionSpec(None, None, None, None, SPLIT) if by_width else PartitionSpec(None, None, None, SPLIT)


def frame_sharding(latents: NamedSharding) -> NamedSharding:
    """Split frames [frames, height, width, channels] as their latents are split."""
    by_height = len(latents.spec) == 4
    return NamedSharding(latents.mesh, PartitionSpec(None, SPLIT) if by_height else PartitionSpec(None, None, SPLIT))


def frame_batches(num_frames: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each batch of frames; the remainder goes with the first, as in stock."""
    start, stop = 0, min(batch_size + num_frames % batch_size, num_frames)
    while start < num_frames:
        yield start, stop
        start, stop = stop, stop + batch_size
