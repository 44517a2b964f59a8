"""Checks of checkpoint and request that need configurations only, made before any weight is read."""

import functools
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipeline.checkpoints.loading import Checkpoint, build_module, with_defaults
from pipeline.checkpoints.published import COGVIDEOX_1_5_5B, PUBLISHED_CONFIGS
from pipeline.model.noise_schedule import build_scheduler, step_table
from pipeline.model.transformer import TransformerShape
from pipeline.model.vae_decoder import DecoderShape
from pipeline.requests.errors import CheckpointError, PipelineError, RequestError
from pipeline.requests.models import MODELS
from pipeline.requests.request import GenerateRequest, require_multiple

logger = logging.getLogger(__name__)

#: Part -> its configuration, with the library's defaults.
Configs = Mapping[str, dict[str, Any]]
_CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
_SUPPORTED = "supported here: CogVideoX 1.5, text to video, e.g. model=cogvideox1.5-5b"


def part_configs(checkpoint: str, find: Callable[[], Checkpoint]) -> tuple[Configs, str]:
    """Return the configurations of a checkpoint's parts, and where they are from: "built in" or "checkpoint".

    find: called only for a checkpoint that is not published here, so that nothing is fetched for the others. Raises
    CheckpointError.
    """
    if checkpoint in PUBLISHED_CONFIGS:
        return {part: with_defaults(part, config) for part, config in PUBLISHED_CONFIGS[checkpoint].items()}, "built in"
    return read_configs(find()), "checkpoint"


def read_configs(checkpoint: Checkpoint) -> Configs:
    """Read the configurations of all parts. Raises CheckpointError unless they make a model that runs here."""
    pipeline = checkpoint.pipeline_class()
    if pipeline is not None and not str(pipeline).startswith("CogVideoX"):
        raise checkpoint.error(f"this is a {pipeline}; {_SUPPORTED}")
    transformer = checkpoint.config("transformer")
    if transformer.get("_class_name") != _CLASSES["transformer"]:
        raise checkpoint.error(f"transformer/config.json is for {transformer.get('_class_name')!r}; {_SUPPORTED}")
    if kind := _other_kind(transformer):
        raise checkpoint.error(f"this is a {kind}; {_SUPPORTED}")
    configs = {part: checkpoint.config(part) for part in COGVIDEOX_1_5_5B}
    try:
        _check_parts(configs)
    except CheckpointError as error:
        raise checkpoint.error(str(error)) from error
    return configs


def _other_kind(transformer: Mapping[str, Any]) -> str | None:
    """Name the CogVideoX of a transformer/config.json, None for 1.5 text to video."""
    if not transformer["use_rotary_positional_embeddings"]:
        return "CogVideoX-2b checkpoint (CogVideoX 1.0, positions added, not rotary)"
    from_image = (
        transformer["in_channels"] != transformer["out_channels"]
        or transformer["ofs_embed_dim"] is not None
        or transformer["use_learned_positional_embeddings"]
    )
    kind = "-I2V checkpoint (image to video" if from_image else " checkpoint (text to video"
    if transformer["patch_size_t"] is None:
        return f"CogVideoX-5b{kind}, CogVideoX 1.0: no patch_size_t)"
    return f"CogVideoX1.5-5B{kind}, in_channels={transformer['in_channels']})" if from_image else None


def _check_parts(configs: Configs) -> None:
    modules: dict[str, Any] = {}
    for part in ("text_encoder", "transformer", "vae"):
        config = configs[part]
        if part in _CLASSES and config.get("_class_name") != _CLASSES[part]:
            raise CheckpointError(f"{part}/config.json is for {config.get('_class_name')!r}, not {_CLASSES[part]!r}")
        if part == "text_encoder" and config.get("model_type", "t5") != "t5":
            raise CheckpointError(f"text_encoder/config.json is for {config['model_type']!r}, expected 't5'")
        try:
            modules[part] = build_module(part, config, torch.float32)
        except Exception as error:  # whatever a library makes of a value that it does not expect
            raise _unexpected(f"{part}/config.json", error) from error
    transformer, vae = configs["transformer"], configs["vae"]
    TransformerShape.from_config(transformer)
    DecoderShape.from_config(vae)
    for name, other, expected in (
        ("text_embed_dim", "text_encoder/config.json: d_model", modules["text_encoder"].config.d_model),
        ("in_channels", "vae/config.json: latent_channels", vae["latent_channels"]),
    ):
        if transformer[name] != expected:
            raise CheckpointError(f"transformer/config.json: {name}={transformer[name]}, but {other}={expected}")


def _unexpected(file: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file}: {type(error).__name__}: {' '.join(str(error).split())}")


def check_request(request: GenerateRequest, configs: Configs) -> None:
    """Check a request against the configurations of its checkpoint; warn of a size that it was not trained for.

    Raises RequestError, or CheckpointError for a scheduler that does not run here.
    """
    patch_size, vae = configs["transformer"]["patch_size"], configs["vae"]
    multiple = DecoderShape.from_config(vae).spatial_factor * patch_size
    for name in ("height", "width"):
        value, limit = getattr(request, name), configs["transformer"][f"sample_{name}"] // patch_size * multiple
        require_multiple(name, value, multiple)
        if value > limit:
            raise RequestError(
                f"{name}={value}: the rotary table of checkpoint={request.checkpoint!r} ends at {limit}; expected "
                f"{name}={limit} or less"
            )
    require_multiple("num_frames", request.num_frames, vae["temporal_compression_ratio"], 1)
    _check_schedule(json.dumps(configs["scheduler"]), request.scheduler, request.num_inference_steps)
    _warn_of_size(request.checkpoint, request.width, request.height, request.num_frames)


@functools.lru_cache
def _check_schedule(config: str, scheduler: str, num_inference_steps: int) -> None:
    try:
        step_table(build_scheduler(json.loads(config), scheduler), num_inference_steps)
    except PipelineError:
        raise
    except Exception as error:  # whatever diffusers makes of a value that it does not expect
        raise _unexpected("scheduler/scheduler_config.json", error) from error


@functools.cache
def _warn_of_size(checkpoint: str, *size: int) -> None:
    """Warn, once a size (width, height, frames), of a video that the checkpoint's model was not trained for."""
    for model, trained in MODELS.items():
        width, height, num_frames = sizes = trained.width, trained.height, trained.num_frames
        if trained.one_size and trained.checkpoint == checkpoint and size != sizes:
            logger.warning(
                f"{size[0]}x{size[1]}, {size[2]} frames: model {model} was trained on {width}x{height}, {num_frames} "
                f"frames (width x height), and shows little else; try {height=} {width=} {num_frames=}"
            )
