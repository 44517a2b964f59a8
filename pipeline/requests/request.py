"""The request for one video, checked once, before any work."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pipeline.requests import limits
from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError, require, require_choice, require_number
from pipeline.requests.models import fill_in_defaults
from pipeline.requests.reuse import PRESETS, CacheOptions, Quality
from splash_attn.api import Implementation
from splash_attn.types import BlockSizes, QkDtype, Variant

T = TypeVar("T")
Stage = Literal["text", "denoise", "vae"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Dtype = Literal["float32", "bfloat16"]
Scheduler = Literal["checkpoint", "ddim", "dpm"]
Quantization = Literal["none", "int8"]
_OF_MODEL: Any = None  # filled in by __post_init__


def nearest_multiples(value: int, multiple: int, offset: int = 0) -> list[int]:
    """Return the one or two `k * multiple + offset` (k >= 1, or k >= 0 with an offset) nearest around `value`."""
    smallest = offset or multiple
    below = (value - offset) // multiple * multiple + offset
    return sorted({max(below, smallest), max(below + multiple, smallest)})


def require_multiple(name: str, value: int, multiple: int, offset: int = 0) -> None:
    """Raise RequestError, which names the nearest, unless the value is `k * multiple + offset`."""
    nearest = " or ".join(map(str, nearest_multiples(value, multiple, offset)))
    expected = f"{multiple}k + {offset}" if offset else f"a multiple of {multiple}"
    require((value - offset) % multiple == 0, f"{name}={value}: expected {expected}; the nearest is {nearest}")


def _require_text(name: str, value: Any, expected: str, empty: bool = False) -> None:
    shown = "null" if value is None else repr(value) if len(repr(value)) < 100 else f"{repr(value)[:80]}..."
    require(isinstance(value, str) and (empty or bool(value.strip())), f"{name}={shown}: expected {expected}")
    is_text = "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)
    require(is_text, f"{name}={shown}: holds a NUL or half a surrogate pair; expected Unicode text")


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """Arguments of `splash_attn.attention`. None leaves a choice to it: by platform, by its tuned entries."""

    implementation: Implementation | None = None
    k_smooth: bool = True
    block_sizes: BlockSizes | None = None
    variant: Variant | None = None
    qk_dtype: QkDtype | None = None

    def __post_init__(self) -> None:
        if self.implementation is not None:
            require_choice("attention.implementation", self.implementation, Implementation)
        if self.qk_dtype is not None:
            require_choice("attention.qk_dtype", self.qk_dtype, QkDtype)
        flag = self.k_smooth
        require(isinstance(flag, bool), f"attention.k_smooth={flag!r}: expected true or false")


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """A LoRA and how strongly it is applied (0: not).

    path: "tiny-outline" of this package, a file of safetensors, or a folder that PEFT has written.
    """

    path: str
    strength: float = 1.0

    def __post_init__(self) -> None:
        _require_text("lora", self.path, "tiny-outline, a file of safetensors, or PEFT's folder")
        require_number(
            f"lora={self.path!r}: strength", self.strength, -limits.MAX_STRENGTH, limits.MAX_STRENGTH, int | float
        )


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """One video.

    prompt: may be empty. checkpoint: "tiny", "tiny-i2v", "tiny-random", a folder in diffusers layout, or a Hub id.
    revision: of a Hub id. height, width: pixels, multiples of 16. num_frames: 8k + 1. guidance_scale: classifier-
    free guidance, off at 1 or below. fps: frames a second of the mp4. dtype: of weights and activations. scheduler:
    the checkpoint's own, or a CogVideoX scheduler built from its configuration. What is left out, or None, is as
    `pipeline.requests.models` says for the checkpoint.

    image: a file, the first frame, for image-to-video models. noise_aug_strength: deviation of noise on the image,
    whose values are from -1 to 1. video: a file whose first num_frames frames are made anew. strength: the part of the
    denoising steps that a video is put through. latents: a file of safetensors, the initial noise instead of that of
    the seed. lora: merged into the transformer's weights. transformer: a file of safetensors with the transformer's
    weights instead of the checkpoint's. context_frames: as many frames as the model sees at a time, 8k + 1, in windows
    that overlap by context_overlap frames, a multiple of 8; None: all. quality: a preset of
    `pipeline.requests.reuse` for what attention and cache leave open; "exact": nothing is approximated that they do not
    name. Raises RequestError.
    """

    prompt: str
    checkpoint: str = "tiny"
    negative_prompt: str = ""
    revision: str | None = None
    height: int = _OF_MODEL
    width: int = _OF_MODEL
    num_frames: int = _OF_MODEL
    num_inference_steps: int = _OF_MODEL
    guidance_scale: float = _OF_MODEL
    use_dynamic_cfg: bool = _OF_MODEL
    seed: int = 42
    fps: float = _OF_MODEL
    dtype: Dtype = _OF_MODEL
    scheduler: Scheduler = _OF_MODEL
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)
    image: str | None = None
    noise_aug_strength: float = 0.0
    video: str | None = None
    strength: float = 0.8
    latents: str | None = None
    lora: tuple[LoraFile, ...] = ()
    transformer: str | None = None
    context_frames: int | None = None
    context_overlap: int = 16
    quality: Quality = "exact"
    cache: CacheOptions = dataclasses.field(default_factory=CacheOptions)
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name, value in fill_in_defaults(vars(self)).items():
            object.__setattr__(self, name, value)
        _require_text("prompt", self.prompt, 'some text, e.g. prompt="a red circle moves right"', empty=True)
        _require_text("negative_prompt", self.negative_prompt, "text (empty for none)", empty=True)
        _require_text("checkpoint", self.checkpoint, "tiny, tiny-i2v, tiny-random, a folder, or a Hub id")
        if self.revision is not None:
            _require_text("revision", self.revision, "a branch, tag or commit of a Hub id")
        for name in ("height", "width"):
            require_number(name, getattr(self, name), 1, limits.MAX_SIDE)
            require_multiple(name, getattr(self, name), limits.SIZE_MULTIPLE)
        require_number("num_frames", self.num_frames, 1, limits.MAX_FRAMES)
        require_multiple("num_frames", self.num_frames, limits.FRAME_MULTIPLE, 1)
        require_number("num_inference_steps", self.num_inference_steps, 1, limits.MAX_STEPS)
        require_number("guidance_scale", self.guidance_scale, 0, limits.MAX_GUIDANCE, int | float)
        flag = self.use_dynamic_cfg
        require(isinstance(flag, bool), f"use_dynamic_cfg={flag!r}: expected true or false")
        require_number("seed", self.seed, 0, 2**63 - 1)
        require_number("fps", self.fps, 1, limits.MAX_FPS, int | float)
        if self.fps == int(self.fps):
            object.__setattr__(self, "fps", int(self.fps))  # 16.0 of a command line: in names and records as 16
        require_choice("dtype", self.dtype, Dtype)
        require_choice("scheduler", self.scheduler, Scheduler)
        require_choice("quality", self.quality, Quality)
        if self.quantization is not None:
            require_choice("quantization", self.quantization, Quantization)
        self._check_inputs()

    def _check_inputs(self) -> None:
        """Raise RequestError for an image, a video, latents or a LoRA that cannot be, or not together."""
        for name in ("image", "video", "latents", "transformer"):
            if getattr(self, name) is not None:
                _require_text(name, getattr(self, name), "the path of a file, or null")
        given = [name for name in ("image", "video") if getattr(self, name) is not None]
        require(len(given) < 2, f"image={self.image!r} and video={self.video!r}: expected one of them")
        require(self.video is None or self.latents is None, "video and latents: a video is the initial latents itself")
        require_number("noise_aug_strength", self.noise_aug_strength, 0, 1, int | float)
        require_number("strength", self.strength, 0, 1, int | float)
        if self.noise_aug_strength:
            require(self.image is not None, f"noise_aug_strength={self.noise_aug_strength}: expected image=..., too")
        if self.context_frames is None:
            require_number("context_overlap", self.context_overlap, 0, limits.MAX_FRAMES)
        else:
            require_number("context_frames", self.context_frames, 1, limits.MAX_FRAMES)
            require_multiple("context_frames", self.context_frames, limits.FRAME_MULTIPLE, 1)
            require_number("context_overlap", self.context_overlap, 0, self.context_frames - 1)
            require_multiple("context_overlap", self.context_overlap, limits.FRAME_MULTIPLE)
            require(self.image is None, "context_frames and image: only the first window would see the image")
        if self.video is not None and self.steps_left_out == self.num_inference_steps:
            steps = self.num_inference_steps
            raise RequestError(
                f"strength={self.strength}: leaves none of {steps} steps; expected {1 / steps:g} or more"
            )

    @property
    def int8_linears(self) -> bool:
        """Return whether the linears of the transformer's blocks are computed in int8: as asked, or as quality says."""
        return self.quantization == "int8" or (self.quantization is None and PRESETS[self.quality].int8)

    @property
    def steps_left_out(self) -> int:
        """Return how many of the first denoising steps a video is not put through (as diffusers); else 0."""
        steps = self.num_inference_steps
        return 0 if self.video is None else steps - min(int(steps * self.strength), steps)

    @property
    def encodes(self) -> bool:
        """Return whether the VAE's encoder is needed."""
        return self.image is not None or self.video is not None

    @property
    def prompts(self) -> list[str]:
        """Return what the text stage encodes: the negative prompt and the prompt with guidance, else the prompt."""
        return [self.negative_prompt, self.prompt] if self.do_classifier_free_guidance else [self.prompt]

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Return whether the negative prompt is used at all (as diffusers: guidance above 1)."""
        return self.guidance_scale > 1.0


def to_request(config: GenerateConfig) -> GenerateRequest:
    """Return the checked request of a resolved configuration. Raises RequestError."""
    options = dict(vars(config.attention))
    for name, kind in (("block_sizes", BlockSizes), ("variant", Variant)):
        options[name] = _of_fields(f"attention.{name}", options[name], kind)
    attention = AttentionOptions(**options)
    names = {field.name for field in dataclasses.fields(GenerateRequest)} - {"attention", "cache", "lora"}
    fields = fill_in_defaults({name: getattr(config, name) for name in names}, config.model)
    cache = CacheOptions(**vars(config.cache))
    return GenerateRequest(**fields, attention=attention, cache=cache, lora=parse_lora(config.lora))


def _of_fields(key: str, value: Any, kind: type[T]) -> T | None:
    """Return a mapping of a dataclass's fields as one, None as None. Raises RequestError."""
    if value is None:
        return None
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    known = {field.name for field in fields}
    if not isinstance(value, Mapping) or set(value) - known or needed - set(value):
        names = ", ".join(f"{field.name}: ..." for field in fields)
        some = "" if needed == known else "some of "
        raise RequestError(f"{key}={value!r}: expected {some}{{{names}}}, or null")
    try:
        return kind(**value)
    except ValueError as error:  # whose text begins with the field
        raise RequestError(f"{key}.{error}") from error


def parse_lora(value: Any) -> tuple[LoraFile, ...]:
    """Parse LoRAs: None, a path, "path:strength", or a list of these. Raises RequestError."""
    entries = [] if value is None else value if isinstance(value, list | tuple) else [value]
    return tuple(entry if isinstance(entry, LoraFile) else _parse_one_lora(entry) for entry in entries)


def _parse_one_lora(text: Any) -> LoraFile:
    _require_text("lora", text, "path or path:strength, or a list of them")
    path, colon, strength = text.rpartition(":")
    if not colon or not strength or set(strength) & set("/\\") or strength.endswith(".safetensors"):
        return LoraFile(text)
    try:
        number = float(strength)
    except ValueError as error:
        raise RequestError(f"lora={text!r}: {strength!r} is no strength; expected path:1.0") from error
    return LoraFile(path, number)


def parse_stages(stages: str | list[str] | tuple[str, ...]) -> tuple[Stage, ...]:
    """Parse stage names, as "text,denoise" or a sequence, into the order they run. Raises RequestError."""
    names = [name.strip() for name in stages.split(",")] if isinstance(stages, str) else list(stages)
    unknown = [name for name in names if name not in STAGES]
    require(
        bool(names) and not unknown,
        f"stages={','.join(map(str, names))}: expected some of {','.join(STAGES)}"
        + (f"; unknown: {', '.join(map(repr, unknown))}" if unknown else ""),
    )
    twice = len(set(names)) < len(names)
    require(not twice, f"stages={','.join(names)}: expected each of {','.join(STAGES)} at most once")
    return tuple(stage for stage in STAGES if stage in names)
