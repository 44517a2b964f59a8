"""Every CogVideoX through `generate`, beside diffusers' pipeline for it, on a small random checkpoint of its shape.

Float32 on both sides; tolerances as in test_stages.py.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.model.latents import LatentGeometry
from pipeline.model.noise_schedule import build_scheduler
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.requests.media import read_video
from pipeline.requests.models import MODELS
from pipeline.requests.options import RunOptions
from pipeline.requests.request import STAGES, GenerateRequest
from pipeline.runs.outputs import load_stage
from pipeline.runs.request_run import RequestRun, generate
from pipeline.runs.video import write_mp4
from pipeline.stages.conditioning import noisy_video

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
    vae_block_out_channels=(8, 8, 8, 16),
)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Makes a checkpoint of a published model's shape."""
    cache = tmp_path_factory.mktemp("family")

    def make(published: str) -> Path:
        learned = PUBLISHED_CONFIGS[published]["transformer"].get("use_learned_positional_embeddings")
        own_size = {"sample_height": HEIGHT // 8, "sample_width": WIDTH // 8, "sample_frames": NUM_FRAMES}
        spec = dataclasses.replace(SPEC, published=published, **(own_size if learned else {}))
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
    fields = {"height": HEIGHT, "width": WIDTH, "num_frames": NUM_FRAMES, "num_inference_steps": 3, "seed": 7}
    return GenerateRequest("a red circle", str(folder), "blue", **{**fields, "guidance_scale": 4.0, **changes})


def _stock(pipeline_class: str, request: GenerateRequest, **options) -> tuple[np.ndarray, np.ndarray]:
    """diffusers' latents, without padding frames, and frames."""
    import diffusers

    pipe = getattr(diffusers, pipeline_class).from_pretrained(request.checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if request.scheduler == "dpm":
        pipe.scheduler = diffusers.CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    if pipeline_class != "CogVideoXVideoToVideoPipeline":
        options["num_frames"] = request.num_frames
    with torch.no_grad():
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
        video = pipe.video_processor.postprocess_video(pipe.decode_latents(latents), output_type="np")[0]
    return torch_to_numpy(latents), video


def _generated(request: GenerateRequest, run_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """Our latents and frames, as the stages saved them."""
    generate(request, run_dir=run_dir)
    checkpoint = Checkpoint(request.checkpoint, Path(request.checkpoint))
    identities = checkpoint.identities(*STAGES)
    run = RequestRun(request, STAGES, run_dir, checkpoint, identities, RunOptions())
    return load_stage(run_dir, run.keys["denoise"])["latents"], load_stage(run_dir, run.keys["vae"])["frames"]


def _assert_same(actual: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_allclose(actual[0], expected[0], rtol=0, atol=LATENT_TOLERANCE)
    assert 0.05 < expected[1].std() < 0.45
    assert np.abs(actual[1] - 255 * expected[1]).max() <= 0.5 + 255 * FRAME_TOLERANCE


@pytest.mark.compile
@pytest.mark.parametrize("model", ["cogvideox-2b", "cogvideox-5b"])
def test_text_to_video(model, folder_of, tmp_path):
    request = _request(folder_of(MODELS[model].checkpoint))
    _assert_same(_generated(request, tmp_path / "run"), _stock("CogVideoXPipeline", request))


@pytest.mark.compile
@pytest.mark.parametrize("model", ["cogvideox-5b-i2v", "cogvideox1.5-5b-i2v"])
def test_image_to_video(model, folder_of, picture, tmp_path):
    from diffusers.utils import load_image

    request = _request(folder_of(MODELS[model].checkpoint), image=str(picture), scheduler="dpm", use_dynamic_cfg=True)
    expected = _stock("CogVideoXImageToVideoPipeline", request, image=load_image(str(picture)))
    _assert_same(_generated(request, tmp_path / "run"), expected)


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
    _assert_same(_generated(request, tmp_path / "run"), expected)


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
