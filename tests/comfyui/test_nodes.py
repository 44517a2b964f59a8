"""The nodes run, over the stand-in for ComfyUI and the tiny model: results, progress, interruption, memory."""

import dataclasses
import gc
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from pipeline.checkpoints.loading import Checkpoint
from pipeline.requests.errors import NonFiniteError, PipelineError

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("small_tiny")]  # models are loaded and compiled


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_frames_progress_and_previews(run: Any, comfy: Any) -> None:
    images, frame_rate = run()
    assert images.shape == (9, 32, 48, 3) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert type(frame_rate) is float and frame_rate == 16.0
    images += 1  # writable: the frames are a copy of JAX's
    steps = [text for text, node_id in comfy.texts if "/3, " in text and node_id == "7"]
    assert len(steps) == 3
    assert steps[0].startswith("1/3, ") and " s a step, " in steps[0] and steps[-1].endswith(", 0 s left")
    texts = [text for text, _ in comfy.texts]
    (warning,) = [text for text in texts if "model tiny was trained on 96x64, 17 frames" in text]
    assert texts.index(warning) == texts.index(steps[-1]) + 1, "what stays on the node"
    assert [bar for bar in comfy.bars if bar[1] == 3] == [(1, 3), (2, 3), (3, 3)]
    assert [(kind, picture.size) for kind, picture, _ in comfy.previews] == [("JPEG", (96, 64))] * 3, "frames 2 x 2"


@pytest.mark.slow("20 s")  # test_inputs.py compares with the command line by default
def test_same_as_the_pipeline(
    prompt: str, values: dict[str, Any], run: Any, comfy: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    from safetensors import safe_open

    from pipeline.model.torchax_bridge import torch_to_numpy
    from pipeline.requests.request import GenerateRequest
    from pipeline.runs.request_run import generate

    images, _ = run()
    fields = {name: value for name, value in values.items() if name != "num_devices"}
    generate(GenerateRequest(prompt, str(tiny_folder), **fields), run_dir=tmp_path)
    with safe_open(tmp_path / "vae.safetensors", framework="pt") as file:
        expected = torch_to_numpy(file.get_tensor("frames"))
    np.testing.assert_array_equal(np.round(images.numpy() * 255).astype(np.uint8), expected)


def test_models_stay_between_runs_and_unloading_frees_them(run: Any, comfy: Any) -> None:
    before = live_bytes()
    first, _ = run()
    loaded = live_bytes()
    assert loaded > before
    comfy.texts.clear()
    assert not torch.equal(run(seed=43)[0], first)
    assert not [text for text, _ in comfy.texts if "loading" in text or "compiling" in text]
    assert live_bytes() == loaded
    assert len(comfy.loaded) == 1
    comfy.unload_all_models()
    assert live_bytes() == before
    assert torch.equal(run()[0], first)
    assert [text for text, _ in comfy.texts if "loading" in text], "loaded anew"
    assert len(comfy.loaded) == 1, "and again to be unloaded"


@pytest.mark.slow("13 s")  # of another program; by default the seed below
def test_no_guidance_makes_another_video(run: Any, comfy: Any) -> None:
    assert not torch.equal(run()[0], run(guidance_scale=1.0)[0])


@pytest.mark.parametrize(
    "text", ["2/", *(pytest.param(it, marks=pytest.mark.slow("7 s")) for it in ("denoise: compiling", "vae: loading"))]
)
def test_interrupt_within_a_step(run: Any, stub: Any, comfy: Any, text: str) -> None:
    comfy.interrupt_after = text
    with pytest.raises(stub.InterruptProcessingException):
        run(num_inference_steps=5)
    assert comfy.texts[-1][0].startswith(text), "nothing after it"
    comfy.interrupt_after = None
    assert run(num_inference_steps=5)[0].shape == (9, 32, 48, 3)


def test_previews_are_as_comfyui_is_set(run: Any, comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["comfy.cli_args"].args, "preview_method", "none")
    run()
    assert not comfy.previews and len(comfy.bars) >= 3


def test_another_fps_does_not_decode_again(
    prompt: str, values: dict[str, Any], nodes: dict[str, Any], comfy: Any
) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=prompt, negative_prompt="", model_id="tiny").args
    (latents,) = nodes["CogVideoXTPUSampler"].execute(embeds, **values).args
    decode = nodes["CogVideoXTPUVAEDecoder"].execute
    images, _ = decode(latents, fps=8).args
    comfy.texts.clear()
    again, frame_rate = decode(latents, fps=24).args
    assert again is images and frame_rate == 24.0 and not comfy.texts
    frames = weakref.ref(images)
    del images, again, latents
    gc.collect()
    assert frames() is None, "kept no longer than the latents"


def test_what_preview_any_shows_has_no_path(
    prompt: str, values: dict[str, Any], nodes: dict[str, Any], comfy: Any, tiny_folder: Path
) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=prompt, negative_prompt="fog", model_id="tiny").args
    (latents,) = nodes["CogVideoXTPUSampler"].execute(embeds, **values).args
    assert str(embeds) == f"embeddings [2, 19, 20] float32, prompt={prompt!r}, negative_prompt='fog'"
    assert str(latents) == f"latents [1, 3, 16, 4, 6] float32, prompt={prompt!r}"
    assert str(tiny_folder) not in repr([embeds, latents])


def test_empty_prompt(nodes: dict[str, Any], comfy: Any) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt="", negative_prompt="", model_id="tiny").args
    assert np.array_equal(*embeds.prompts)


def test_nan_is_an_error_not_a_black_video(
    prompt: str, values: dict[str, Any], nodes: dict[str, Any], comfy: Any, part: Any
) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=prompt, negative_prompt="", model_id="tiny").args
    spoilt = dataclasses.replace(embeds, prompts=np.full_like(embeds.prompts, np.nan))
    with pytest.raises(NonFiniteError, match="denoise: step 1 of 3"):
        nodes["CogVideoXTPUSampler"].execute(spoilt, **values)


def test_full_memory_frees_the_models(run: Any, comfy: Any, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.stages.vae import VaeDecoder

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(VaeDecoder, "decode", out_of_memory)
    with pytest.raises(PipelineError, match="vae: not enough device memory; loaded models were freed"):
        run()
    assert not part("models")._stages


def test_room_is_made_by_what_was_used_longest_ago(comfy: Any, part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = part("models")
    monkeypatch.setattr(models, "_held_fraction", lambda: 0.3 * len(models._stages))
    for key in ("a", "b"):
        models.loaded_stage(key, object)
    assert list(models._stages) == ["b"], "0.6 of the memory is more than half"
    monkeypatch.setattr(models, "_held_fraction", lambda: 0.2 * len(models._stages))
    kept = models.loaded_stage("b", object)
    models.loaded_stage("c", object)
    assert models.loaded_stage("b", object) is kept
    models.loaded_stage("d", object)
    assert list(models._stages) == ["b", "d"]


def test_nothing_global_is_changed(run: Any, comfy: Any) -> None:
    import torchax

    def state() -> Any:
        config = {name: jax.config.values[name] for name in ("jax_enable_x64", "jax_default_matmul_precision")}
        with torch.random.fork_rng(devices=[]):
            probe = torch.ones(2) + 1
        return (
            *(torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
            *(type(probe), torch.get_rng_state().sum(), config, torchax.default_env().enabled),
            *(dict(os.environ), list(sys.path)),
        )

    from pipeline.model.torchax_bridge import torchax_module

    torchax_module()
    before = state()
    run()
    assert state() == before


def test_checkpoint_is_not_opened_before_it_is_wanted(
    prompt: str, values: dict[str, Any], nodes: dict[str, Any], comfy: Any, part: Any
) -> None:
    """The sampler's check knows no model; with embeddings it takes theirs, whose folder may be gone by then."""
    Embeds = part("stages").Embeds  # noqa: N806
    embeds = Embeds(Checkpoint("gone", folder=Path("gone")), prompt, "", "float32", np.zeros((2, 19, 20), np.float32))
    assert nodes["CogVideoXTPUSampler"].check_lazy_status(embeddings=embeds, **values) == []
