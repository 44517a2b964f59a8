"""The stages under JAX beside stock diffusers in torch: same checkpoint, same inputs, float32, on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from pipeline.checkpoints.loading import Checkpoint, load_module
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.stages.denoise import Denoiser
from pipeline.stages.text import TextEncoder
from pipeline.stages.vae import VaeDecoder

SMALL = TinySpec(num_layers=2, num_attention_heads=3, vae_block_out_channels=(8, 8, 16, 16))
#: Enough weights to be worth timing; only its transformer is loaded.
HEAVY = TinySpec(num_layers=4, num_attention_heads=8)
STEPS, ROUNDS = 2, 5
STOCK, OURS = "diffusers, torch", "pipeline, JAX"
SIDES = (STOCK, OURS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny_checkpoint(tmp_path_factory.mktemp("cache"), SMALL)


@pytest.fixture(scope="module")
def heavy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny_checkpoint(tmp_path_factory.mktemp("heavy"), HEAVY)


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(name="small", folder=folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def request_(folder: Path) -> GenerateRequest:
    return GenerateRequest(
        prompt="a red circle moves right",
        checkpoint=str(folder),
        height=48,
        width=80,
        num_frames=9,
        num_inference_steps=STEPS,
        dtype="float32",
        seed=7,
    )


@pytest.fixture(scope="module")
def embeddings(checkpoint: Checkpoint, request_: GenerateRequest) -> np.ndarray:
    encoder = TextEncoder(checkpoint, torch.float32)
    return encoder.encode([request_.negative_prompt, request_.prompt])


@pytest.fixture(scope="module")
def denoiser(checkpoint: Checkpoint) -> Denoiser:
    return Denoiser(checkpoint, torch.float32, AttentionOptions())


@pytest.fixture(scope="module")
def decoder(checkpoint: Checkpoint) -> VaeDecoder:
    return VaeDecoder(checkpoint, torch.float32)


@pytest.mark.parametrize("side", SIDES)
def test_denoise(
    beside: Callable[..., Any],
    denoiser: Denoiser,
    stock: Any,
    request_: GenerateRequest,
    embeddings: np.ndarray,
    side: str,
) -> None:
    negative, positive = (torch.from_numpy(x[None].copy()) for x in embeddings)

    def ours() -> np.ndarray:
        return denoiser.denoise(request_, embeddings)

    @torch.no_grad()
    def theirs() -> np.ndarray:
        latents = stock(
            prompt_embeds=positive,
            negative_prompt_embeds=negative,
            height=request_.height,
            width=request_.width,
            num_frames=request_.num_frames,
            num_inference_steps=STEPS,
            guidance_scale=request_.guidance_scale,
            generator=torch.Generator().manual_seed(request_.seed),
            output_type="latent",
        ).frames.numpy()
        return latents[:, 1:]  # the first is padding

    calls = {STOCK: theirs, OURS: ours}
    result = beside(
        calls[side],
        group=f"denoise, {STEPS} guided steps, {request_.width}x{request_.height}, {request_.num_frames} frames",
        name=side,
        baseline=side == STOCK,
        rounds=ROUNDS,
    )
    if side == OURS:
        np.testing.assert_allclose(result, theirs(), rtol=0, atol=2e-4)  # as in tests/pipeline/stages/test_stages.py


@pytest.mark.parametrize("side", SIDES)
def test_vae_decode(beside: Callable[..., Any], decoder: VaeDecoder, stock: Any, side: str) -> None:
    latents = np.random.default_rng(5).normal(size=(1, 3, 16, 6, 10)).astype(np.float32)

    def ours() -> np.ndarray:
        return decoder.decode(latents, quantize=False)

    @torch.no_grad()
    def theirs() -> np.ndarray:
        video = stock.decode_latents(torch.from_numpy(latents))
        return (video[0].permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1).numpy()

    calls = {STOCK: theirs, OURS: ours}
    group = "VAE decode, 9 frames of 80x48"
    result = beside(calls[side], group=group, name=side, baseline=side == STOCK, rounds=ROUNDS)
    if side == OURS:
        np.testing.assert_allclose(result, theirs(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", SIDES)
def test_load(beside: Callable[..., Any], heavy_folder: Path, side: str) -> None:
    from diffusers import CogVideoXTransformer3DModel

    checkpoint, folder = Checkpoint(name="heavy", folder=heavy_folder), heavy_folder
    size = sum(path.stat().st_size for path in (folder / "transformer").glob("*.safetensors")) / 1e6

    def ours() -> int:
        return sum(x.size for x in jax.tree.leaves(load_module(checkpoint, "transformer", torch.float32).weights))

    def theirs() -> int:
        module = CogVideoXTransformer3DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
        return sum(x.numel() for x in module.parameters())

    calls = {STOCK: theirs, OURS: ours}
    group = f"load the transformer's weights, {size:.0f} MB of safetensors, in the page cache"
    result = beside(calls[side], group=group, name=side, baseline=side == STOCK, amount=size, unit="MB")
    assert result == calls[STOCK if side == OURS else OURS]()
