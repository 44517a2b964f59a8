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


MODELS: Mapping[str, ModelDefaults] = {
    # Comes with the package, trained on drawn shapes of this size.
    "tiny": ModelDefaults(
        "tiny",
        "float32",
        height=64,
        width=96,
        num_frames=17,
        fps=8,
        num_inference_steps=8,
        guidance_scale=1.5,
        one_size=True,
    ),
    # As published: bfloat16, about 5 s of 720p. Dynamic guidance is off: diffusers' feeds timesteps to a formula for
    # step indices, and guidance jumps.
    "cogvideox1.5-5b": ModelDefaults(
        "zai-org/CogVideoX1.5-5B",
        "bfloat16",
        height=720,
        width=1280,
        num_frames=81,
        fps=16,
        num_inference_steps=50,
        guidance_scale=6.0,
    ),
}
#: Fields of a request whose defaults are the model's.
MODEL_FIELDS = tuple(
    field.name for field in dataclasses.fields(ModelDefaults) if field.name not in ("checkpoint", "one_size")
)


def model_defaults(checkpoint: str, model: str = "tiny") -> ModelDefaults:
    """Return the defaults of the model published as `checkpoint`; where it is none's (a folder), those of `model`."""
    return next((defaults for defaults in MODELS.values() if defaults.checkpoint == checkpoint), MODELS[model])


def fill_in_defaults(fields: Mapping[str, Any], model: str = "tiny") -> dict[str, Any]:
    """Return fields of a request with those of MODEL_FIELDS that are None set as `model_defaults` says."""
    defaults = model_defaults(fields["checkpoint"], model)
    return {**fields, **{name: getattr(defaults, name) for name in MODEL_FIELDS if fields[name] is None}}
