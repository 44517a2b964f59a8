"""The models that have names, and the defaults of a request for each.

The command line (`model=`, see configs/model), batch files, the Python API and the ComfyUI nodes all take these.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class ModelDefaults:
    """A model's published checkpoint, and the request it was made for. one_size: other sizes show little."""

    checkpoint: str
    dtype: str
    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool = False
    scheduler: str = "checkpoint"
    one_size: bool = dataclasses.field(default=False, kw_only=True)


_AS_PUBLISHED: dict[str, Any] = {"dtype": "bfloat16", "num_inference_steps": 50, "guidance_scale": 6.0}
_480P: dict[str, Any] = {"height": 480, "width": 720, "num_frames": 49, "fps": 8, **_AS_PUBLISHED}  # CogVideoX 1.0
_TINY: dict[str, Any] = {
    **{"dtype": "float32", "height": 64, "width": 96, "num_frames": 17, "fps": 8},
    **{"num_inference_steps": 8, "guidance_scale": 1.5, "one_size": True},
}
MODELS: Mapping[str, ModelDefaults] = {
    # Come with the package, trained on drawn shapes of this size.
    "tiny": ModelDefaults("tiny", **_TINY),
    "tiny-i2v": ModelDefaults("tiny-i2v", **_TINY),
    # Each as published; the scheduler is the checkpoint's. About 6 s of 480p from CogVideoX 1.0, and about 5 s of 720p
    # or 768p from 1.5. Dynamic guidance is off: diffusers' feeds timesteps to a formula for step indices, and guidance
    # jumps.
    "cogvideox-2b": ModelDefaults("zai-org/CogVideoX-2b", **_480P),
    "cogvideox-5b": ModelDefaults("zai-org/CogVideoX-5b", **_480P),
    "cogvideox-5b-i2v": ModelDefaults("zai-org/CogVideoX-5b-I2V", **_480P),
    "cogvideox1.5-5b": ModelDefaults(
        "zai-org/CogVideoX1.5-5B", height=720, width=1280, num_frames=81, fps=16, **_AS_PUBLISHED
    ),
    "cogvideox1.5-5b-i2v": ModelDefaults(
        "zai-org/CogVideoX1.5-5B-I2V", height=768, width=1360, num_frames=81, fps=16, **_AS_PUBLISHED
    ),
}
_FORMER_OWNER, _OWNER = "THUDM/", "zai-org/"  # whose ids the Hub still takes
#: Fields of a request whose defaults are the model's.
MODEL_FIELDS = tuple(
    field.name for field in dataclasses.fields(ModelDefaults) if field.name not in ("checkpoint", "one_size")
)


def current_id(checkpoint: str) -> str:
    """Return a checkpoint's name, of one that the Hub has under a former owner, too, its present one."""
    if not isinstance(checkpoint, str):  # of a batch's line, say: the request refuses it, which has its defaults first
        return checkpoint
    return checkpoint.replace(_FORMER_OWNER, _OWNER, 1) if checkpoint.startswith(_FORMER_OWNER) else checkpoint


def model_defaults(checkpoint: str, model: str = "tiny") -> ModelDefaults:
    """Return the defaults of the model published as `checkpoint`; where it is none's (a folder), those of `model`."""
    checkpoint = current_id(checkpoint)
    return next((defaults for defaults in MODELS.values() if defaults.checkpoint == checkpoint), MODELS[model])


def fill_in_defaults(fields: Mapping[str, Any], model: str = "tiny") -> dict[str, Any]:
    """Return fields of a request with those of MODEL_FIELDS that are None set as `model_defaults` says."""
    defaults = model_defaults(fields["checkpoint"], model)
    return {**fields, **{name: getattr(defaults, name) for name in MODEL_FIELDS if fields[name] is None}}
