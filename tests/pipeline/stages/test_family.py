"""Every CogVideoX through `generate`, beside diffusers' pipeline for it, on a small random checkpoint of its shape.

Float32 on both sides; tolerances as in test_stages.py.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import PLENTY_S, virtual_devices
from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.model.latents import LatentGeometry
from pipeline.model.noise_schedule import build_scheduler
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.requests.media import read_video
from pipeline.requests.models import MODELS
from pipeline.requests.options import RunOptions
from pipeline.requests.request import STAGES, AttentionOptions, GenerateRequest
from pipeline.runs.outputs import load_stage
from pipeline.runs.request_run import RequestRun, generate
from pipeline.runs.video import write_mp4
from pipeline.stages.conditioning import noisy_video
from pipeline.stages.denoise import Denoiser
from pipeline.stages.progress import StageClock, StageEvent
from pipeline.stages.resume import StateFile
from splash_workbench.provenance import REPO_ROOT

LATENT_TOLERANCE = 2e-4
FRAME_TOLERANCE = 1e-4
TEXT_SEQ_LEN = 7
HEIGHT, WIDTH, NUM_FRAMES = 48, 80, 9
SPEC = TinySpec(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=32,
    time_embed_dim=24,
    text_embed_dim=20,
    text_layers=1,
    max_text_seq_length=TEXT_SEQ_LEN,
    vae_block_out_channels=(8, 8, 16, 16),  # as of the session's checkpoint: some programs are the same
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes a checkpoint of a published model's shape."""
    cache = tmp_path_factory.mktemp("family")

    def make(published: str, **changes: int) -> Path:
        learned = PUBLISHED_CONFIGS[published]["transformer"].get("use_learned_positional_embeddings")
        own_size = {"sample_height": HEIGHT // 8, "sample_width": WIDTH // 8, "sample_frames": NUM_FRAMES}
        spec = dataclasses.replace(SPEC, published=published, **(own_size if learned else {}), **changes)
        return ensure_tiny_checkpoint(cache, spec)

    return make


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A file of another size and shape than the videos'."""
    path = tmp_path_factory.mktemp("image") / "image.png"
    pixels = np.random.default_rng(3).integers(0, 256, (61, 47, 3), np.uint8)
    Image.fromarray(pixels).resize((94, 122), Image.Resampling.BICUBIC).save(path)
    return path


def _request(folder: Path, **changes) -> GenerateRequest:
    fields = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "num_inference_steps": 2, "seed": 7}
    return GenerateRequest("a red circle", str(folder), "blue", **{**fields, "guidance_scale": 4.0, **changes})


def _stock(pipeline_class: str, request: GenerateRequest, **options) -> tuple[np.ndarray, Callable[[], np.ndarray]]:
    """diffusers' latents, without padding frames, and a function that decodes them."""
    import diffusers

    pipe = getattr(diffusers, pipeline_class).from_pretrained(request.checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if request.scheduler == "dpm":
        pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    if pipeline_class != "CogVideoXVideoToVideoPipeline":
        options["num_frames"] = request.num_frames
    latents = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        use_dynamic_cfg=request.use_dynamic_cfg,
        generator=torch.Generator().manual_seed(request.seed),
        max_sequence_length=TEXT_SEQ_LEN,
        output_type="latent",
        **options,
    ).frames
    latents = latents[:, latents.shape[1] - ((request.num_frames - 1) // 4 + 1) :]

    def frames() -> np.ndarray:
        with torch.no_grad():
            return pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="np")[0]

    return torch_to_numpy(latents), frames


def _assert_same(
    request: GenerateRequest, run_dir: Path, stock: tuple[np.ndarray, Callable[[], np.ndarray]], **options
):
    """Compare what `generate` saves with diffusers' latents, and frames where they are made."""
    generate(request, run_dir=run_dir, **options)
    checkpoint = Checkpoint(request.checkpoint, Path(request.checkpoint))
    run = RequestRun(request, STAGES, run_dir, checkpoint, checkpoint.identities(*STAGES), RunOptions())
    latents, frames = stock
    actual = load_stage(run_dir, run.keys["denoise"])["latents"]
    np.testing.assert_allclose(actual, latents, rtol=0, atol=LATENT_TOLERANCE)
    if "stages" not in options:
        expected = frames()
        assert 0.05 < expected.std() < 0.45
        difference = load_stage(run_dir, run.keys["vae"])["frames"] - 255 * expected
        assert np.abs(difference).max() <= 0.5 + 255 * FRAME_TOLERANCE


_NO_VAE = {"stages": ("text", "denoise")}


@pytest.mark.compile
@pytest.mark.parametrize("model", ["cogvideox-2b", "cogvideox-5b"])
def test_text_to_video(model, folder_of, tmp_path):
    request = _request(folder_of(MODELS[model].checkpoint))
    options = {} if model == "cogvideox-2b" else _NO_VAE
    _assert_same(request, tmp_path / "run", _stock("CogVideoXPipeline", request), **options)


@pytest.mark.compile
@pytest.mark.parametrize(
    "model", [pytest.param("cogvideox-5b-i2v", marks=pytest.mark.slow("6 s")), "cogvideox1.5-5b-i2v"]
)
def test_image_to_video(model, folder_of, picture, tmp_path):
    from diffusers.utils import load_image

    request = _request(folder_of(MODELS[model].checkpoint), image=str(picture), scheduler="dpm", use_dynamic_cfg=True)
    expected = _stock("CogVideoXImageToVideoPipeline", request, image=load_image(str(picture)))
    _assert_same(request, tmp_path / "run", expected, **(_NO_VAE if model == "cogvideox-5b-i2v" else {}))


@pytest.fixture(scope="module")
def moving(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    noise = np.random.default_rng(4).integers(0, 256, (4, 6, 3), np.uint8)
    write_mp4(path, np.stack([np.roll(noise, n, 1).repeat(16, 0).repeat(16, 1) for n in range(NUM_FRAMES)]), 8)
    return path


@pytest.mark.compile
def test_video_to_video(folder_of, moving, tmp_path):
    folder = folder_of(MODELS["cogvideox-5b"].checkpoint)
    request = _request(folder, video=str(moving), strength=0.7, num_inference_steps=4, scheduler="dpm")
    assert request.steps_left_out == 2
    frames = read_video(str(moving), NUM_FRAMES)
    expected = _stock("CogVideoXVideoToVideoPipeline", request, video=frames, strength=request.strength)
    _assert_same(request, tmp_path / "run", expected, **_NO_VAE)


@pytest.mark.compile
def test_an_interrupted_image_to_video_goes_on_with_the_same_bits(folder_of, tmp_path):
    checkpoint = Checkpoint("i2v", folder_of(MODELS["cogvideox-5b-i2v"].checkpoint))
    denoiser = Denoiser(checkpoint, torch.float32, AttentionOptions())
    request = _request(checkpoint.folder, image="given", scheduler="dpm")
    rng = np.random.default_rng(6)
    moments = rng.normal(size=(1, 32, 1, HEIGHT // 8, WIDTH // 8)).astype(np.float32)
    embeddings = rng.normal(size=(2, TEXT_SEQ_LEN, SPEC.text_embed_dim)).astype(np.float32)

    def interrupt(event: StageEvent) -> None:
        if event.step == 1:
            raise KeyboardInterrupt

    expected = denoiser.denoise(request, embeddings, moments=moments)
    with pytest.raises(KeyboardInterrupt):
        clock = StageClock("denoise", interrupt)
        denoiser.denoise(request, embeddings, clock, state_file=StateFile(tmp_path, "x"), moments=moments)
    state_file = StateFile(tmp_path, "x")
    actual = denoiser.denoise(request, embeddings, state_file=state_file, moments=moments)
    assert state_file.resumed_at_step == 1
    np.testing.assert_array_equal(actual, expected)


def test_a_video_for_a_model_that_pads_frames():
    """diffusers refuses it: the padding frame repeats the first."""
    configs = PUBLISHED_CONFIGS[MODELS["cogvideox1.5-5b"].checkpoint]
    geometry = LatentGeometry(num_frames=3, padding_frames=1, num_channels=2, height=4, width=6, patch=(2, 2, 2))
    encoded, noise = torch.randn(1, 3, 2, 4, 6), torch.randn(geometry.shape)
    scheduler = build_scheduler(configs["scheduler"])
    actual = noisy_video(encoded, noise, geometry, configs["vae"], scheduler, np.array([499]))
    alpha = scheduler.alphas_cumprod[499]
    expected = alpha.sqrt() * 0.7 * encoded[:, [0, 0, 1, 2]] + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(actual, expected)


_SHARDED = """
import json, os, sys
folders, output = json.loads(sys.argv[1]), sys.argv[2]
import jax, numpy as np, torch
from pathlib import Path
from pipeline.checkpoints.loading import Checkpoint
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.stages.denoise import Denoiser
from pipeline.stages.vae import VaeEncoder

jax.config.update("jax_disable_most_optimizations", True)  # to compile faster
results, rng = {}, np.random.default_rng(5)
frames = {"width": rng.uniform(-1, 1, (1, 48, 64, 3)), "height": rng.uniform(-1, 1, (1, 64, 48, 3))}
for name, values in frames.items():
    encoder = VaeEncoder(Checkpoint("small", Path(folders["cogvideox-2b"])), torch.float32)
    results |= {f"frames by {name}": values, f"moments by {name}": encoder.encode(values.astype(np.float32))}
moments = rng.normal(size=(1, 32, 1, 6, 10)).astype(np.float32)
embeddings = rng.normal(size=(2, 7, 20)).astype(np.float32)
plans = {"cogvideox-2b": ["ulysses"], "cogvideox-5b-i2v": ["megatron", "seed_tp"]}
for model, folder in folders.items():
    image = {"image": "given"} if "i2v" in model else {}
    request = GenerateRequest(
        "a", folder, height=48, width=80, num_frames=9, num_inference_steps=1, guidance_scale=4, seed=7, **image
    )
    for plan in [*plans[model], "auto"]:
        options = ParallelOptions(plan, 1 if plan == "auto" else 4)
        denoiser = Denoiser(Checkpoint("small", Path(folder)), torch.float32, AttentionOptions(), options)
        results[f"{model} {plan}"] = denoiser.denoise(request, embeddings, moments=moments if image else None)
np.savez(output, **results)
"""


@pytest.mark.slow("40 s")
@pytest.mark.compile
def test_every_plan_gives_the_same(folder_of, tmp_path):
    """Added positions without rotation, and with it beside an image's latents; and the encoder, split either way.

    Of the first the heads, 15, do not divide over the devices of a prompt, 2.
    """
    from diffusers import AutoencoderKLCogVideoX

    models = ("cogvideox-2b", "cogvideox-5b-i2v")
    sizes = ({"num_attention_heads": 15, "attention_head_dim": 16}, {})
    folders = {
        model: str(folder_of(MODELS[model].checkpoint, **size)) for model, size in zip(models, sizes, strict=True)
    }
    output = tmp_path / "results.npz"
    command = [sys.executable, "-c", _SHARDED, json.dumps(folders), str(output)]
    variables = os.environ | {"XLA_FLAGS": virtual_devices(4)}
    done = subprocess.run(
        command, cwd=REPO_ROOT, env=variables, capture_output=True, text=True, check=False, timeout=PLENTY_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = np.load(output)
    for name in ("cogvideox-2b ulysses", "cogvideox-5b-i2v megatron", "cogvideox-5b-i2v seed_tp"):
        expected = results[f"{name.split()[0]} auto"]
        np.testing.assert_allclose(results[name], expected, rtol=0, atol=LATENT_TOLERANCE)
    vae = AutoencoderKLCogVideoX.from_pretrained(folders["cogvideox-2b"], subfolder="vae")
    for name in ("width", "height"):
        frames = torch.from_numpy(results[f"frames by {name}"].astype(np.float32))
        with torch.no_grad():
            expected = vae.encode(frames.permute(3, 0, 1, 2)[None]).latent_dist.parameters.numpy()
        np.testing.assert_allclose(results[f"moments by {name}"], expected, rtol=0, atol=LATENT_TOLERANCE)
