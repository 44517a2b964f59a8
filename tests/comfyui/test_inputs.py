"""The nodes for a model's choice, an image, a video and LoRAs: as the command line, and in the widgets' words."""

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.checkpoints import loading
from pipeline.checkpoints.lora import SHIPPED
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.request import GenerateRequest, LoraFile
from pipeline.runs.outputs import load_stage
from pipeline.runs.request_run import STAGES, RequestRun, RunOptions, generate

pytestmark = pytest.mark.usefixtures("small_tiny")
TARGET = "transformer.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def loras(comfy: Any) -> Iterator[Path]:
    """ComfyUI's folder of LoRAs, with one that fits the small model and one that does not."""
    folder = comfy.models_dir / "loras"
    folder.mkdir(exist_ok=True)
    for name, channels in (("style", 128), ("other", 96)):
        factors = {"A": torch.ones(2, channels), "B": torch.ones(channels, 2)}
        tensors = {f"{TARGET}.lora_{half}.weight": value for half, value in factors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "old.pt").write_bytes(b"")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def embeds(part: Any) -> Any:
    """Encoded prompts of the small model, made up."""
    checkpoint = loading.resolve_checkpoint("tiny")
    prompts = np.random.default_rng(2).normal(size=(2, 19, 20)).astype(np.float32)
    return part("stages").Embeds(checkpoint, "a", "", "float32", prompts)


def test_the_models_to_choose_from(nodes: dict[str, Any], comfy: Any) -> None:
    for name in ("diffusers/mine", "sub/other"):
        folder = comfy.models_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model_index.json").write_text("{}")
    (slot,) = nodes["CogVideoXTPUModel"].define_schema().inputs
    assert slot.options[0] == "zai-org/CogVideoX1.5-5B" and "zai-org/CogVideoX-2b" in slot.options
    assert slot.options[-4:] == ["tiny", "tiny-i2v", "mine", "sub/other"]
    assert nodes["CogVideoXTPUModel"].execute(model="mine").args == ("mine",)
    with pytest.raises(RequestError, match=r"model='none': expected one of zai-org/CogVideoX1\.5-5B"):
        nodes["CogVideoXTPUModel"].execute(model="none")


def test_loras_are_chained(nodes: dict[str, Any], loras: Path, embeds: Any) -> None:
    node = nodes["CogVideoXTPULora"]
    slots = {slot.id: slot for slot in node.define_schema().inputs}
    assert slots["lora_name"].options == ["other.safetensors", "style.safetensors", "tiny-outline"]
    (once,) = node.execute(embeds, lora_name="style.safetensors", strength=0.5).args
    (twice,) = node.execute(once, lora_name="other.safetensors", strength=-1.0).args
    assert [(Path(lora.path).name, lora.strength) for lora in twice.loras] == [
        ("style.safetensors", 0.5),
        ("other.safetensors", -1.0),
    ]
    assert str(twice).endswith("LoRA style.safetensors 0.5, LoRA other.safetensors -1")
    assert str(loras) not in str(twice)
    with pytest.raises(RequestError, match=r"lora_name='\.\./x': expected one of other\.safetensors"):
        node.execute(embeds, lora_name="../x", strength=1.0)


def test_a_lora_of_the_package(nodes: dict[str, Any], comfy: Any, embeds: Any, part: Any) -> None:
    (name,) = [slot.options for slot in nodes["CogVideoXTPULora"].define_schema().inputs if slot.id == "lora_name"]
    assert tuple(name) == part("settings").TINY_LORAS == tuple(SHIPPED)
    (with_it,) = nodes["CogVideoXTPULora"].execute(embeds, lora_name=name[0], strength=1.0).args
    assert with_it.loras == (LoraFile("tiny-outline"),)


WRONG = [
    ("CogVideoXTPULora", {"lora_name": "other.safetensors", "strength": 1.0}, "lora=.*: a LoRA of another model"),
    (
        "CogVideoXTPUImage",
        {"image": torch.zeros(1, 8, 8, 3)},
        "is a text-to-video model; expected model_id=tiny-i2v or model_id=zai-org/CogVideoX-5b-I2V or ",
    ),
    (
        "CogVideoXTPUVideo",
        {"images": torch.zeros(3, 8, 8, 3), "strength": 0.8},
        "images: 3 frames; expected num",
    ),
    ("CogVideoXTPUVideo", {"images": torch.zeros(9, 8, 8, 3), "strength": 0.1}, "strength=0.1: leaves none of 3 steps"),
]


@pytest.mark.parametrize(("node", "given", "message"), WRONG)
def test_wrong_combinations_before_any_weight_is_read(
    nodes: dict[str, Any],
    loras: Path,
    embeds: Any,
    values: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    node: str,
    given: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(loading, "open_weights", lambda *_: pytest.fail("a weight is read"))
    (embeds,) = nodes[node].execute(embeds, **given).args
    with pytest.raises(PipelineError, match=message) as caught:
        nodes["CogVideoXTPUSampler"].execute(embeds, **values)
    assert "\n" not in str(caught.value)


@pytest.fixture
def image_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """model_id tiny is an image-to-video model."""
    sizes = {"num_layers": 1, "num_attention_heads": 2, "time_embed_dim": 24, "text_embed_dim": 20, "text_layers": 1}
    spec = TinySpec(
        **sizes,
        max_text_seq_length=19,
        vae_block_out_channels=(8, 8, 8, 8),
        published="zai-org/CogVideoX1.5-5B-I2V",
    )
    folder = ensure_tiny_checkpoint(tmp_path, spec)
    monkeypatch.setattr(loading, "TRAINED_FOLDER", folder)
    return folder


def test_a_model_that_wants_an_image(
    nodes: dict[str, Any], values: dict[str, Any], image_model: Path, part: Any
) -> None:
    prompts = np.zeros((2, 19, 20), np.float32)
    embeds = part("stages").Embeds(loading.resolve_checkpoint("tiny"), "a", "", "float32", prompts)
    with pytest.raises(RequestError, match="model_id='tiny' is an image-to-video model; expected the node"):
        nodes["CogVideoXTPUSampler"].execute(embeds, **values)
    del values["seed"]
    info = {**values, "model_id": "tiny", "device": "TPU v6 lite", "predict": False}
    assert "attention on each device" in nodes["CogVideoXTPUInfo"].execute(**info).args[0]


@pytest.mark.compile
def test_image_and_lora_as_on_the_command_line(
    nodes: dict[str, Any],
    comfy: Any,
    loras: Path,
    image_model: Path,
    prompt: str,
    values: dict[str, Any],
    tmp_path: Path,
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (40, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    with torch.inference_mode():
        (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=prompt, negative_prompt="", model_id="tiny").args
        image = torch.from_numpy(pixels / np.float32(255))[None]
        (embeds,) = nodes["CogVideoXTPUImage"].execute(embeds, image=image, noise_aug_strength=0.05).args
        (embeds,) = nodes["CogVideoXTPULora"].execute(embeds, lora_name="style.safetensors", strength=0.1).args
        (latents,) = nodes["CogVideoXTPUSampler"].execute(embeds, **values).args
    fields = {name: value for name, value in values.items() if name != "num_devices"}
    lora = LoraFile(str(loras / "style.safetensors"), 0.1)
    request = GenerateRequest(
        prompt, str(image_model), image=str(tmp_path / "image.png"), noise_aug_strength=0.05, lora=(lora,), **fields
    )
    generate(request, stages=("text", "denoise"), run_dir=tmp_path / "run")
    checkpoint = loading.resolve_checkpoint(str(image_model))
    run = RequestRun(request, STAGES, tmp_path / "run", checkpoint, checkpoint.identities(*STAGES), RunOptions())
    expected = load_stage(tmp_path / "run", run.keys["denoise"])["latents"]
    np.testing.assert_array_equal(latents.latents, expected)
    assert [text for text, _ in comfy.texts if text.startswith("encode: ")]
    assert dataclasses.replace(embeds, noise_aug_strength=0.0).image is embeds.image
    assert "peft" not in sys.modules
