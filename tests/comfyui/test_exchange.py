"""What leaves the pack and comes back: ComfyUI's own LATENT, and files of latents and embeddings."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import loading
from pipeline.requests.errors import CheckpointError, RequestError
from pipeline.requests.request import GenerateRequest

pytestmark = pytest.mark.usefixtures("small_tiny")


@pytest.fixture
def latents(part: Any) -> Any:
    request = GenerateRequest("a cat", "tiny", height=32, width=48, num_frames=9)
    made = np.random.default_rng(3).normal(size=(1, 3, 16, 4, 6)).astype(np.float32)
    return part("stages").Latents(loading.resolve_checkpoint("tiny"), request, made)


@pytest.fixture
def embeds(part: Any) -> Any:
    prompts = np.random.default_rng(2).normal(size=(2, 19, 20)).astype(np.float32)
    return part("stages").Embeds(loading.resolve_checkpoint("tiny"), "a cat", "blurry", "float32", prompts)


def test_a_latent_is_what_stock_vaes_take(nodes: dict[str, Any], latents: Any) -> None:
    """Channels before frames, and not scaled: diffusers' VAE decodes it as it is."""
    (native,) = nodes["CogVideoXTPUToLatent"].execute(latents).args
    samples = native["samples"]
    assert (samples.shape, samples.dtype) == ((1, 16, 3, 4, 6), torch.float32)
    scale = latents.checkpoint.config("vae")["scaling_factor"]
    np.testing.assert_allclose(samples[0, :, 1] * scale, latents.latents[0, 1], rtol=1e-6)
    (back,) = nodes["CogVideoXTPUFromLatent"].execute(native, model_id="tiny").args
    np.testing.assert_allclose(back.latents, latents.latents, rtol=1e-6)
    names = ("height", "width", "num_frames", "dtype", "checkpoint")
    assert [getattr(back.request, name) for name in names] == [32, 48, 9, "float32", "tiny"]
    (rounded,) = nodes["CogVideoXTPUFromLatent"].execute(native, model_id="tiny", dtype="bfloat16").args
    assert rounded.latents.dtype == "bfloat16" == rounded.request.dtype


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (2, 16, 3, 4, 6), (1, 4, 3, 4, 6)])
def test_a_latent_of_another_shape(nodes: dict[str, Any], shape: tuple[int, ...]) -> None:
    with pytest.raises(
        RequestError, match=r"^samples: a LATENT of shape .*; expected \[1, 16, frames, height, width\]"
    ):
        nodes["CogVideoXTPUFromLatent"].execute({"samples": torch.zeros(shape)}, model_id="tiny")


@pytest.mark.parametrize(
    "latent",
    [
        None,
        {},
        {"samples": [1.0]},
        {"samples": torch.zeros(1, 16, 3, 4, 6, dtype=torch.complex64)},
        {"samples": torch.full((1, 16, 3, 4, 6), torch.nan)},
    ],
)
def test_a_latent_of_another_kind(nodes: dict[str, Any], latent: Any) -> None:
    with pytest.raises(RequestError, match=r"^samples: .*; expected a LATENT of finite floating-point numbers"):
        nodes["CogVideoXTPUFromLatent"].execute(latent, model_id="tiny")


def test_a_model_whose_name_is_too_long_for_a_folder(nodes: dict[str, Any], latents: Any) -> None:
    (native,) = nodes["CogVideoXTPUToLatent"].execute(latents).args
    with pytest.raises(CheckpointError, match=r"^model_id='a.*: expected"):
        nodes["CogVideoXTPUFromLatent"].execute(native, model_id="a" * 5000)


@pytest.mark.parametrize("prefix", ["a\0b", "a" * 400, "\ud800"])
def test_a_name_that_no_file_can_have(part: Any, latents: Any, prefix: str) -> None:
    with pytest.raises(RequestError, match=r"^filename_prefix=.*: the file cannot be written"):
        part("exchange").save(latents, prefix)


@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (8, 8, 3), (1, 0, 0, 3)])
def test_images_of_another_shape(embeds: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"^image: .*expected an IMAGE of \[frames, height, width"):
        dataclasses.replace(embeds, image=torch.zeros(shape)).pictures(1)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((1, 8, 8, 3), 255, dtype=torch.uint8), r"uint8; expected an IMAGE of .* with floats from 0 to 1"),
        (torch.full((1, 8, 8, 3), 255.0), r"values from 255 to 255; expected .* floats from 0 to 1 \(divide by 255\)"),
        (torch.full((1, 8, 8, 3), -3.0), r"values from -3 to -3; expected an IMAGE"),
        (torch.zeros(1, 8, 8, 5), r"\[1, 8, 8, 5\]; expected an IMAGE"),
        (None, r"NoneType; expected an IMAGE"),
        (torch.zeros(3, 8, 8, 3), r"3 images; expected one, the first frame"),
    ],
)
def test_an_image_that_is_not_comfyuis(nodes: dict[str, Any], embeds: Any, image: Any, message: str) -> None:
    """They were taken: white, or the first of a batch."""
    with pytest.raises(RequestError, match=f"^image: {message}"):
        nodes["CogVideoXTPUImage"].execute(embeds, image=image)
    if "3 images" not in message:
        with pytest.raises(RequestError, match=f"^images: {message}"):
            nodes["CogVideoXTPUVideo"].execute(embeds, images=image, strength=0.8)


def test_an_image_that_is_sharpened_is_clamped(nodes: dict[str, Any], embeds: Any) -> None:
    image = torch.tensor([-0.1, 0.5, 1.1]).expand(1, 8, 8, 3)
    (found,) = nodes["CogVideoXTPUImage"].execute(embeds, image=image).args
    assert found.pictures(1)[0].getpixel((0, 0)) == (0, 128, 255)


def test_an_image_that_is_not_finite(embeds: Any) -> None:
    with pytest.raises(RequestError, match=r"^image: .*not finite"):
        dataclasses.replace(embeds, image=torch.full((1, 8, 8, 3), torch.nan)).pictures(1)


def _only_option(schema: Any) -> str:
    (slot,) = schema.inputs
    (name,) = slot.options
    return name


def test_latents_come_back_as_they_were(nodes: dict[str, Any], latents: Any, comfy: Any) -> None:
    load = nodes["CogVideoXTPULoadLatents"]
    latents = dataclasses.replace(latents, latents=latents.latents.astype("bfloat16"))
    shown = nodes["CogVideoXTPUSaveLatents"].execute(latents=latents, filename_prefix="latents/CogVideoX").ui["text"][0]
    name = _only_option(load.define_schema())
    assert (shown, name) == ("latents/CogVideoX_00001_.latents.safetensors", f"{shown} [output]")
    assert comfy.texts[-1][0] == shown
    (back,) = load.execute(file=name).args
    np.testing.assert_array_equal(back.latents, latents.latents)
    assert back.latents.dtype == "bfloat16" and back.request == latents.request
    assert load.fingerprint_inputs(name) != load.fingerprint_inputs("none") == ""


def test_embeddings_come_back_as_they_were(nodes: dict[str, Any], embeds: Any, comfy: Any) -> None:
    nodes["CogVideoXTPUSaveEmbeddings"].execute(embeddings=embeds, filename_prefix="cats/a")
    (back,) = nodes["CogVideoXTPULoadEmbeddings"].execute(file="cats/a_00001_.embeddings.safetensors [output]").args
    np.testing.assert_array_equal(back.prompts, embeds.prompts)
    assert back.fields == embeds.fields


def test_only_prompts_are_kept(nodes: dict[str, Any], embeds: Any) -> None:
    with_image = dataclasses.replace(embeds, image=torch.zeros(1, 8, 8, 3))
    with pytest.raises(RequestError, match="only prompts are kept; expected them from the text encoder itself"):
        nodes["CogVideoXTPUSaveEmbeddings"].execute(embeddings=with_image, filename_prefix="x")


def test_files_that_do_not_fit(
    nodes: dict[str, Any], latents: Any, comfy: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, suffix = nodes["CogVideoXTPULoadLatents"], part("exchange").SUFFIXES["latents"]
    with pytest.raises(RequestError, match=r"file='\.\./x': expected one of"):
        load.execute(file="../x")
    part("exchange").save(latents, "one")
    path = part("host").saved_files(suffix)[f"one_00001_{suffix} [output]"]
    folder = comfy.input_dir
    folder.mkdir(exist_ok=True)
    for name, content in (("empty", {}), ("bare", load_file(path))):
        save_file(content, folder / f"{name}{suffix}")
        with pytest.raises(RequestError, match=f"file='{name}{suffix} .input.': not latents that this pack has saved"):
            load.execute(file=f"{name}{suffix} [input]")
    monkeypatch.setattr(loading.Checkpoint, "identity", lambda *_: "another")
    with pytest.raises(RequestError, match="made with other weights of model_id='tiny'; make it again"):
        load.execute(file=f"one_00001_{suffix} [output]")


@pytest.mark.parametrize("shape", [(1, 3, 4, 4, 6), (2, 3, 16, 4, 6)])
def test_latents_of_another_model_or_edited(nodes: dict[str, Any], latents: Any, part: Any, shape: Any) -> None:
    """The weights are those of the model, but what lies in the file is not: refused before a program is compiled."""
    edited = dataclasses.replace(latents, latents=np.zeros(shape, np.float32))
    name = part("exchange").save(edited, "edited")
    expected = rf"edited_.*: a tensor \[{shape[0]}, 3, .*; expected \[1, any, 16, any, any\], all finite"
    with pytest.raises(RequestError, match=expected):
        nodes["CogVideoXTPULoadLatents"].execute(file=f"{name} [output]")


@pytest.mark.parametrize("value", [np.zeros((2, 19, 21), np.float32), np.full((2, 19, 20), np.nan, np.float32)])
def test_embeddings_of_another_model_or_edited(nodes: dict[str, Any], embeds: Any, part: Any, value: Any) -> None:
    name = part("exchange").save(dataclasses.replace(embeds, prompts=value), "edited")
    with pytest.raises(RequestError, match=r"edited_.*: a tensor .*; expected \[any, \d+, 20\], all finite"):
        nodes["CogVideoXTPULoadEmbeddings"].execute(file=f"{name} [output]")
