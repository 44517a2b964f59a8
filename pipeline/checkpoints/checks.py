"""Checks of checkpoint and request that need configurations and headers only, made before any weight is read."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.loading import (
    STAGE_PARTS,
    Checkpoint,
    build_module,
    find_weights,
    resolve_checkpoint,
    with_defaults,
)
from pipeline.checkpoints.lora import check_loras
from pipeline.checkpoints.published import COGVIDEOX_1_5_5B, PUBLISHED_CONFIGS
from pipeline.checkpoints.quantized import check_quantized, is_quantized
from pipeline.checkpoints.weight_files import (
    STEMS,
    cached_folder,
    files_on_hub,
    own_names,
    require_on_hub,
    weight_files,
    weight_shapes,
)
from pipeline.model.latents import LatentGeometry
from pipeline.model.noise_schedule import build_scheduler, step_table
from pipeline.model.transformer import TransformerShape
from pipeline.model.vae.decoder import DecoderShape
from pipeline.model.vae.layers import DECODER_PREFIXES, ENCODER_PREFIXES, NORM_EPS
from pipeline.requests.errors import CheckpointError, PipelineError, RequestError
from pipeline.requests.limits import MAX_FRAMES
from pipeline.requests.media import read_latents
from pipeline.requests.models import MODELS
from pipeline.requests.request import GenerateRequest, LoraFile, Stage, require_multiple
from splash_workbench.files import user_path

logger = logging.getLogger(__name__)

#: Part -> its configuration, with the library's defaults.
Configs = Mapping[str, dict[str, Any]]
_CLASSES = {"transformer": "CogVideoXTransformer3DModel", "vae": "AutoencoderKLCogVideoX"}
_SUPPORTED = f"supported here: CogVideoX, {', '.join(f'model={model}' for model in MODELS)}"


def checkpoint_of(request: GenerateRequest, cache_dir: Path | None) -> Checkpoint:
    """Return the checkpoint that a request names, see `resolve_checkpoint`. Raises CheckpointError."""
    return resolve_checkpoint(request.checkpoint, request.revision, cache_dir, request.transformer)


def part_configs(name: str, find: Callable[[], Checkpoint]) -> tuple[Configs, Checkpoint | None]:
    """Return the configurations of a checkpoint's parts, and the checkpoint; None where they are built in.

    find: called only for a checkpoint that is not published here, so that nothing is fetched for the others. Raises
    CheckpointError.
    """
    if name in PUBLISHED_CONFIGS:
        return {part: with_defaults(part, config) for part, config in PUBLISHED_CONFIGS[name].items()}, None
    checkpoint = find()
    return read_configs(checkpoint), checkpoint


def read_configs(checkpoint: Checkpoint) -> Configs:
    """Read the configurations of all parts. Raises CheckpointError unless they make a model that runs here.

    Also where the transformer's weights are in a file of their own that does not fit.
    """
    pipeline = checkpoint.pipeline_class()
    if pipeline is not None and not str(pipeline).startswith("CogVideoX"):
        raise checkpoint.error(f"this is a {pipeline}; {_SUPPORTED}")
    transformer = checkpoint.config("transformer")
    if transformer.get("_class_name") != _CLASSES["transformer"]:
        raise checkpoint.error(f"transformer/config.json {_class_of(transformer)}; {_SUPPORTED}")
    configs = {part: checkpoint.config(part) for part in COGVIDEOX_1_5_5B}
    try:
        _check_parts(configs)
    except CheckpointError as error:
        raise checkpoint.error(str(error)) from error
    if checkpoint.transformer is not None:
        module = _module("transformer", configs)
        if is_quantized(checkpoint.transformer):
            check_quantized(checkpoint.transformer, weight_shapes(module))
        else:
            find_weights(checkpoint, "transformer", module)
    return configs


def check_weights(checkpoint: Checkpoint, configs: Configs, stages: Sequence[Stage], encodes: bool) -> None:
    """Raise CheckpointError where weights that are here do not fit their part's configuration, from the headers.

    Or where they are neither here nor on the Hub, which is asked for the names of its files, and for nothing else: what
    is still to be fetched is checked by the stage that loads it. configs: by `read_configs`, which has checked a
    transformer's file of its own. stages: whose weights are wanted. encodes: whether the VAE's encoder is, too.
    """
    halves = DECODER_PREFIXES + (ENCODER_PREFIXES if encodes else ())  # some checkpoints leave out the encoder

    def is_wanted(name: str) -> bool:
        return name.startswith(halves)

    for part in (part for stage in stages for part in STAGE_PARTS[stage] if part in STEMS):
        if part == "transformer" and checkpoint.transformer is not None:
            continue
        here = checkpoint if checkpoint.folder is not None else _from_cache(checkpoint, part)
        if here is None:
            continue
        module = _module(part, configs)
        if part == "vae":
            find_weights(here, part, module, is_wanted)
        else:
            find_weights(here, part, module)


def _from_cache(checkpoint: Checkpoint, part: str) -> Checkpoint | None:
    """Return a checkpoint of the Hub as a local one where all weights of a part are in its cache; None where not.

    Raises CheckpointError where they are not on the Hub either, or it does not answer.
    """
    assert checkpoint.repo_id is not None
    folder, where = cached_folder(checkpoint.repo_id, checkpoint.commit), checkpoint.where(part)
    if folder is None:
        return None
    local = dataclasses.replace(checkpoint, folder=folder)
    problem: CheckpointError | None = None
    try:
        if not (folder / part).is_dir():
            raise CheckpointError(f"{where} holds no weights; expected {STEMS[part]}.safetensors")
        weight_files(folder / part, part, where)
        if any((folder / part / name).is_file() for name in own_names(part)):
            return local  # others may only be there for want of these
    except CheckpointError as error:
        problem = error
    names = files_on_hub(checkpoint.repo_id, checkpoint.commit)
    if names is not None:
        require_on_hub(part, names, where)
        return None
    if problem is None:
        return local
    raise CheckpointError(
        f"{problem} (in the Hub's cache, {folder}, and the Hub does not answer: expected the network, without "
        "HF_HUB_OFFLINE, or a folder that holds the checkpoint)"
    ) from problem


def _module(part: str, configs: Configs) -> Any:
    """Return a part's stock module, without storage."""
    return _stock_module(part, json.dumps(configs[part]))


@functools.lru_cache(maxsize=6)  # three parts of two checkpoints
def _stock_module(part: str, config: str) -> Any:
    return build_module(part, json.loads(config), torch.float32)


def _class_of(config: Mapping[str, Any]) -> str:
    name = config.get("_class_name")
    return f"is for {name!r}" if name else "has no _class_name"


def _check_parts(configs: Configs) -> None:
    for part in ("text_encoder", "transformer", "vae"):
        config = configs[part]
        if part in _CLASSES and config.get("_class_name") != _CLASSES[part]:
            raise CheckpointError(f"{part}/config.json {_class_of(config)}, expected {_CLASSES[part]!r}")
        if part == "text_encoder" and config.get("model_type", "t5") != "t5":
            raise CheckpointError(f"text_encoder/config.json is for {config['model_type']!r}, expected 't5'")
        _check_numbers(part, config)
        try:
            _module(part, configs)
        except Exception as error:  # whatever a library makes of a value that it does not expect
            problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(f"{part}/config.json: {problem}") from error
    transformer, vae = configs["transformer"], configs["vae"]
    TransformerShape.from_config(transformer)
    DecoderShape.from_config(vae)
    for name, other, expected in (
        ("text_embed_dim", "text_encoder/config.json: d_model", _module("text_encoder", configs).config.d_model),
        ("out_channels", "vae/config.json: latent_channels", vae["latent_channels"]),
    ):
        if transformer[name] != expected:
            raise CheckpointError(f"transformer/config.json: {name}={transformer[name]}, but {other}={expected}")


def _check_numbers(part: str, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError where the library's default is a number and something else is given."""
    from transformers import T5Config

    defaults = T5Config().to_dict() if part == "text_encoder" else with_defaults(part, {})
    for name, default in defaults.items():
        value = config.get(name)
        if _is_number(default) and value is not None and not _is_number(value):
            kind = "a whole number" if isinstance(default, int) else "a number"
            raise CheckpointError(f"{part}/config.json: {name}={value!r}, expected {kind}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_request(request: GenerateRequest, configs: Configs) -> None:
    """Check a request against the configurations of its checkpoint; warn of a size that it was not trained for.

    Of LoRAs and latents the headers are read. Raises RequestError, or CheckpointError for a LoRA that does not fit or a
    scheduler that does not run here.
    """
    transformer, vae = configs["transformer"], configs["vae"]
    shape = TransformerShape.from_config(transformer)
    _check_source(request, shape)
    spatial = DecoderShape.from_config(vae).spatial_factor
    for name in ("height", "width"):
        value, size = getattr(request, name), transformer[f"sample_{name}"] * spatial
        require_multiple(name, value, spatial * shape.patch_size)
        limit = size // (spatial * shape.patch_size) * spatial * shape.patch_size
        if transformer["patch_size_t"] is not None and shape.rotary and value > limit:
            raise RequestError(
                f"{name}={value}: the rotary table of checkpoint={request.checkpoint!r} ends at {limit}; expected "
                f"{name}={limit} or less"
            )
        if shape.learned_positions and value != size:
            raise RequestError(
                f"{name}={value}: checkpoint={request.checkpoint!r} has learned positions, for {name}={size} only"
            )
    require_multiple("num_frames", request.num_frames, vae["temporal_compression_ratio"], 1)
    _check_frames(request, transformer, shape)
    if request.encodes and vae["norm_eps"] != NORM_EPS:
        problem = f"vae/config.json: norm_eps={vae['norm_eps']}, expected {NORM_EPS} to encode"
        raise CheckpointError(f"checkpoint={request.checkpoint!r}: {problem}")
    if request.latents is not None:
        read_latents(request.latents, LatentGeometry.from_request(request, transformer, vae).shape)
    check_transformer(request.transformer, request.int8_linears, request.lora, transformer, request.checkpoint)
    try:
        _check_schedule(json.dumps(configs["scheduler"]), request.scheduler, request.num_inference_steps)
    except CheckpointError as error:
        file = f"checkpoint={request.checkpoint!r}: scheduler/scheduler_config.json"
        raise CheckpointError(f"{file}: {error}") from error
    if warning := size_warning(request):
        _warn_once(warning)


def check_transformer(
    path: str | None, int8: bool, loras: Sequence[LoraFile], config: Mapping[str, Any], checkpoint: str
) -> None:
    """Raise RequestError or CheckpointError for LoRAs, or a file of weights, that cannot be used so."""
    if path is not None and is_quantized(user_path(path)):
        if not int8:
            raise RequestError(f"transformer={path!r}: its weights are int8; expected quantization=int8, too")
        if loras:
            raise RequestError(
                f"transformer={path!r} and lora={loras[0].path!r}: nothing is merged into int8 weights; expected the "
                "LoRA to be merged when they are made, python -m pipeline.quantize lora=..."
            )
    if loras:
        module = _module("transformer", {"transformer": dict(config)})
        check_loras(loras, weight_shapes(module), f"checkpoint={checkpoint!r}")


def _check_source(request: GenerateRequest, shape: TransformerShape) -> None:
    """Raise RequestError for an image or video that the model cannot begin with, or for want of one."""
    of = f"checkpoint={request.checkpoint!r}"
    if shape.takes_image and request.image is None:
        instead = "image=path" if request.video is None else "image=path instead of video, which a text model takes"
        raise RequestError(f"image=null: {of} is an image-to-video model; expected {instead}")
    if request.image is not None and not shape.takes_image:
        names = " or ".join(f"model={model}" for model in MODELS if model.endswith("-i2v"))
        raise RequestError(f"image={request.image!r}: {of} is a text-to-video model; expected {names}")


def _check_frames(request: GenerateRequest, transformer: Mapping[str, Any], shape: TransformerShape) -> None:
    """Raise RequestError for more frames than CogVideoX 1.0 was made for, or others than learned positions are for."""
    frames, limit = min(request.num_frames, request.context_frames or MAX_FRAMES), transformer["sample_frames"]
    of = f"num_frames={frames}: checkpoint={request.checkpoint!r}"
    if shape.learned_positions and frames != limit:
        raise RequestError(f"{of} has learned positions, for num_frames={limit} only")
    if transformer["patch_size_t"] is None and frames > limit:
        raise RequestError(
            f"{of} is for {limit} frames; expected num_frames={limit} or less, or context_frames={limit}"
        )


@functools.lru_cache
def _check_schedule(config: str, scheduler: str, num_inference_steps: int) -> None:
    try:
        step_table(build_scheduler(json.loads(config), scheduler), num_inference_steps)
    except PipelineError:
        raise
    except Exception as error:  # whatever diffusers makes of a value that it does not expect
        raise CheckpointError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def size_warning(request: GenerateRequest) -> str | None:
    """Return what to say of a video of another size than the checkpoint's model was trained for; None of all others."""
    size = request.width, request.height, request.num_frames
    for model, trained in MODELS.items():
        width, height, num_frames = sizes = trained.width, trained.height, trained.num_frames
        if trained.one_size and trained.checkpoint == request.checkpoint and size != sizes:
            return (
                f"{size[0]}x{size[1]}, {size[2]} frames: model {model} was trained on {width}x{height}, {num_frames} "
                f"frames (width x height), and shows little else; try {height=} {width=} {num_frames=}"
            )
    return None


@functools.cache
def _warn_once(warning: str) -> None:
    logger.warning(warning)
