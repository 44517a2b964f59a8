"""The three stages as functions of what flows between nodes, each a call of the same stage in `pipeline`."""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import host, models, settings

_BEYOND = 0.5  # that a picture scaled with a sharp filter, or sharpened, may have beyond 0 and 1; it is clamped
GIVEN = "as given"  # in place of a path, for what comes over a link


@dataclasses.dataclass(frozen=True, eq=False)
class Embeds:
    """COGVIDEOX_EMBEDS: encoded prompts, and what else the sampler begins with.

    prompts: embeddings [2, text tokens, text_embed_dim], of the negative prompt and the prompt. image, video: float32
    [frames, height, width, channels] in 0 to 1, as ComfyUI's IMAGE. loras: of `pipeline.requests.request.LoraFile`.
    """

    checkpoint: Any  # pipeline.checkpoints.loading.Checkpoint
    prompt: str
    negative_prompt: str
    dtype: str
    prompts: np.ndarray
    image: torch.Tensor | None = None
    noise_aug_strength: float = 0.0
    video: torch.Tensor | None = None
    strength: float = 0.8
    loras: tuple[Any, ...] = ()

    def __repr__(self) -> str:  # what Preview Any shows: of the checkpoint nothing, whose folder is the server's
        text = f"prompt={self.prompt!r}, negative_prompt={self.negative_prompt!r}"
        given = [f"{name} {list(x.shape)}" for name in ("image", "video") if (x := getattr(self, name)) is not None]
        given += [f"LoRA {Path(lora.path).name} {lora.strength:g}" for lora in self.loras]
        return ", ".join([f"embeddings {list(self.prompts.shape)} {self.prompts.dtype}", text, *given])

    @property
    def fields(self) -> dict[str, Any]:
        """Return what these are in a GenerateRequest; of an image or a video, that there is one."""
        found: dict[str, Any] = {
            "prompt": self.prompt,
            "negative_prompt": self.negative_prompt,
            "checkpoint": self.checkpoint.name,
            "dtype": self.dtype,
            "lora": self.loras,
        }
        if self.image is not None:
            found |= {"image": GIVEN, "noise_aug_strength": self.noise_aug_strength}
        if self.video is not None:
            found |= {"video": GIVEN, "strength": self.strength}
        return found

    def pictures(self, num_frames: int) -> list[Any] | None:
        """Return the image, or the first frames of the video, as PIL images. Raises RequestError for too few."""
        from PIL import Image

        from pipeline.requests.errors import RequestError

        frames, count = (self.image, 1) if self.video is None else (self.video, num_frames)
        if frames is None:
            return None
        check_frames(frames, one=self.video is None)
        if len(frames) < count:
            raise RequestError(f"images: {len(frames)} frames; expected num_frames={count} of them, or a smaller one")
        pixels = (frames[:count, ..., :3].clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        return [Image.fromarray(each) for each in pixels]


def check_frames(frames: Any, one: bool) -> None:
    """Raise RequestError unless a value is ComfyUI's IMAGE: floats [frames, height, width, 3 or 4] in 0 to 1.

    one: whether it is the input image, of one frame, or else the frames of images.
    """
    from pipeline.requests.errors import RequestError

    name = "image" if one else "images"
    expected = "expected an IMAGE of [frames, height, width, 3 or 4] with floats from 0 to 1"
    if not isinstance(frames, torch.Tensor):
        raise RequestError(f"{name}: {type(frames).__name__}; {expected}")
    if frames.ndim != 4 or frames.shape[-1] not in (3, 4) or 0 in frames.shape:
        raise RequestError(f"{name}: {list(frames.shape)}; {expected}")
    if not frames.is_floating_point():
        raise RequestError(f"{name}: {str(frames.dtype).removeprefix('torch.')}; {expected} (divide by 255)")
    if not frames.isfinite().all():
        raise RequestError(f"{name}: not finite; {expected}")
    low, high = float(frames.min()), float(frames.max())
    if low < -_BEYOND or high > 1 + _BEYOND:
        remedy = " (divide by 255)" if high > 2 else ""
        raise RequestError(f"{name}: values from {low:g} to {high:g}; {expected}{remedy}")
    if one and len(frames) != 1:
        raise RequestError(f"image: {len(frames)} images; expected one, the first frame (ImageFromBatch takes one out)")


@dataclasses.dataclass(frozen=True, eq=False)
class Latents:
    """COGVIDEOX_LATENTS. latents: [1, frames, channels, height, width] in the request's dtype."""

    checkpoint: Any  # pipeline.checkpoints.loading.Checkpoint
    request: Any  # pipeline.requests.request.GenerateRequest
    latents: np.ndarray

    def __repr__(self) -> str:
        return f"latents {list(self.latents.shape)} {self.latents.dtype}, prompt={self.request.prompt!r}"


#: Decoded frames, as long as ComfyUI keeps the latents: another fps runs the decoder's node, not the decoder.
_frames: weakref.WeakKeyDictionary[Latents, torch.Tensor] = weakref.WeakKeyDictionary()
models.on_release.append(_frames.clear)


@contextlib.contextmanager
def _running(stage: str) -> Iterator[Any]:
    """Yield the pipeline's Stages, torch set as they need it (ComfyUI runs nodes in inference mode)."""
    from pipeline.requests.errors import DeviceMemoryError
    from pipeline.stages.stages import Stages
    from splash_workbench.compile_cache import use_compilation_cache

    use_compilation_cache()  # before the first program: after /free or a restart nothing is compiled again
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield Stages(lambda kind, key, load: models.loaded_stage((kind, key), load))
    except DeviceMemoryError as error:
        models.release()
        raise DeviceMemoryError(
            f"{stage}: not enough device memory; loaded models were freed, so the same may work now; else take a "
            "smaller size, fewer frames, dtype=bfloat16, or more devices"
        ) from error


def _context(stage: Any, checkpoint: Any, request: Any, progress: Any, **more: Any) -> Any:
    from pipeline.checkpoints.checks import check_request, read_configs
    from pipeline.stages.progress import StageClock
    from pipeline.stages.stages import StageContext

    configs = read_configs(checkpoint)
    if stage != "text":  # whose request has no size yet
        check_request(request, configs)
    identities = checkpoint.identities("vae" if stage == "encode" else stage)
    return StageContext(checkpoint, request, identities, clock=StageClock(stage, progress), **more)


def encode(prompt: str, negative_prompt: str, model_id: str, dtype: str, progress: Any) -> Embeds:
    """Run stage "text" on both prompts: whether there is guidance is not known yet."""
    from pipeline.requests.request import GenerateRequest

    dtype = settings.resolve_dtype(dtype, model_id)
    request = GenerateRequest(prompt, model_id, negative_prompt, dtype=dtype)  # type: ignore[arg-type] # checked there
    with _running("text") as stages:
        checkpoint = settings.find_checkpoint(model_id)
        prompts = stages.encode(_context("text", checkpoint, request, progress), [negative_prompt, prompt])
    return Embeds(checkpoint, prompt, negative_prompt, dtype, prompts)


def sampling_request(
    embeds: Embeds | None, *, kernel: str, parallel_plan: str, num_devices: int, cache: str, **fields: Any
) -> tuple[Any, Any]:
    """Return the checked request of the sampler's widgets and its parallel options, against the devices here.

    embeds: None while the text is not encoded yet. Raises RequestError.
    """
    from pipeline.requests.request import GenerateRequest
    from pipeline.requests.reuse import CacheOptions

    of_text: dict[str, Any] = {"prompt": "not known yet"} if embeds is None else embeds.fields
    options = {"attention": settings.attention_options(kernel), "cache": CacheOptions(**settings.CACHES[cache])}
    request = GenerateRequest(**of_text, **fields, **options)
    parallel = settings.parallel_options(parallel_plan, num_devices)
    settings.check_devices(request.attention, parallel)
    return request, parallel


def denoise(embeds: Embeds, request: Any, parallel: Any, progress: Any) -> Latents:
    """Run stage "denoise"."""
    prompts = embeds.prompts if request.do_classifier_free_guidance else embeds.prompts[1:]
    with _running("denoise") as stages:
        context = _context("denoise", embeds.checkpoint, request, progress, parallel=parallel)
        moments = None
        if request.encodes:
            pictures = embeds.pictures(request.num_frames)
            moments = stages.encode_source(_context("encode", embeds.checkpoint, request, progress), pictures)
        return Latents(embeds.checkpoint, request, stages.denoise(context, prompts, moments=moments))


def decode(latents: Latents, progress: Any) -> torch.Tensor:
    """Run stage "vae". Returns frames as ComfyUI's IMAGE: float32 [frames, height, width, 3] in 0 to 1."""
    if latents not in _frames:
        with _running("vae") as stages:
            context = _context("vae", latents.checkpoint, latents.request, progress)
            frames = stages.decode(context, latents.latents, quantize=False)
            _frames[latents] = torch.from_numpy(np.array(frames))  # a copy: JAX's arrays are read-only
    return _frames[latents]


def with_lora(embeds: Embeds, name: str, strength: float) -> Embeds:
    """Add a LoRA of ComfyUI's folders, or of the package. Raises RequestError where there is none of the name."""
    from pipeline.requests.errors import RequestError
    from pipeline.requests.request import LoraFile

    path = host.lora_files().get(name, name if name in settings.TINY_LORAS else None)
    if path is None:
        raise RequestError(f"lora_name={name!r}: expected a file of safetensors in ComfyUI's models/loras")
    return dataclasses.replace(embeds, loras=(*embeds.loras, LoraFile(path, strength)))
