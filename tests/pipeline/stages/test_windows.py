"""Videos longer than the model's: windows cover them evenly, and a step is that of the blended outputs of all."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoints.checks import check_request
from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.checkpoints.tiny import TRAINED_FOLDER, TinySpec, ensure_tiny_checkpoint
from pipeline.model.latents import rotary_embedding
from pipeline.requests.errors import RequestError
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.stages.denoise import Denoiser
from pipeline.stages.progress import StageClock
from pipeline.stages.resume import StateFile
from pipeline.stages.windows import Windows

LATENT_TOLERANCE = 2e-4  # see test_stages.py
VAE = {"block_out_channels": (1, 1, 1, 1), "temporal_compression_ratio": 4}
V1_5 = {"patch_size_t": 2, "patch_size": 2, "out_channels": 16}
V1 = {**V1_5, "patch_size_t": None}


def _request(**changes) -> GenerateRequest:
    fields = {"height": 48, "width": 80, "num_inference_steps": 2, "guidance_scale": 4.0, "seed": 7}
    return GenerateRequest("a", **{**fields, **changes})


@pytest.mark.parametrize(
    ("transformer", "num_frames", "context_frames", "context_overlap", "size", "starts"),
    [
        (V1_5, 161, 81, 16, 22, (0, 18, 20)),
        (V1_5, 241, 81, 16, 22, (0, 18, 36, 40)),
        (V1, 97, 49, 16, 13, (0, 9, 12)),
        (V1, 97, 49, 0, 13, (0, 12)),
        (V1, 49, 49, 16, 13, (0,)),
        (V1, 49, None, 16, 13, (0,)),
        (V1_5, 81, 97, 16, 22, (0,)),
    ],
)
def test_windows_cover_the_video(transformer, num_frames, context_frames, context_overlap, size, starts, rng):
    request = _request(num_frames=num_frames, context_frames=context_frames, context_overlap=context_overlap)
    windows = Windows.from_request(request, transformer, VAE)
    assert (windows.seen.shape[1], windows.starts, windows.several) == (size, starts, len(starts) > 1)
    latents = rng.normal(size=windows.whole.shape).astype(np.float32)
    parts = windows.cut(latents)
    assert {part.shape for part in parts} == {windows.seen.shape}
    np.testing.assert_allclose(windows.blend(parts), latents, rtol=0, atol=1e-6)


def test_a_window_counts_less_towards_its_ends():
    windows = Windows.from_request(_request(num_frames=33, context_frames=17, context_overlap=8), V1, VAE)
    assert windows.starts == (0, 3, 4)
    shape = windows.seen.shape
    blended = windows.blend([np.full(shape, value, np.float32) for value in (0.0, 1.0, 1.0)])
    np.testing.assert_allclose(blended[0, :, 0, 0, 0], [0, 0, 0, 1 / 3, 3 / 4, 1, 1, 1, 1], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_frames": 48}, "context_frames=48: expected 8k [+] 1; the nearest is 41 or 49"),
        ({"context_frames": 49, "context_overlap": 12}, "context_overlap=12: expected a multiple of 8"),
        ({"context_frames": 17, "context_overlap": 24}, "context_overlap=24: expected a whole number from 0 to 16"),
        ({"context_frames": 17, "image": "a"}, "context_frames and image"),
    ],
)
def test_windows_that_cannot_be(changes, message):
    with pytest.raises(RequestError, match=message):
        _request(num_frames=97, **changes)


def test_a_model_for_49_frames_takes_more_in_windows():
    configs = {"text_encoder": {}, **PUBLISHED_CONFIGS["zai-org/CogVideoX-5b"]}
    request = GenerateRequest("a", "zai-org/CogVideoX-5b", num_frames=49)
    from pipeline.checkpoints.loading import with_defaults

    configs = {part: with_defaults(part, config) for part, config in configs.items()}
    with pytest.raises(RequestError, match="is for 49 frames; expected num_frames=49 or less, or context_frames=49"):
        check_request(dataclasses.replace(request, num_frames=97), configs)
    check_request(dataclasses.replace(request, num_frames=97, context_frames=49), configs)


def _stock(folder: Path, request: GenerateRequest, embeddings: np.ndarray, windows: Windows) -> np.ndarray:
    """diffusers' transformer on every window, its outputs blended, and one step of its scheduler on the whole."""
    from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    scheduler = CogVideoXDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(request.num_inference_steps)
    tables = rotary_embedding(windows.seen, transformer.config)
    assert tables is not None
    rotary, text = tuple(map(torch.from_numpy, tables)), torch.from_numpy(embeddings)
    generator = torch.Generator().manual_seed(request.seed)
    latents, x0, before = torch.randn(windows.whole.shape, generator=generator), None, None
    for timestep in scheduler.timesteps:
        parts = []
        for part in windows.cut(latents.numpy()):
            sample = torch.from_numpy(np.concatenate([part, part]))
            with torch.no_grad():
                output = transformer(sample, text, timestep.expand(2), image_rotary_emb=rotary, return_dict=False)[0]
            negative, positive = output.chunk(2)
            parts.append((negative + request.guidance_scale * (positive - negative)).numpy())
        blended = torch.from_numpy(windows.blend(parts))
        latents, x0 = scheduler.step(blended, x0, timestep, before, latents, generator=generator, return_dict=False)
        before = timestep
    return latents.numpy()


def _jumps(prompt: str, context_overlap: int) -> np.ndarray:
    """How much each frame of the tiny model's video of three windows differs from the one before: mean of 8-bit RGB."""
    from diffusers import CogVideoXPipeline

    request = GenerateRequest(prompt, num_frames=41, context_frames=17, context_overlap=context_overlap, seed=1001)
    pipe = CogVideoXPipeline.from_pretrained(TRAINED_FOLDER, dtype=torch.float32)
    windows = Windows.from_request(request, pipe.transformer.config, pipe.vae.config)
    tokens = pipe.transformer.config.max_text_seq_length
    positive, negative = pipe.encode_prompt(prompt, "", max_sequence_length=tokens)
    latents = _stock(TRAINED_FOLDER, request, torch.cat([negative, positive]).detach().numpy(), windows)
    with torch.no_grad():
        video = pipe.decode_latents(torch.from_numpy(latents[:, windows.whole.padding_frames :]))[0]
    return np.abs(np.diff(video.clamp(-1, 1).numpy() * 127.5, axis=1)).mean((0, 2, 3))


@pytest.mark.slow("40 s")
@pytest.mark.compile
def test_where_windows_meet_nothing_jumps():
    """Of what stands still, in a video of some two windows; those that do not overlap show their seam.

    Measured: at most 0.74 where they overlap, and 1.84 at the seam where they do not.
    """
    blended, cut = (_jumps("a blue square stands still", overlap) for overlap in (8, 0))
    assert blended.max() < 4 * np.median(blended)
    assert cut.max() > 2 * blended.max()


@pytest.mark.compile
def test_a_step_is_that_of_the_blended_outputs(tmp_path, rng):
    spec = TinySpec(1, 2, 32, 24, 20, 1, 7, vae_block_out_channels=(8, 8, 8, 8), published="zai-org/CogVideoX-5b")
    folder = ensure_tiny_checkpoint(tmp_path, spec)
    denoiser = Denoiser(Checkpoint("small", folder), torch.float32, AttentionOptions())
    request = _request(
        checkpoint=str(folder), num_frames=25, context_frames=9, context_overlap=8, scheduler="dpm", dtype="float32"
    )
    windows = denoiser.windows(request)
    assert windows.starts == (0, 1, 2, 3, 4)
    embeddings = rng.normal(size=(2, 7, 20)).astype(np.float32)
    actual = denoiser.denoise(request, embeddings)
    np.testing.assert_allclose(actual, _stock(folder, request, embeddings, windows), rtol=0, atol=LATENT_TOLERANCE)

    def interrupt(event) -> None:
        if event.step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoiser.denoise(request, embeddings, StageClock("denoise", interrupt), state_file=StateFile(tmp_path, "x"))
    resumed = denoiser.denoise(request, embeddings, state_file=StateFile(tmp_path, "x"))
    np.testing.assert_array_equal(resumed, actual)
