"""Every published model, small, through the nodes: the frames of the pipeline, which are those of diffusers."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.requests.models import MODELS
from pipeline.requests.request import GenerateRequest
from pipeline.runs.request_run import generate


@pytest.mark.slow("15 s each")
@pytest.mark.compile
@pytest.mark.parametrize("model", [name for name in MODELS if not name.startswith("tiny")])
def test_the_frames_are_those_of_the_pipeline(
    model: str, spec: TinySpec, prompt: str, values: dict[str, Any], nodes: dict[str, Any], comfy: Any, tmp_path: Path
) -> None:
    published = MODELS[model].checkpoint
    config = PUBLISHED_CONFIGS[published]["transformer"]
    own_size = {
        "sample_height": values["height"] // 8,
        "sample_width": values["width"] // 8,
        "sample_frames": values["num_frames"],
    }
    learned = config.get("use_learned_positional_embeddings")
    spec = dataclasses.replace(spec, published=published, **(own_size if learned else {}))
    folder = ensure_tiny_checkpoint(comfy.models_dir / "diffusers", spec)
    pixels = np.random.default_rng(3).integers(0, 256, (61, 47, 3), np.uint8)
    picture = tmp_path / "image.png"
    Image.fromarray(pixels).save(picture)
    takes_image = model.endswith("-i2v")

    with torch.inference_mode():
        text = {"prompt": prompt, "negative_prompt": "", "model_id": folder.name, "dtype": "float32"}
        (embeds,) = nodes["CogVideoXTextEncoder"].execute(**text).args
        if takes_image:
            image = torch.from_numpy(pixels)[None] / 255
            (embeds,) = nodes["CogVideoXTPUImage"].execute(embeds, image=image).args
        (latents,) = nodes["CogVideoXTPUSampler"].execute(embeds, **values).args
        images, _ = nodes["CogVideoXTPUVAEDecoder"].execute(latents, fps=16).args

    fields = {name: value for name, value in values.items() if name != "num_devices"} | {"dtype": "float32"}
    request = GenerateRequest(prompt, str(folder), image=str(picture) if takes_image else None, **fields)
    generate(request, run_dir=tmp_path)
    with safe_open(tmp_path / "vae.safetensors", framework="np") as file:
        expected = file.get_tensor("frames")
    np.testing.assert_array_equal(np.round(images.numpy() * 255).astype(np.uint8), expected)
