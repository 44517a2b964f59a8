"""Trains what changes the tiny model: a LoRA that draws outlines, and its image-to-video sibling."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.checkpoints.loading import resolve_checkpoint
from pipeline.checkpoints.shapes import OUTLINE_WIDTH
from pipeline.checkpoints.tiny_i2v import LORA_NAME, WHOLE_NAME, i2v_config
from pipeline.train_tiny.config import DrawnClips, TrainTinyConfig, begin, optimize_transformer, write_provenance
from splash_workbench.errors import UserError

_ATTENTION_AND_FF = re.compile(r"transformer_blocks\.\d+\.(attn1\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))")
_OF_BLOCKS = re.compile(r"transformer_blocks\..+")
#: Of the image-to-video model, what is trained whole: what the tiny model has not or in another shape, and the output.
_WHOLE = ("patch_embed.proj.", "ofs_embedding.", "proj_out.")
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


class LoraLinear(torch.nn.Module):
    """A linear layer that stays as it is, and the product of two matrices beside it, which begins at 0."""

    def __init__(self, linear: torch.nn.Linear, rank: int):
        super().__init__()
        self.base = linear
        self.lora_A = torch.nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = torch.nn.Linear(rank, linear.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def add_lora(transformer: torch.nn.Module, rank: int, names: re.Pattern[str]) -> None:
    """Put a LoRA beside the linear layers of these names in a transformer, all else of which is frozen."""
    transformer.requires_grad_(False)
    for name, module in list(transformer.named_modules()):
        if isinstance(module, torch.nn.Linear) and names.fullmatch(name):
            parent, _, child = name.rpartition(".")
            setattr(transformer.get_submodule(parent), child, LoraLinear(module, rank))


def lora_weights(transformer: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return the LoRA's factors in float16, under PEFT's names."""
    named = transformer.named_parameters()
    return {prefix + name: value.detach().half().contiguous() for name, value in named if ".lora_" in name}


def train_outline(settings: TrainTinyConfig) -> None:
    """Train the LoRA that draws outlines and write it, in the names of diffusers."""
    parts = _base(settings)
    clips = DrawnClips(settings, begin(settings), OUTLINE_WIDTH)
    add_lora(parts["transformer"], settings.rank, _ATTENTION_AND_FF)
    made = _train(parts, clips)
    _write("LoRA", settings, {DIFFUSERS_NAME: lora_weights(parts["transformer"], "transformer.")}, made)


def train_image_to_video(settings: TrainTinyConfig) -> None:
    """Train the image-to-video model, and write what changes of the base: see `checkpoints.tiny_i2v`."""
    parts = _base(settings)
    clips = DrawnClips(settings, begin(settings))
    parts["transformer"] = transformer = _for_images(parts["transformer"])
    add_lora(transformer, settings.rank, _OF_BLOCKS)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name.startswith(_WHOLE) or ".lora_" in name)
    parts["vae"].register_to_config(invert_scale_latents=True)
    made = _train(parts, clips, clips.latents(parts["vae"], num_frames=1))
    whole = {name: value.detach().half() for name, value in transformer.named_parameters() if name.startswith(_WHOLE)}
    _write("changes", settings, {LORA_NAME: lora_weights(transformer), WHOLE_NAME: whole}, made)


def _base(settings: TrainTinyConfig) -> dict[str, Any]:
    """Return the stock modules of the checkpoint to change, frozen."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
    from transformers import T5EncoderModel

    folder = resolve_checkpoint(settings.base or "tiny").folder
    if folder is None:
        raise UserError(f"base={settings.base}: expected tiny, or a folder that what=model has written.")
    classes = {
        "transformer": CogVideoXTransformer3DModel,
        "vae": AutoencoderKLCogVideoX,
        "text_encoder": T5EncoderModel,
    }
    load = {"dtype": torch.float32}
    parts = {name: cls.from_pretrained(folder, subfolder=name, **load) for name, cls in classes.items()}
    for name in ("num_layers", "num_attention_heads", "max_text_seq_length"):
        if (has := parts["transformer"].config[name]) != getattr(settings, name):
            raise UserError(f"{name}={getattr(settings, name)}: expected {has}, as the base has")
    for module in parts.values():
        module.eval().requires_grad_(False)
    return parts


def _for_images(transformer: Any) -> Any:
    """Return a transformer that takes an image, too, and for now computes what the one without does."""
    from diffusers import CogVideoXTransformer3DModel

    wider = CogVideoXTransformer3DModel.from_config(i2v_config(transformer.config))
    weights = transformer.state_dict()
    patch_weight = weights["patch_embed.proj.weight"]  # an image's channels come behind the sample's
    weights["patch_embed.proj.weight"] = torch.cat([patch_weight, torch.zeros_like(patch_weight)], dim=1)
    missing, unexpected = wider.load_state_dict(weights, strict=False)
    assert all(name.startswith("ofs_embedding.") for name in missing) and not unexpected
    torch.nn.init.zeros_(wider.ofs_embedding.linear_2.weight)
    torch.nn.init.zeros_(wider.ofs_embedding.linear_2.bias)
    return wider


def _train(parts: dict[str, Any], clips: DrawnClips, images: torch.Tensor | None = None) -> dict[str, Any]:
    """Train what of the transformer requires a gradient; return what is to be known of it. images: unscaled latents."""
    transformer = parts["transformer"]
    history, time_s = optimize_transformer(clips.settings.what, {"transformer": transformer}, clips, parts, images)
    count = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return {"cpu_time_s": round(time_s), "parameters": count, "losses": history[-1]}


def _write(
    what: str, settings: TrainTinyConfig, files: dict[str, dict[str, torch.Tensor]], made: dict[str, Any]
) -> None:
    """Write weights, by the names of their files, and how they were made; what was in the folder is replaced."""
    folder = Path(settings.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, weights in files.items():
        save_file(weights, folder / name, metadata={"format": "pt"})
    write_provenance(folder, settings, **made)
    print(f"{what}: {folder}")
