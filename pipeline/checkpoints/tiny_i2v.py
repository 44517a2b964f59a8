"""The tiny image-to-video model: the tiny model, and what is changed of it.

It shares the tiny model's text encoder and VAE. Of its transformer, `I2V_FOLDER` holds what was trained: a LoRA
(`lora.safetensors`), and whole the weights that the tiny model has not or has in another shape (`whole.safetensors`).
The checkpoint, in diffusers' layout, is put together where it is wanted.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from pipeline.checkpoints.lora import merge_loras
from pipeline.checkpoints.tiny import TRAINED_FOLDER
from pipeline.checkpoints.weight_files import STEMS
from pipeline.requests.request import LoraFile
from splash_workbench.files import ensure_folder, write_json

I2V_FOLDER = Path(__file__).parents[1] / "tiny_i2v"
LORA_NAME, WHOLE_NAME = "lora.safetensors", "whole.safetensors"
_FORMAT = 1  # counts up when the checkpoint made of the same files changes
_WEIGHTS = f"transformer/{STEMS['transformer']}.safetensors"


def ensure_tiny_i2v(cache_dir: Path) -> Path:
    """Return the folder of the checkpoint under `cache_dir`, made if it is not there; it is whole, as `tiny-random`."""
    changes = [I2V_FOLDER / LORA_NAME, I2V_FOLDER / WHOLE_NAME]
    digest = hashlib.sha256(str(_FORMAT).encode())
    for path in (TRAINED_FOLDER / _WEIGHTS, TRAINED_FOLDER / f"vae/{STEMS['vae']}.safetensors", *changes):
        digest.update(path.read_bytes())
    folder = cache_dir / f"tiny-i2v-{digest.hexdigest()[:12]}"
    return ensure_folder(folder, lambda building: write_tiny_i2v(TRAINED_FOLDER, I2V_FOLDER, building))


def write_tiny_i2v(base: Path, changes: Path, folder: Path) -> None:
    """Write the checkpoint that `changes` make of the one in `base`."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("transformer", "training.json"))
    config = i2v_config(_read(base / "transformer/config.json"))
    write_json(folder / "transformer/config.json", config)
    write_json(folder / "vae/config.json", {**_read(base / "vae/config.json"), "invert_scale_latents": True})
    index = {**_read(base / "model_index.json"), "_class_name": "CogVideoXImageToVideoPipeline"}
    write_json(folder / "model_index.json", index)
    weights = load_file(base / _WEIGHTS)
    merge_loras(weights, [LoraFile(str(changes / LORA_NAME))], "tiny")
    weights.update(load_file(changes / WHOLE_NAME))
    save_file(weights, folder / _WEIGHTS, metadata={"format": "pt"})


def i2v_config(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the image-to-video sibling of CogVideoX 1.5, of a transformer's own size."""
    channels = transformer["out_channels"]
    return {**transformer, "in_channels": 2 * channels, "ofs_embed_dim": transformer["time_embed_dim"]}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
