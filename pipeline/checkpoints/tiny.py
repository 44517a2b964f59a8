"""Small checkpoints of the CogVideoX models' shapes in diffusers' layout.

The trained one (`TRAINED_FOLDER`, made by `pipeline.train_tiny`) follows captions of drawn shapes. The random one is
made where it is wanted, always the same for one `TinySpec`: for tests of parity, which ask nothing of the picture.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.checkpoints.published import COGVIDEOX_1_5_5B, PUBLISHED_CONFIGS
from pipeline.checkpoints.shapes import COLOURS, MOTIONS, SHAPES
from pipeline.checkpoints.weight_files import STEMS, saved_weights
from pipeline.model.noise_schedule import build_scheduler
from splash_workbench.files import ensure_folder

TRAINED_FOLDER = Path(__file__).parents[1] / "tiny_model"
_FORMAT = 1  # counts up when the files written for one TinySpec change
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,;:!?'\"-()/&%+"


@dataclasses.dataclass(frozen=True)
class TinySpec:
    """Sizes of the tiny checkpoint. Patches, positions, an image's channels and the scheduler are those of `published`.

    sample_height, sample_width: the latents that a model with positions of its own is for; None for all as published.
    """

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
    published: str = "zai-org/CogVideoX1.5-5B"
    sample_height: int | None = None
    sample_width: int | None = None
    sample_frames: int | None = None

    @property
    def configs(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the configurations of the published model."""
        return PUBLISHED_CONFIGS[self.published]

    @property
    def name(self) -> str:
        """Return a folder name that differs wherever the content does."""
        described = json.dumps([_FORMAT, dataclasses.asdict(self)], sort_keys=True)
        return f"tiny-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def ensure_tiny_checkpoint(cache_dir: Path, spec: TinySpec | None = None) -> Path:
    """Return the folder of the tiny checkpoint under `cache_dir`, made if it is not there.

    Renamed when complete, so that a folder of its name is always whole, also with several processes at it.
    """
    spec = spec or TinySpec()

    def write(folder: Path) -> None:
        with torch.random.fork_rng(devices=[]):
            modules = build_modules(spec)
        for seed, module in enumerate(modules.values(), start=spec.seed):
            _randomize(module, seed)
        write_checkpoint(folder, modules, configs=spec.configs)

    return ensure_folder(cache_dir / spec.name, write)


def build_modules(spec: TinySpec) -> dict[str, Any]:
    """Build the stock modules "text_encoder", "transformer" and "vae" of a spec, as their libraries initialize them."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    text_config = T5Config(
        vocab_size=len(build_tokenizer()),
        d_model=spec.text_embed_dim,
        d_kv=16,
        d_ff=2 * spec.text_embed_dim,
        num_layers=spec.text_layers,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        architectures=["T5EncoderModel"],
    )
    names = (
        *("num_layers", "num_attention_heads", "attention_head_dim", "time_embed_dim", "text_embed_dim"),
        *("max_text_seq_length", "sample_height", "sample_width", "sample_frames"),
    )
    sizes = {name: value for name in names if (value := getattr(spec, name)) is not None}
    published = spec.configs["transformer"]
    if "ofs_embed_dim" in published:
        sizes["ofs_embed_dim"] = spec.time_embed_dim
    channels, layers = spec.vae_block_out_channels, spec.vae_layers_per_block
    vae_sizes = {"block_out_channels": channels, "layers_per_block": layers, "norm_num_groups": 8}
    return {
        "text_encoder": T5EncoderModel(text_config),
        "transformer": CogVideoXTransformer3DModel.from_config({**published, **sizes}),
        "vae": AutoencoderKLCogVideoX.from_config({**spec.configs["vae"], **vae_sizes}),
    }


def write_checkpoint(
    folder: Path,
    modules: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    configs: Mapping[str, Mapping[str, Any]] = COGVIDEOX_1_5_5B,
) -> None:
    """Write modules, tokenizer and scheduler to a folder. dtype: of the weights in the files. configs: published."""
    build_tokenizer().save_pretrained(folder / "tokenizer")
    build_scheduler(configs["scheduler"]).save_pretrained(folder / "scheduler")
    modules["text_encoder"].config.save_pretrained(folder / "text_encoder")
    for part in ("transformer", "vae"):
        modules[part].save_config(folder / part)
    for part, stem in STEMS.items():
        weights = {name: value.detach().to(dtype).contiguous() for name, value in saved_weights(modules[part])}
        save_file(weights, folder / part / f"{stem}.safetensors", metadata={"format": "pt"})
    config = modules["transformer"].config
    from_image = config["in_channels"] != config["out_channels"]
    index = {
        "_class_name": "CogVideoXImageToVideoPipeline" if from_image else "CogVideoXPipeline",
        "scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _randomize(module: torch.nn.Module, seed: int) -> None:
    """Fill every weight from a generator seeded here, by name: the same whatever the library's default."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(saved_weights(module)):
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = (0.0 if name.endswith("bias") else 1.0) + 0.1 * value  # 1: a norm's scale
        elif not name.endswith("pos_embedding"):  # which is added to values of order 1
            value /= parameter[0].numel() ** 0.5  # the fan-in
        if name == "decoder.conv_out.conv.weight":
            value *= 0.3  # most pixels then lie within [0, 1], as a trained decoder's do
        parameter.data.copy_(value)


def build_tokenizer() -> Any:
    """Build a T5 tokenizer of the prompts' words and all letters. Not trained: training is not the same twice."""
    from transformers import T5Tokenizer

    words = " ".join(("a", *COLOURS, *SHAPES, *MOTIONS)).split()
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -4.0) for word in dict.fromkeys(words) if len(word) > 1]
    vocab += [(letter, -8.0) for letter in _LETTERS]
    return T5Tokenizer(vocab=vocab, extra_ids=100, model_max_length=512)
