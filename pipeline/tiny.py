"""A small random checkpoint of CogVideoX 1.5's shape in diffusers' layout, always the same for one `TinySpec`."""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_FORMAT = 1  # counts up when the files written for one TinySpec change

# What the tokenizer knows: the words of prompts about drawn shapes, and every letter on its own.
_COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
_SHAPES = ("circle", "square", "triangle", "star")
_MOVES = ("moves left", "moves right", "moves up", "moves down", "stands still", "grows", "shrinks")
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()/&%+"


@dataclasses.dataclass(frozen=True)
class TinySpec:
    """Sizes of the tiny checkpoint. What makes it CogVideoX 1.5 (patches, rotary, scheduler) is fixed, not here."""

    num_layers: int = 2
    num_attention_heads: int = 4
    attention_head_dim: int = 64
    time_embed_dim: int = 64
    text_embed_dim: int = 64
    text_layers: int = 2
    max_text_seq_length: int = 226
    vae_block_out_channels: tuple[int, int, int, int] = (16, 32, 32, 32)
    vae_layers_per_block: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        """A folder name that differs wherever the content does."""
        described = json.dumps([_FORMAT, dataclasses.asdict(self)], sort_keys=True)
        return f"tiny-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def ensure_tiny_checkpoint(cache_dir: Path, spec: TinySpec | None = None) -> Path:
    """The folder of the tiny checkpoint under `cache_dir`, made if it is not there.

    It is made under a temporary name and renamed when complete, so that a folder of its name is always whole, also
    with several processes at it.
    """
    spec = spec or TinySpec()
    folder = cache_dir / spec.name
    if folder.is_dir():
        return folder
    cache_dir.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{spec.name}-", dir=cache_dir))
    try:
        _write(building, spec)
        building.chmod(0o755)
        try:
            os.rename(building, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _write(folder: Path, spec: TinySpec) -> None:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    tokenizer = _tokenizer()
    text_config = T5Config(
        vocab_size=len(tokenizer),
        d_model=spec.text_embed_dim,
        d_kv=16,
        d_ff=2 * spec.text_embed_dim,
        num_layers=spec.text_layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        architectures=["T5EncoderModel"],
    )
    with torch.random.fork_rng(devices=[]):
        text_encoder = T5EncoderModel(text_config)
        transformer = CogVideoXTransformer3DModel(**_transformer_config(spec))
        vae = AutoencoderKLCogVideoX(**_vae_config(spec))
    modules: tuple[torch.nn.Module, ...] = (text_encoder, transformer, vae)
    for offset, module in enumerate(modules):
        _randomize(module, spec.seed + offset)
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085,
        beta_end=0.0120,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    text_config.save_pretrained(folder / "text_encoder")
    transformer.save_config(folder / "transformer")
    vae.save_config(folder / "vae")
    _save_weights(text_encoder, folder / "text_encoder" / "model.safetensors")
    _save_weights(transformer, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    _save_weights(vae, folder / "vae" / "diffusion_pytorch_model.safetensors")
    index = {
        "_class_name": "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _transformer_config(spec: TinySpec) -> dict[str, Any]:
    return {
        "num_attention_heads": spec.num_attention_heads,
        "attention_head_dim": spec.attention_head_dim,
        "in_channels": 16,
        "out_channels": 16,
        "time_embed_dim": spec.time_embed_dim,
        "text_embed_dim": spec.text_embed_dim,
        "num_layers": spec.num_layers,
        "sample_width": 300,
        "sample_height": 300,
        "sample_frames": 81,
        "patch_size": 2,
        "patch_size_t": 2,
        "patch_bias": False,
        "max_text_seq_length": spec.max_text_seq_length,
        "use_rotary_positional_embeddings": True,
    }


def _vae_config(spec: TinySpec) -> dict[str, Any]:
    return {
        "block_out_channels": spec.vae_block_out_channels,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "latent_channels": 16,
        "layers_per_block": spec.vae_layers_per_block,
        "norm_num_groups": 8,
        "temporal_compression_ratio": 4,
        "scaling_factor": 0.7,
    }


def _randomize(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter from a generator of our own, by name: the same whatever the library's default."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        if parameter.ndim == 1:
            centre = 0.0 if name.endswith("bias") else 1.0  # a norm's scale
            value = centre + 0.1 * torch.randn(parameter.shape, generator=generator)
        else:
            fan_in = parameter[0].numel()
            value = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
        if name == "decoder.conv_out.conv.weight":
            value *= 0.3  # most pixels then lie within [0, 1], as a trained decoder's do
        parameter.data.copy_(value)


def _tokenizer() -> Any:
    """A T5 tokenizer of the prompts' words and all letters. Not trained: training is not the same twice."""
    from transformers import T5Tokenizer

    words = " ".join(("a", *_COLOURS, *_SHAPES, *_MOVES)).split()
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -4.0) for word in dict.fromkeys(words) if len(word) > 1]
    vocab += [(letter, -8.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=vocab, extra_ids=100, model_max_length=512)


def _save_weights(module: torch.nn.Module, path: Path) -> None:
    save_file({name: value.detach() for name, value in module.named_parameters()}, path, metadata={"format": "pt"})
