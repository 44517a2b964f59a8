"""What leaves the pack and comes back: ComfyUI's own LATENT, and files of latents and embeddings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import host, settings
from .stages import GIVEN, Embeds, Latents

#: What ends the names of files of each kind.
SUFFIXES = {"embeddings": ".embeddings.safetensors", "latents": ".latents.safetensors"}
_FORMAT = "cogvideox-tpu 1"
_TENSOR = "tensor"


def to_native(latents: Latents) -> dict[str, torch.Tensor]:
    """Return ComfyUI's LATENT: "samples", float32 [1, channels, frames, height, width], as a VAE's, not scaled."""
    scale = latents.checkpoint.config("vae")["scaling_factor"]
    samples = torch.from_numpy(np.array(latents.latents, np.float32)) / scale
    return {"samples": samples.transpose(1, 2).contiguous()}


def from_native(latent: Mapping[str, Any], model_id: str, dtype: str) -> Latents:
    """Return a LATENT's samples as a model's latents. Raises RequestError for those of another shape or kind."""
    from pipeline.model.torchax_bridge import torch_to_numpy
    from pipeline.requests.errors import RequestError

    checkpoint, dtype = settings.find_checkpoint(model_id), settings.resolve_dtype(dtype, model_id)
    vae, samples = checkpoint.config("vae"), latent.get("samples") if isinstance(latent, Mapping) else latent
    channels = vae["latent_channels"]
    if not isinstance(samples, torch.Tensor) or not samples.is_floating_point() or not samples.isfinite().all():
        kind = samples.dtype if isinstance(samples, torch.Tensor) else type(samples).__name__
        raise RequestError(f"samples: {kind}, or not finite; expected a LATENT of finite floating-point numbers")
    if samples.ndim != 5 or samples.shape[0] != 1 or samples.shape[1] != channels:
        raise RequestError(
            f"samples: a LATENT of shape {list(samples.shape)}; expected [1, {channels}, frames, height, width], "
            "one video"
        )
    frames, height, width = samples.shape[2:]
    scaled = (samples.float().cpu() * vae["scaling_factor"]).transpose(1, 2).to(getattr(torch, dtype))
    request = _request(checkpoint, dtype, frames, height, width)
    return Latents(checkpoint, request, torch_to_numpy(scaled.contiguous()))


def _request(checkpoint: Any, dtype: str, frames: int, height: int, width: int, prompt: str = "") -> Any:
    """Return the request that latents of this size are of. Raises RequestError for a size that there is not."""
    from pipeline.checkpoints.checks import read_configs
    from pipeline.requests.request import GenerateRequest

    configs = read_configs(checkpoint)
    factor = 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    takes_image = configs["transformer"]["in_channels"] != configs["transformer"]["out_channels"]
    return GenerateRequest(
        prompt,
        checkpoint.name,
        height=height * factor,
        width=width * factor,
        num_frames=(frames - 1) * configs["vae"]["temporal_compression_ratio"] + 1,
        dtype=dtype,  # type: ignore[arg-type] # checked there
        image=GIVEN if takes_image else None,
    )


def save(value: Embeds | Latents, filename_prefix: str) -> str:
    """Write embeddings or latents under ComfyUI's output folder. Returns the file's name there.

    Raises RequestError for embeddings with an image, a video or LoRAs, which are not kept, and for a file that cannot
    be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from pipeline.model.torchax_bridge import numpy_to_torch
    from pipeline.requests.errors import RequestError

    if isinstance(value, Embeds):
        if value.image is not None or value.video is not None or value.loras:
            raise RequestError("embeddings: only prompts are kept; expected them from the text encoder itself")
        kind, stage, array = "embeddings", "text", value.prompts
        details = {"prompt": value.prompt, "negative_prompt": value.negative_prompt, "dtype": value.dtype}
    else:
        kind, stage, array = "latents", "vae", value.latents
        details = {"prompt": value.request.prompt, "dtype": value.request.dtype}
    details |= {"model_id": value.checkpoint.name, "weights": value.checkpoint.identities(stage)[stage]}
    metadata = {"format": _FORMAT, "kind": kind, "details": json.dumps(details)}
    try:
        path, name = host.path_to_save(filename_prefix, SUFFIXES[kind])
        save_file({_TENSOR: numpy_to_torch(np.array(array))}, path, metadata=metadata)
    except (SafetensorError, OSError, UnicodeError) as error:
        raise RequestError(f"filename_prefix={filename_prefix!r}: the file cannot be written ({error})") from error
    return name


def load(name: str, kind: str) -> Embeds | Latents:
    """Read what `save` has written. Raises RequestError for another file, or where the model has changed since."""
    from pipeline.model.torchax_bridge import torch_to_numpy
    from pipeline.requests.errors import RequestError

    path = host.saved_files(SUFFIXES[kind]).get(name)
    if path is None:
        raise RequestError(f"file={name!r}: expected a file *{SUFFIXES[kind]} in ComfyUI's output or input folder")
    tensor, details = _read(name, path, kind)
    checkpoint = settings.find_checkpoint(details["model_id"])
    stage: Any = "text" if kind == "embeddings" else "vae"
    if checkpoint.identities(stage)[stage] != details["weights"]:
        raise RequestError(f"file={name!r}: made with other weights of model_id={checkpoint.name!r}; make it again")
    if kind == "embeddings":
        transformer = checkpoint.config("transformer")
        expected = {1: transformer["max_text_seq_length"], 2: transformer["text_embed_dim"]}
    else:
        expected = {0: 1, 2: checkpoint.config("vae")["latent_channels"]}
    if any(tensor.shape[axis] != size for axis, size in expected.items()) or not tensor.isfinite().all():
        shape = ", ".join(str(expected.get(axis, "any")) for axis in range(tensor.ndim))
        raise RequestError(
            f"file={name!r}: a tensor {list(tensor.shape)} of {tensor.dtype}; expected [{shape}], all finite, "
            f"as model_id={checkpoint.name!r} has them"
        )
    array = torch_to_numpy(tensor)
    if kind == "embeddings":
        return Embeds(checkpoint, details["prompt"], details["negative_prompt"], details["dtype"], array)
    _, frames, _, height, width = array.shape
    request = _request(checkpoint, details["dtype"], frames, height, width, details["prompt"])
    return Latents(checkpoint, request, array)


def _read(name: str, path: Path, kind: str) -> tuple[torch.Tensor, dict[str, str]]:
    """Return a file's tensor and details, which are texts."""
    from safetensors import SafetensorError, safe_open

    from pipeline.requests.errors import RequestError

    expected = {"model_id", "weights", "dtype", "prompt", *(["negative_prompt"] if kind == "embeddings" else [])}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            details = json.loads(metadata["details"])
            if (metadata["format"], metadata["kind"], set(details)) != (_FORMAT, kind, expected):
                raise ValueError(f"holds {metadata['format']}, {metadata['kind']}")
            tensor = file.get_tensor(_TENSOR)
            if tensor.ndim != (3 if kind == "embeddings" else 5) or not all(
                isinstance(x, str) for x in details.values()
            ):
                raise ValueError(f"a tensor {list(tensor.shape)}")
            return tensor, details
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise RequestError(f"file={name!r}: not {kind} that this pack has saved ({error})") from error
