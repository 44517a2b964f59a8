"""A checkpoint smaller still than the default tiny one, and stock diffusers' pipeline on it, once a session."""

from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import set_aside
from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.requests.request import GenerateRequest

SPEC = TinySpec(
    num_layers=2,
    num_attention_heads=3,
    attention_head_dim=64,
    time_embed_dim=24,
    text_embed_dim=20,
    text_layers=1,
    max_text_seq_length=19,
    vae_block_out_channels=(8, 8, 16, 16),
)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ensure_tiny_checkpoint(tmp_path_factory.mktemp("cache"), SPEC)
    set_aside()
    return folder


@pytest.fixture(scope="session")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    return Checkpoint(name="small", folder=tiny_folder)


@pytest.fixture(scope="session")
def stock(tiny_folder: Path):
    """diffusers' own pipeline on the same checkpoint: torch, CPU, float32, its own attention."""
    from diffusers import CogVideoXPipeline

    pipe = CogVideoXPipeline.from_pretrained(tiny_folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        yield pipe


@pytest.fixture
def stock_latents(stock):
    """Makes diffusers' latents of a request; hooks set on its transformer's blocks are taken off again."""

    def make(request: GenerateRequest) -> np.ndarray:
        with torch.no_grad():
            return stock(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt,
                height=request.height,
                width=request.width,
                num_frames=request.num_frames,
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                generator=torch.Generator().manual_seed(request.seed),
                max_sequence_length=SPEC.max_text_seq_length,
                output_type="latent",
            ).frames.numpy()

    yield make
    for block in stock.transformer.transformer_blocks:
        registry = getattr(block, "_diffusers_hook", None)
        for name in list(registry.hooks) if registry is not None else ():
            registry.remove_hook(name, recurse=False)


@pytest.fixture
def request_of(tiny_folder: Path):
    """Makes a small request; keyword arguments change it."""

    def make(**changes) -> GenerateRequest:
        values = {
            "prompt": "a red circle moves right",
            "checkpoint": str(tiny_folder),
            "height": 48,
            "width": 80,
            "num_frames": 9,
            "num_inference_steps": 3,
            "seed": 7,
            **changes,
        }
        return GenerateRequest(**values)

    return make


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)
