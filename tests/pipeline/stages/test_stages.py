"""The three stages against stock diffusers and transformers on the CPU in float32, on the same checkpoint and latents.

Tolerances: both sides compute in float32 and differ in the order of sums. Embeddings and latents are of order 1 to 8.
One step amplifies a rounding difference of about 1e-6 by the guidance scale (6); the largest difference seen over these
cases was 3e-5 for latents and 2e-5 for frames. 2e-4 and 1e-4 leave room for other processors, and are far below the
1/255 of one grey level. A wrong rotary embedding, a swapped prompt or a shifted frame differs by 0.01 to 10.
"""

import gc
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from helpers import PLENTY_S
from pipeline.model.denoise_step import DenoiseStep
from pipeline.model.latents import LatentGeometry
from pipeline.model.vae.decoder import DecoderShape
from pipeline.requests.errors import NonFiniteError
from pipeline.requests.request import AttentionOptions
from pipeline.stages.denoise import Denoiser
from pipeline.stages.progress import StageClock
from pipeline.stages.text import TextEncoder
from pipeline.stages.vae import VaeDecoder, decode_program, latent_sharding, pays_in_pairs

pytestmark = pytest.mark.compile

TEXT_SEQ_LEN = 19  # of the session's checkpoint
LATENT_TOLERANCE = 2e-4
FRAME_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return TextEncoder(checkpoint, torch.float32)


@pytest.fixture(scope="module")
def denoiser(checkpoint):
    return Denoiser(checkpoint, torch.float32, AttentionOptions())


@pytest.fixture(scope="module")
def decoder(checkpoint):
    return VaeDecoder(checkpoint, torch.float32)


def _stock(stock, request, **options):
    return stock(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        height=request.height,
        width=request.width,
        num_frames=request.num_frames,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        use_dynamic_cfg=request.use_dynamic_cfg,
        generator=torch.Generator().manual_seed(request.seed),
        max_sequence_length=TEXT_SEQ_LEN,
        **options,
    ).frames


def _embeddings(encoder, request):
    prompts = [request.negative_prompt, request.prompt] if request.do_classifier_free_guidance else [request.prompt]
    return encoder.encode(prompts)


def test_embeddings(encoder, stock):
    prompts = ["a red circle moves right", "", "Zürich: 3 squares"]
    actual = encoder.encode(prompts)
    expected, _ = stock.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_SEQ_LEN)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=LATENT_TOLERANCE)
    assert actual.shape == (3, TEXT_SEQ_LEN, 20)


def test_a_long_prompt_is_cut_with_a_warning(encoder, stock, caplog):
    prompt = "a red circle " * 9 + "moves away"
    with caplog.at_level(logging.WARNING, "pipeline"):
        actual = encoder.encode([prompt])
    assert "longer than 19 tokens" in caplog.text
    assert "the last 24 are cut: 'red circle" in caplog.text
    expected, _ = stock.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=TEXT_SEQ_LEN)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=LATENT_TOLERANCE)


def test_a_very_long_prompt_is_one_short_line(encoder, caplog):
    with caplog.at_level(logging.WARNING, "pipeline"):
        encoder.encode(["a red circle " * 500])
    (message,) = caplog.messages
    assert len(message) < 200 and "longer than 19 tokens; the last 1982 are cut: 'red" in message


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"negative_prompt": "blue square", "num_frames": 17, "seed": 11},
        {"guidance_scale": 1.0},
        {"use_dynamic_cfg": True},
        {"scheduler": "dpm", "num_inference_steps": 4},
        {"num_inference_steps": 1, "num_frames": 1},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()) or "default",
)
def test_latents(changes, encoder, denoiser, stock, request_of, monkeypatch):
    from diffusers import CogVideoXDPMScheduler

    request = request_of(**changes)
    if request.scheduler == "dpm":
        monkeypatch.setattr(stock, "scheduler", CogVideoXDPMScheduler.from_config(stock.scheduler.config))
    actual = denoiser.denoise(request, _embeddings(encoder, request))
    latents = _stock(stock, request, output_type="latent").numpy()
    num_frames = (request.num_frames - 1) // 4 + 1
    assert latents.shape[1] == num_frames + 1  # padded to whole temporal patches; the first frame is dropped
    np.testing.assert_allclose(actual, latents[:, 1:], rtol=0, atol=LATENT_TOLERANCE)


def test_given_latents_replace_the_seed(encoder, denoiser, stock, request_of, rng):
    request = request_of()
    noise = rng.normal(size=(1, 4, 16, 6, 10)).astype(np.float32)
    actual = denoiser.denoise(request, _embeddings(encoder, request), latents=noise)
    expected = _stock(stock, request, output_type="latent", latents=torch.from_numpy(noise)).numpy()[:, 1:]
    np.testing.assert_allclose(actual, expected, rtol=0, atol=LATENT_TOLERANCE)


def _latents(rng, num_frames):
    # Of the size that the requests here have, so that the programs are compiled once for all tests.
    return rng.normal(size=(1, num_frames, 16, 6, 10)).astype(np.float32)


@pytest.mark.parametrize("num_latent_frames", [1, pytest.param(3, marks=pytest.mark.slow("12 s")), 5])
def test_frames(num_latent_frames, decoder, stock, rng):
    latents = _latents(rng, num_latent_frames)
    actual = decoder.decode(latents, quantize=False)
    video = stock.decode_latents(torch.from_numpy(latents))
    expected = stock.video_processor.postprocess_video(video, output_type="np")[0]
    assert 0.05 < expected.std() < 0.45, "frames that are all black or white would agree anyhow"
    np.testing.assert_allclose(actual, expected, rtol=0, atol=FRAME_TOLERANCE)


@pytest.mark.parametrize(
    ("kind", "channels", "expected"), [("TPU v6 lite", 128, True), ("TPU v5", 128, False), ("TPU7x", 256, False)]
)
def test_frames_are_paired_where_channels_fill_half_of_a_matrix_unit(kind, channels, expected):
    device = SimpleNamespace(device_kind=kind)
    weights = {"decoder.conv_out.conv.weight": np.zeros((3, 3, 3, channels, 3))}
    shape = DecoderShape(num_levels=4, num_resnets=4, num_groups=32, time_levels=2, scaling_factor=0.7)
    assert pays_in_pairs(weights, shape, device) is expected


def test_eight_bit_frames_are_rounded(decoder, rng):
    latents = _latents(rng, 3)  # as many as in the runs of other files: a program that is compiled
    actual, expected = decoder.decode(latents), decoder.decode(latents, quantize=False)
    assert actual.dtype == np.uint8
    assert np.abs(actual - expected * 255).max() <= 0.5 + 255 * FRAME_TOLERANCE


def test_prompt_to_frames(encoder, denoiser, decoder, stock, request_of):
    request = request_of(negative_prompt="blue")
    latents = denoiser.denoise(request, _embeddings(encoder, request))
    expected = _stock(stock, request, output_type="np")[0]
    assert expected.shape == (9, 48, 80, 3)
    np.testing.assert_allclose(decoder.decode(latents, quantize=False), expected, rtol=0, atol=FRAME_TOLERANCE)


def test_bfloat16_runs_and_is_near(checkpoint, encoder, denoiser, request_of):
    request = request_of(dtype="bfloat16")
    low = TextEncoder(checkpoint, torch.bfloat16)
    embeddings = _embeddings(low, request)
    assert embeddings.dtype.name == "bfloat16"
    latents = Denoiser(checkpoint, torch.bfloat16, AttentionOptions()).denoise(request, embeddings)
    assert latents.dtype.name == "bfloat16"
    frames = VaeDecoder(checkpoint, torch.bfloat16).decode(latents[:, :1])
    assert frames.shape == (1, 48, 80, 3)
    # The float32 pipeline on the same (bfloat16) noise; 8 bits of mantissa through 3 steps of guidance 6.
    noise = torch.randn(1, 4, 16, 6, 10, generator=torch.Generator().manual_seed(7), dtype=torch.bfloat16)
    reference = denoiser.denoise(request_of(), _embeddings(encoder, request), latents=noise.float().numpy())
    error = np.linalg.norm(latents.astype(np.float32) - reference) / np.linalg.norm(reference)
    assert error < 0.05


def test_one_compilation_serves_any_number_of_steps(encoder, checkpoint, request_of):
    denoiser = Denoiser(checkpoint, torch.float32, AttentionOptions())
    embeddings = _embeddings(encoder, request_of())
    first, second = StageClock("denoise"), StageClock("denoise")
    denoiser.denoise(request_of(num_inference_steps=2), embeddings, first)
    denoiser.denoise(request_of(num_inference_steps=5, seed=8, guidance_scale=3.0), embeddings, second)
    assert first.timings.compile_time_s > 0
    assert second.timings.compile_time_s == 0
    assert (len(first.timings.step_times_s), len(second.timings.step_times_s)) == (2, 5)


def test_compiling_is_not_counted_as_running(checkpoint, rng):
    events = []
    clock = StageClock("vae", events.append)
    VaeDecoder(checkpoint, torch.float32).decode(_latents(rng, 5), clock, quantize=False)
    assert [event.phase for event in events] == ["compile", "run", "run", "run"]
    assert sum(clock.timings.step_times_s) <= clock.timings.run_time_s


def test_two_programs_decode_any_length(decoder, rng):
    decoder.decode(_latents(rng, 5), quantize=False)
    clock = StageClock("vae")
    decoder.decode(_latents(rng, 9), clock, quantize=False)
    assert clock.timings.compile_time_s == 0
    assert len(clock.timings.step_times_s) == 4


def test_no_cache_is_kept_for_convolutions_without_extent_in_time(checkpoint, rng):
    decoder = VaeDecoder(checkpoint, torch.float32)
    latents = jnp.asarray(rng.normal(size=(1, 3, 16, 2, 2)), jnp.float32)
    program = decode_program(decoder._shape, True, latent_sharding(latents.shape, jax.devices()))
    _, cache, _ = jax.eval_shape(program, decoder._weights, latents, None)
    assert "decoder.conv_in" in cache
    assert not [name for name in cache if "conv_y" in name or "conv_b" in name]
    # Two frames of each; on this machine those of the last level are one pair, of twice the channels.
    pairs = {name: leaf.shape[-1] for name, leaf in cache.items() if leaf.shape[1] != 2}
    channels = decoder._weights["decoder.conv_out.conv.weight"].shape[3]
    last = f"decoder.up_blocks.{decoder._shape.num_levels - 1}.resnets.0"
    assert pairs == dict.fromkeys([f"{last}.conv1", f"{last}.conv2", "decoder.conv_out"], 2 * channels)
    assert {cache[name].shape[1] for name in pairs} == {1}


_START = """
import collections, json, sys
import jax, torch
from pathlib import Path
from pipeline.checkpoints.loading import Checkpoint
from splash_workbench.compile_cache import use_compilation_cache
from pipeline.stages.text import TextEncoder

use_compilation_cache(Path(sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the small encoder compiles in less than JAX's 1 s
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
embeddings = TextEncoder(Checkpoint("small", Path(sys.argv[2])), torch.float32).encode(["a red circle"])
print(json.dumps({**events, "embeddings": embeddings.tolist()}))
"""


@pytest.mark.slow("40 s")  # by default in predict/test_ahead.py, of programs that were compiled before the first start
def test_a_second_start_finds_its_programs_compiled(tiny_folder, tmp_path):
    def start():
        command = [sys.executable, "-c", _START, str(tmp_path / "compiled"), str(tiny_folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PLENTY_S)
        return json.loads(done.stdout.splitlines()[-1])

    first, second = start(), start()
    assert first["cache_misses"] >= 1
    assert "cache_hits" not in first
    assert second["cache_hits"] >= 1
    assert second["embeddings"] == first["embeddings"]


def test_a_denoiser_knows_the_compiler_options_of_the_last_requests_steps(encoder, denoiser, request_of, monkeypatch):
    """Also of steps that were compiled for a request before."""
    denoiser.denoise(request_of(), _embeddings(encoder, request_of()))
    monkeypatch.setattr(DenoiseStep, "options", lambda step, weights: {"flag": str(step.guided)})
    denoiser.denoise(request_of(), _embeddings(encoder, request_of()))
    assert denoiser.compiler_options == {"computed": {"flag": "True"}}


def test_progress_hears_every_step_and_may_interrupt(encoder, denoiser, request_of):
    request = request_of(num_inference_steps=6)
    embeddings = _embeddings(encoder, request)
    events = []
    denoiser.denoise(request, embeddings, StageClock("denoise", events.append))
    steps = [(event.step, event.total_steps) for event in events if event.phase == "run" and event.total_steps]
    assert steps == [(step, 6) for step in range(7)]
    assert all(event.step_time_s > 0 for event in events if event.step)

    def interrupt(event):
        if event.step == 2:
            raise InterruptedError

    clock = StageClock("denoise", interrupt)
    with pytest.raises(InterruptedError):
        denoiser.denoise(request, embeddings, clock)
    assert len(clock.timings.step_times_s) == 2


def test_nan_names_stage_and_step(encoder, denoiser, decoder, request_of, rng):
    request = request_of()
    noise = np.full((1, 4, 16, 6, 10), np.nan, np.float32)
    with pytest.raises(NonFiniteError, match="denoise: step 1 of 3: the latents hold NaN or infinity"):
        denoiser.denoise(request, _embeddings(encoder, request), latents=noise)
    latents = _latents(rng, 5)
    latents[:, 3] = np.inf
    with pytest.raises(NonFiniteError, match=r"vae: batch 2 of 2 \(latent frames 3 to 4\)"):
        decoder.decode(latents, quantize=False)


def test_nan_weights_stop_the_text_stage(checkpoint):
    encoder = TextEncoder(checkpoint, torch.float32)
    encoder._weights["shared.weight"] *= np.nan
    with pytest.raises(NonFiniteError, match="text: the embeddings hold NaN"):
        encoder.encode(["a cat"])


def test_dropping_a_stage_frees_its_weights(checkpoint, encoder, request_of):
    def held():
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    before = held()
    denoiser = Denoiser(checkpoint, torch.float32, AttentionOptions())
    denoiser.denoise(request_of(num_inference_steps=1), _embeddings(encoder, request_of()))
    assert held() > before + 1_000_000
    del denoiser
    assert held() <= before


def test_geometry_of_the_full_model(request_of):
    request = request_of(height=720, width=1280, num_frames=81)
    transformer = {"out_channels": 16, "patch_size_t": 2, "patch_size": 2}
    vae = {"block_out_channels": [128, 256, 256, 512], "temporal_compression_ratio": 4}
    geometry = LatentGeometry.from_request(request, transformer, vae)
    assert (geometry.num_frames, geometry.padding_frames) == (21, 1)
    assert geometry.shape == (1, 22, 16, 90, 160)


def test_the_pallas_kernel_in_the_pipeline(checkpoint, encoder, denoiser, request_of):
    """The TPU kernel, interpreted. It multiplies in bfloat16 (8 bits), which one step of guidance 6 amplifies."""
    request = request_of(num_inference_steps=1)
    embeddings = _embeddings(encoder, request)
    interpreted = Denoiser(checkpoint, torch.float32, AttentionOptions(implementation="pallas_interpret"))
    expected = denoiser.denoise(request, embeddings)
    error = interpreted.denoise(request, embeddings) - expected
    assert 0 < np.linalg.norm(error) / np.linalg.norm(expected) < 0.02
