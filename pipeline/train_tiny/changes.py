"""Trains what changes the tiny model: a LoRA that draws outlines, and its image-to-video sibling."""

import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from pipeline.checkpoints.loading import resolve_checkpoint
from pipeline.checkpoints.shapes import OUTLINE_WIDTH
from pipeline.checkpoints.tiny import build_scheduler
from pipeline.checkpoints.tiny_i2v import LORA_NAME, PATCH_WEIGHT, WHOLE_NAME, i2v_config, widened
from pipeline.model.latents import LatentGeometry
from pipeline.stages.conditioning import image_condition
from pipeline.train_tiny.config import DrawnClips, TrainTinyConfig, begin, padded, write_provenance
from pipeline.train_tiny.training import diffusion_loss, optimize, rotary_tables
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
    work_dir = begin(settings)
    add_lora(parts["transformer"], settings.rank, _ATTENTION_AND_FF)
    clips = DrawnClips(settings, work_dir, OUTLINE_WIDTH)
    made = _train(settings, work_dir, parts, clips)
    folder = Path(settings.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_file(lora_weights(parts["transformer"], "transformer."), folder / DIFFUSERS_NAME, metadata={"format": "pt"})
    write_provenance(folder, settings, **made)
    print(f"LoRA: {folder}")


def train_image_to_video(settings: TrainTinyConfig) -> None:
    """Train the image-to-video model, and write what changes of the base: see `checkpoints.tiny_i2v`."""
    parts = _base(settings)
    work_dir = begin(settings)
    parts["transformer"] = transformer = _for_images(parts["transformer"])
    add_lora(transformer, settings.rank, _OF_BLOCKS)
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_(name.startswith(_WHOLE) or ".lora_" in name)
    parts["vae"].register_to_config(invert_scale_latents=True)
    clips = DrawnClips(settings, work_dir)
    made = _train(settings, work_dir, parts, clips, clips.latents(parts["vae"], num_frames=1))
    folder = Path(settings.folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole = {name: value.detach().half() for name, value in transformer.named_parameters() if name.startswith(_WHOLE)}
    save_file(lora_weights(transformer), folder / LORA_NAME, metadata={"format": "pt"})
    save_file(whole, folder / WHOLE_NAME, metadata={"format": "pt"})
    write_provenance(folder, settings, **made)
    print(f"changes: {folder}")


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
    weights[PATCH_WEIGHT] = torch.from_numpy(widened(weights[PATCH_WEIGHT].numpy()))
    missing, unexpected = wider.load_state_dict(weights, strict=False)
    assert all(name.startswith("ofs_embedding.") for name in missing) and not unexpected
    torch.nn.init.zeros_(wider.ofs_embedding.linear_2.weight)
    torch.nn.init.zeros_(wider.ofs_embedding.linear_2.bias)
    return wider


def _train(
    settings: TrainTinyConfig,
    work_dir: Path,
    parts: dict[str, Any],
    clips: DrawnClips,
    images: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Train what of the transformer requires a gradient; return what is to be known of it. images: unscaled latents."""
    transformer, vae = parts["transformer"], parts["vae"]
    patch_size_t, scale = transformer.config.patch_size_t, vae.config.scaling_factor
    latents = padded(clips.latents(vae), patch_size_t) * scale
    conditions = None
    if images is not None:
        frames, channels, height, width = latents.shape[1:]
        geometry = LatentGeometry(frames, 0, channels, height, width, (patch_size_t, 2, 2))
        conditions = torch.cat([image_condition(image[None], geometry, vae.config) for image in images])
    *token_ids, empty_ids = clips.token_ids("")
    loss = diffusion_loss(
        transformer,
        parts["text_encoder"],
        build_scheduler(),
        latents,
        torch.stack(token_ids),
        empty_ids,
        rotary_tables(transformer.config, latents.shape),
        settings.transformer.batch_size,
        settings.caption_dropout,
        conditions,
    )
    trained = {"transformer": transformer}
    path = work_dir / "transformer.pt"
    history, time_s = optimize(settings.what, trained, settings.transformer, loss, settings.seed, path)
    count = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    return {"cpu_time_s": round(time_s), "parameters": count, "losses": history[-1]}
