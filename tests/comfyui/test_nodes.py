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

from pipeline.checkpoints import loading
from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.requests.errors import NonFiniteError, PipelineError, RequestError

pytestmark = pytest.mark.compile  # models are loaded and compiled

SPEC = TinySpec(
    num_layers=1,
    num_attention_heads=2,
    time_embed_dim=24,
    text_embed_dim=20,
    text_layers=1,
    max_text_seq_length=19,
    vae_block_out_channels=(8, 8, 8, 8),
)
PROMPT = "a red circle moves right"
VALUES = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 6.0,
    "seed": 42,
    "num_devices": 1,
}


@pytest.fixture(scope="session")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny_checkpoint(tmp_path_factory.mktemp("cache"), SPEC)


@pytest.fixture(autouse=True)
def _small_tiny(_tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model_id tiny, smaller still."""
    monkeypatch.setattr(loading, "TRAINED_FOLDER", _tiny)


def run(nodes: dict[str, Any], **changes: Any) -> tuple[torch.Tensor, float]:
    """What ComfyUI does with the three nodes: in inference mode, asking the sampler before it encodes."""
    values = {**VALUES, **changes}
    sampler = nodes["CogVideoXTPUSampler"]
    with torch.inference_mode():
        assert sampler.check_lazy_status(embeddings=None, **values) == ["embeddings"]
        (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=PROMPT, negative_prompt="", model_id="tiny").args
        assert sampler.check_lazy_status(embeddings=embeds, **values) == []
        (latents,) = sampler.execute(embeds, **values).args
        images, frame_rate = nodes["CogVideoXTPUVAEDecoder"].execute(latents, fps=16).args
    return images, frame_rate


def live_bytes() -> int:
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays())


def test_frames_progress_and_previews(nodes: dict[str, Any], comfy: Any) -> None:
    images, frame_rate = run(nodes)
    assert images.shape == (9, 32, 48, 3) and images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1
    assert type(frame_rate) is float and frame_rate == 16.0
    images += 1  # writable: the frames are a copy of JAX's
    steps = [text for text, node_id in comfy.texts if "/3, " in text and node_id == "7"]
    assert len(steps) == 3
    assert steps[0].startswith("1/3, ") and " s a step, " in steps[0] and steps[-1].endswith(", 0 s left")
    assert [bar for bar in comfy.bars if bar[1] == 3] == [(1, 3), (2, 3), (3, 3)]
    assert [(kind, picture.size) for kind, picture, _ in comfy.previews] == [("JPEG", (96, 64))] * 3, "frames 2 x 2"


def test_same_as_the_pipeline(nodes: dict[str, Any], comfy: Any, _tiny: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    from pipeline.model.torchax_bridge import torch_to_numpy
    from pipeline.requests.request import GenerateRequest
    from pipeline.runs.request_run import generate

    images, _ = run(nodes)
    fields = {name: value for name, value in VALUES.items() if name != "num_devices"}
    generate(GenerateRequest(PROMPT, str(_tiny), **fields), run_dir=tmp_path)
    with safe_open(tmp_path / "vae.safetensors", framework="pt") as file:
        expected = torch_to_numpy(file.get_tensor("frames"))
    np.testing.assert_array_equal(np.round(images.numpy() * 255).astype(np.uint8), expected)


def test_models_stay_between_runs_and_unloading_frees_them(nodes: dict[str, Any], comfy: Any) -> None:
    before = live_bytes()
    run(nodes)
    loaded = live_bytes()
    assert loaded > before
    comfy.texts.clear()
    run(nodes, seed=43)
    assert not [text for text, _ in comfy.texts if "loading" in text or "compiling" in text]
    assert live_bytes() == loaded
    assert len(comfy.loaded) == 1
    comfy.unload_all_models()
    assert live_bytes() == before
    run(nodes)
    assert [text for text, _ in comfy.texts if "loading" in text], "loaded anew"
    assert len(comfy.loaded) == 1, "and again to be unloaded"


def test_another_seed_or_no_guidance_makes_another_video(nodes: dict[str, Any], comfy: Any) -> None:
    first, again, other, unguided = (
        run(nodes, **changes)[0] for changes in ({}, {}, {"seed": 43}, {"guidance_scale": 1.0})
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first, unguided)


@pytest.mark.parametrize("text", ["2/", "denoise: compiling", "vae: loading"])
def test_interrupt_within_a_step(nodes: dict[str, Any], stub: Any, comfy: Any, text: str) -> None:
    comfy.interrupt_after = text
    with pytest.raises(stub.InterruptProcessingException):
        run(nodes, num_inference_steps=5)
    assert comfy.texts[-1][0].startswith(text), "nothing after it"
    comfy.interrupt_after = None
    assert run(nodes, num_inference_steps=5)[0].shape == (9, 32, 48, 3)


def test_previews_are_as_comfyui_is_set(nodes: dict[str, Any], comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["comfy.cli_args"].args, "preview_method", "none")
    run(nodes)
    assert not comfy.previews and len(comfy.bars) >= 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 80}, "num_frames=80: expected 8k [+] 1.* the nearest is 73 or 81"),
        ({"height": 100}, "height=100: expected a multiple of 16; the nearest is 96 or 112"),
        ({"width": 24}, "width=24: expected a multiple of 16; the nearest is 16 or 32"),
        ({"num_devices": 512}, "num_devices=512: JAX sees"),
        ({"kernel": "fixed_bound"}, "kernel=fixed_bound: needs a TPU"),
        ({"kernel": "int8"}, "kernel=int8: needs a TPU"),
        ({"scheduler": "euler"}, "scheduler='euler': expected one of checkpoint, ddim, dpm"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": "6"}, "guidance_scale='6': expected a number from 0.0 to 100.0"),
        ({"kernel": "foo"}, "kernel='foo': expected one of auto, fixed_bound"),
        ({"kernel": ["auto"]}, "kernel=.* expected one of auto"),
        ({"parallel_plan": "foo"}, "parallel_plan='foo': expected one of auto, ulysses"),
        ({"num_devices": -1}, "num_devices=-1: expected a whole number from 0 to 4096"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number from 0 to"),
    ],
)
def test_bad_values_before_any_work(nodes: dict[str, Any], comfy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(nodes, **changes)
    assert not comfy.texts, "no text was encoded"


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        ("CogVideoXTextEncoder", {"dtype": "float16"}, "dtype='float16': expected one of auto, bfloat16, float32"),
        ("CogVideoXTextEncoder", {"prompt": None}, "prompt=None: expected text"),
        ("CogVideoXTextEncoder", {"model_id": "/etc"}, "model_id='/etc': expected a Hub id"),
        ("CogVideoXTPUVAEDecoder", {"fps": 0}, "fps=0: expected a whole number from 1 to 120"),
        ("CogVideoXTPUInfo", {"device": "foo"}, "device='foo': expected one of TPU v6 lite, TPU v5 lite, TPU7x"),
        ("CogVideoXTPUInfo", {"predict": "yes"}, "predict='yes': expected true or false"),
        ("CogVideoXTPUInfo", {"width": 4096}, "width=4096: the rotary table of model_id='tiny' ends at"),
        (
            "CogVideoXTPUInfo",
            {"num_devices": 1, "device": "TPU7x", "predict": True},
            "num_devices=1: expected one of 2, 8, 16",
        ),
    ],
)
def test_every_node_checks_its_widgets(
    nodes: dict[str, Any], comfy: Any, node: str, changes: dict[str, Any], message: str
) -> None:
    values = {slot.id: slot.default for slot in nodes[node].define_schema().inputs if slot.is_widget}
    if "model_id" in values:
        values |= {"model_id": "tiny"}
    if "latents" in (slot.id for slot in nodes[node].define_schema().inputs):
        values["latents"] = None
    small = {name: value for name, value in VALUES.items() if name in values}
    with pytest.raises(PipelineError, match=f"^{message}") as caught:
        nodes[node].execute(**{**values, **small, **changes})
    assert "\n" not in str(caught.value)
    assert not {"checkpoint=", "topology=", "parallel.", "attention."} & set(str(caught.value).split())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("checkpoint='x/y' revision=None: the Hub refused it", "model_id='x/y': the Hub refused it"),
        ("parallel.num_devices=3: only 2 are here", "num_devices=3: only 2 are here"),
        (
            "topology='v6e-3': expected v6e-N with N one of 1, 4, or chips as v6e:2x4.",
            "num_devices=3: expected one of 1, 4.",
        ),
        (
            "denoise: try more chips, parallel=ulysses_sharded, or",
            "denoise: try more chips, parallel_plan=ulysses, weights sharded, or",
        ),
        (
            "checkpoint='x': no such folder; expected tiny, tiny-random, an existing folder, or owner/name",
            "model_id='x'",
        ),
    ],
)
def test_errors_name_the_widgets(part: Any, message: str, expected: str) -> None:
    @part("settings").in_widget_terms
    def fail() -> None:
        raise RequestError(message)

    with pytest.raises(RequestError) as caught:
        fail()
    assert str(caught.value).startswith(expected) and "tiny-random" not in str(caught.value)


def test_another_fps_does_not_decode_again(nodes: dict[str, Any], comfy: Any) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=PROMPT, negative_prompt="", model_id="tiny").args
    (latents,) = nodes["CogVideoXTPUSampler"].execute(embeds, **VALUES).args
    decode = nodes["CogVideoXTPUVAEDecoder"].execute
    images, _ = decode(latents, fps=8).args
    comfy.texts.clear()
    again, frame_rate = decode(latents, fps=24).args
    assert again is images and frame_rate == 24.0 and not comfy.texts
    frames = weakref.ref(images)
    del images, again, latents
    gc.collect()
    assert frames() is None, "kept no longer than the latents"


def test_what_preview_any_shows_has_no_path(nodes: dict[str, Any], comfy: Any, _tiny: Path) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=PROMPT, negative_prompt="fog", model_id="tiny").args
    (latents,) = nodes["CogVideoXTPUSampler"].execute(embeds, **VALUES).args
    assert str(embeds) == f"embeddings [2, 19, 20] float32, prompt={PROMPT!r}, negative_prompt='fog'"
    assert str(latents) == f"latents [1, 3, 16, 4, 6] float32, prompt={PROMPT!r}"
    assert str(_tiny) not in repr([embeds, latents])


def test_empty_prompt(nodes: dict[str, Any], comfy: Any) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt="", negative_prompt="", model_id="tiny").args
    assert np.array_equal(*embeds.prompts)


def test_nan_is_an_error_not_a_black_video(nodes: dict[str, Any], comfy: Any, part: Any) -> None:
    (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=PROMPT, negative_prompt="", model_id="tiny").args
    spoilt = dataclasses.replace(embeds, prompts=np.full_like(embeds.prompts, np.nan))
    with pytest.raises(NonFiniteError, match="denoise: step 1 of 3"):
        nodes["CogVideoXTPUSampler"].execute(spoilt, **VALUES)


def test_full_memory_frees_the_models(
    nodes: dict[str, Any], comfy: Any, part: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.stages.vae import VaeDecoder

    def out_of_memory(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(VaeDecoder, "decode", out_of_memory)
    with pytest.raises(PipelineError, match="vae: not enough device memory; loaded models were freed"):
        run(nodes)
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


def test_nothing_global_is_changed(nodes: dict[str, Any], comfy: Any) -> None:
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
    run(nodes)
    assert state() == before


def test_info(nodes: dict[str, Any], comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**VALUES, "num_devices": 2, "model_id": "tiny", "device": "TPU v6 lite", "predict": False}
    del values["seed"]
    output = nodes["CogVideoXTPUInfo"].execute(**values)
    (report,) = output.args
    assert output.ui["text"][0] == report
    assert "attention on each device: 1x2x31x64" in report  # 2 x 3 patches in 2 pairs of frames, 19 text tokens
    assert "dp=2 x model=1" in report
    with pytest.raises(RequestError, match="num_devices=3: 3 devices a prompt do not divide 2 heads"):
        nodes["CogVideoXTPUInfo"].execute(**{**values, "num_devices": 3})
    published = {
        "model_id": "zai-org/CogVideoX1.5-5B",
        "height": 720,
        "width": 1280,
        "num_frames": 81,
        "num_devices": 8,
    }
    (report,) = nodes["CogVideoXTPUInfo"].execute(**{**values, **published}).args  # without fetching anything
    assert "attention on each device: 1x12x39826x64" in report
    assert "no time is known" in nodes["CogVideoXTPUInfo"].execute(**values, kernel="xla").args[0]


def test_info_predicts_when_asked(nodes: dict[str, Any], comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.predict import planner

    asked: list[Any] = []
    kind: list[str] = []

    def predict(self: Any, stages: Any, parallel: Any) -> Any:
        asked.append((self.topology, stages, parallel.num_devices, self.request.do_classifier_free_guidance))
        kind.append(parallel.plan)
        self.say("compiling")
        results = {"denoise": {"time_s": 2.5, "peak_hbm_bytes": 3 * 2**30, "hbm_bytes": 2**35}}
        return planner.VideoPrediction(None, results, {})  # type: ignore[arg-type]

    monkeypatch.setattr(planner.Predictor, "predict", predict)
    values = {**VALUES, "num_devices": 4, "model_id": "tiny", "device": "TPU v6 lite", "predict": True}
    del values["seed"]
    with pytest.raises(RequestError, match="4"):  # the check of heads comes first
        nodes["CogVideoXTPUInfo"].execute(**{**values, "num_devices": 8})
    (report,) = nodes["CogVideoXTPUInfo"].execute(**values).args
    assert asked == [("v6e-4", ("denoise",), 4, True)]
    assert kind == ["ulysses"], "what auto runs as"
    assert comfy.texts == [("compiling", "7")]
    assert "denoising on v6e-4: 2.5 s a step, 7.5 s in all" in report and "3.00 of 32 GiB" in report


def test_checkpoint_is_not_opened_before_it_is_wanted(nodes: dict[str, Any], comfy: Any, part: Any) -> None:
    """The sampler's check knows no model; with embeddings it takes theirs, whose folder may be gone by then."""
    Embeds = part("stages").Embeds  # noqa: N806
    embeds = Embeds(Checkpoint("gone", folder=Path("gone")), PROMPT, "", "float32", np.zeros((2, 19, 20), np.float32))
    assert nodes["CogVideoXTPUSampler"].check_lazy_status(embeddings=embeds, **VALUES) == []
