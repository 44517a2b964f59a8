"""The request for one video, checked once, before any work."""

import dataclasses
from typing import Any, Literal, get_args

from pipeline.requests.errors import RequestError
from pipeline.requests.models import fill_in_defaults
from splash_attn.api import Implementation
from splash_attn.types import BlockSizes, QkDtype, Variant

SIZE_MULTIPLE = 16  # 8 pixels a latent (VAE) times 2 latents a patch (transformer)
FRAME_MULTIPLE = 8  # 4 frames a latent (VAE) times 2 latents a patch (transformer, patch_size_t)
MAX_SIDE = 4096
MAX_FRAMES = 1001
MAX_GUIDANCE = 1000

Stage = Literal["text", "denoise", "vae"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Dtype = Literal["float32", "bfloat16"]
Scheduler = Literal["checkpoint", "ddim", "dpm"]
_OF_MODEL: Any = None  # filled in by __post_init__


def nearest_multiples(value: int, multiple: int, offset: int = 0) -> list[int]:
    """Return the one or two `k * multiple + offset` (k >= 1, or k >= 0 with an offset) nearest around `value`."""
    smallest = offset or multiple
    below = (value - offset) // multiple * multiple + offset
    return sorted({max(below, smallest), max(below + multiple, smallest)})


def _names(values: list[int]) -> str:
    return " or ".join(str(value) for value in values)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)


def _require_choice(name: str, value: Any, choices: Any) -> None:
    allowed = get_args(choices)
    _require(value in allowed, f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")


def _require_int(name: str, value: Any, low: int, high: int) -> None:
    is_int = isinstance(value, int) and not isinstance(value, bool)
    _require(is_int and low <= value <= high, f"{name}={value!r}: expected a whole number from {low} to {high}")


def _require_text(name: str, value: Any, expected: str) -> None:
    _require(isinstance(value, str), f"{name}={value!r}: expected {expected}")
    try:
        whole = "\0" not in value and bool(value.encode())
    except UnicodeEncodeError:
        whole = False
    _require(whole or not value, f"{name}={value!r}: holds a NUL or half a surrogate pair; expected Unicode text")


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """How `splash_attn.attention` is called. None leaves a choice to it: by platform, by its tuned entries."""

    implementation: Implementation | None = None
    k_smooth: bool = True
    block_sizes: BlockSizes | None = None
    variant: Variant | None = None
    qk_dtype: QkDtype | None = None

    def __post_init__(self) -> None:
        if self.implementation is not None:
            _require_choice("attention.implementation", self.implementation, Implementation)
        if self.qk_dtype is not None:
            _require_choice("attention.qk_dtype", self.qk_dtype, QkDtype)
        flag = self.k_smooth
        _require(isinstance(flag, bool), f"attention.k_smooth={flag!r}: expected true or false")


@dataclasses.dataclass(frozen=True)
class GenerateRequest:
    """One video.

    checkpoint: "tiny", "tiny-random", a folder in diffusers layout, or a Hub id. revision: of a Hub id. height, width:
    pixels, multiples of 16. num_frames: 8k + 1. guidance_scale: classifier-free guidance, off at 1 or below. fps:
    frames a second of the mp4. dtype: of weights and activations. scheduler: the checkpoint's own, or a CogVideoX
    scheduler built from its configuration. What is left out, or None, is as `pipeline.requests.models` says for the
    checkpoint. Raises RequestError.
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
    fps: int = _OF_MODEL
    dtype: Dtype = _OF_MODEL
    scheduler: Scheduler = _OF_MODEL
    attention: AttentionOptions = dataclasses.field(default_factory=AttentionOptions)

    def __post_init__(self) -> None:
        for name, value in fill_in_defaults(vars(self)).items():
            object.__setattr__(self, name, value)
        prompt, checkpoint = (
            'some text, e.g. prompt="a red circle moves right"',
            "tiny, tiny-random, a folder, or a Hub id",
        )
        _require_text("prompt", self.prompt, prompt)
        _require(bool(self.prompt.strip()), f"prompt={self.prompt!r}: expected {prompt}")
        _require_text("negative_prompt", self.negative_prompt, "text (empty for none)")
        _require_text("checkpoint", self.checkpoint, checkpoint)
        _require(bool(self.checkpoint.strip()), f"checkpoint={self.checkpoint!r}: expected {checkpoint}")
        if self.revision is not None:
            _require_text("revision", self.revision, "a branch, tag or commit of a Hub id")
        for name in ("height", "width"):
            value = getattr(self, name)
            _require_int(name, value, 1, MAX_SIDE)
            _require(
                value % SIZE_MULTIPLE == 0,
                f"{name}={value}: expected a multiple of {SIZE_MULTIPLE}; "
                f"the nearest is {_names(nearest_multiples(value, SIZE_MULTIPLE))}",
            )
        _require_int("num_frames", self.num_frames, 1, MAX_FRAMES)
        _require(
            self.num_frames % FRAME_MULTIPLE == 1,
            f"num_frames={self.num_frames}: expected {FRAME_MULTIPLE}k + 1, so that (num_frames - 1) / 4 + 1 latent "
            f"frames are odd; the nearest is {_names(nearest_multiples(self.num_frames, FRAME_MULTIPLE, 1))}",
        )
        _require_int("num_inference_steps", self.num_inference_steps, 1, 1000)
        _require(
            isinstance(self.guidance_scale, int | float)
            and not isinstance(self.guidance_scale, bool)
            and 0 <= self.guidance_scale <= MAX_GUIDANCE,
            f"guidance_scale={self.guidance_scale!r}: expected a number from 0 to {MAX_GUIDANCE} "
            "(1 or less turns guidance off)",
        )
        flag = self.use_dynamic_cfg
        _require(isinstance(flag, bool), f"use_dynamic_cfg={flag!r}: expected true or false")
        _require_int("seed", self.seed, 0, 2**63 - 1)
        _require_int("fps", self.fps, 1, 240)
        _require_choice("dtype", self.dtype, Dtype)
        _require_choice("scheduler", self.scheduler, Scheduler)

    @property
    def prompts(self) -> list[str]:
        """What the text stage encodes: the negative prompt and the prompt with guidance, else the prompt."""
        return [self.negative_prompt, self.prompt] if self.do_classifier_free_guidance else [self.prompt]

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the negative prompt is used at all (as diffusers: guidance above 1)."""
        return self.guidance_scale > 1.0


def parse_stages(stages: str | list[str] | tuple[str, ...]) -> tuple[Stage, ...]:
    """Parse stage names, as "text,denoise" or a sequence, into the order they run. Raises RequestError."""
    names = [name.strip() for name in stages.split(",")] if isinstance(stages, str) else list(stages)
    unknown = [name for name in names if name not in STAGES]
    _require(
        bool(names) and not unknown,
        f"stages={','.join(map(str, names))}: expected some of {','.join(STAGES)}"
        + (f"; unknown: {', '.join(map(repr, unknown))}" if unknown else ""),
    )
    return tuple(stage for stage in STAGES if stage in names)
