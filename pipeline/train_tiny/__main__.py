"""Command line: `python -m pipeline.train_tiny`. Makes the trained tiny checkpoint from nothing, on one CPU core."""

import dataclasses
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from pipeline.checkpoints.shapes import captions, parse_caption, random_scene
from pipeline.checkpoints.tiny import TinySpec, build_modules, build_scheduler, build_tokenizer, write_checkpoint
from pipeline.requests.request import GenerateRequest
from pipeline.runs.records import environment
from pipeline.train_tiny.training import (
    Loop,
    check_ranges,
    diffusion_loss,
    encode_clips,
    optimize,
    rotary_tables,
    vae_loss,
)
from splash_workbench import cli
from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path, require_writable, write_json
from splash_workbench.records.base import utc_now

PROVENANCE_NAME = "training.json"


@dataclasses.dataclass
class TrainTinyConfig:
    """Keys of the command line."""

    folder: str = "tiny_model"
    work_dir: str = "tiny_train"
    seed: int = 0
    height: int = 64
    width: int = 96
    num_frames: int = 17
    num_layers: int = 4
    num_attention_heads: int = 4
    max_text_seq_length: int = 32
    clips_per_caption: int = 2
    spread: float = 0.1
    start_from: str | None = None
    kl_weight: float = 5e-4
    caption_dropout: float = 0.1
    vae: Loop = dataclasses.field(default_factory=Loop)
    transformer: Loop = dataclasses.field(default_factory=Loop)


@cli.command("train_tiny", TrainTinyConfig)
def main(settings: TrainTinyConfig) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(format="  %(message)s", level=logging.INFO)
    torch.set_num_threads(1)
    train(settings)
    return 0


def train(settings: TrainTinyConfig) -> None:
    """Train, or go on training, and write the checkpoint. What is done is kept in `work_dir`, tied to the settings."""
    _check(settings)
    work_dir = Path(settings.work_dir)
    asked_for = dataclasses.asdict(settings)
    del asked_for["folder"], asked_for["work_dir"]
    if (work_dir / "settings.json").exists() and json.loads((work_dir / "settings.json").read_text()) != asked_for:
        raise UserError(f"work_dir={str(work_dir)!r}: holds a run with other settings; expected another folder")
    write_json(work_dir / "settings.json", asked_for)
    torch.manual_seed(settings.seed)
    sizes = ("num_layers", "num_attention_heads", "max_text_seq_length")
    modules = build_modules(TinySpec(**{name: getattr(settings, name) for name in sizes}))
    frame, vae = (settings.height, settings.width, settings.num_frames), modules["vae"]
    loss = vae_loss(vae, *frame, settings.vae.steps, settings.kl_weight)
    vae_history, vae_time_s = optimize("vae", {"vae": vae}, settings.vae, loss, settings.seed, work_dir / "vae.pt")

    rng, size = np.random.default_rng([settings.seed, 1]), (settings.height, settings.width)
    wanted = [parse_caption(caption) for caption in captions() for _ in range(settings.clips_per_caption)]
    scenes = [random_scene(rng, *size, spread=settings.spread, **attributes) for attributes in wanted]  # type: ignore[arg-type]
    if not (work_dir / "latents.npy").exists():
        clips = encode_clips(vae, scenes, settings.num_frames, settings.height, settings.width)
        with atomic_path(work_dir / "latents.npy") as temporary:
            np.save(temporary, torch.stack(list(clips)).numpy())
    latents = torch.from_numpy(np.load(work_dir / "latents.npy"))  # [clips, latent frames, 16, h, w]
    scaling_factor = round(float(1 / latents.std()), 4)
    vae.register_to_config(scaling_factor=scaling_factor)
    padding = -latents.shape[1] % modules["transformer"].config.patch_size_t
    latents = torch.cat([latents[:, :1]] * padding + [latents], dim=1) * scaling_factor

    tokenizer = build_tokenizer()

    def token_ids(texts: list[str]) -> torch.Tensor:
        length = settings.max_text_seq_length
        return tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt")["input_ids"]

    loss = diffusion_loss(
        modules["transformer"],
        modules["text_encoder"],
        build_scheduler(),
        latents,
        token_ids([scene.caption for scene in scenes]),
        token_ids([""])[0],
        rotary_tables(modules["transformer"].config, latents.shape),
        settings.transformer.batch_size,
        settings.caption_dropout,
    )
    parts = {name: modules[name] for name in ("transformer", "text_encoder")}
    begun = None
    if settings.start_from is not None:
        state = torch.load(settings.start_from, weights_only=True)
        torch.nn.ModuleDict(parts).load_state_dict(state["average"])
        begun = state["history"][-1]
    history, time_s = optimize(
        "transformer", parts, settings.transformer, loss, settings.seed, work_dir / "transformer.pt"
    )

    folder = Path(settings.folder)
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, modules, torch.float16)
    provenance = {
        "made_by": "python -m pipeline.train_tiny",
        "settings": asked_for,
        "finished_at": utc_now(),
        "cpu_time_s": {"vae": round(vae_time_s), "transformer": round(time_s)},
        "environment": dataclasses.asdict(environment()),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "scaling_factor": scaling_factor,
        "started_from": begun,
        "losses": {"vae": vae_history[-1], "transformer": history[-1]},
    }
    write_json(folder / PROVENANCE_NAME, provenance)
    print(f"checkpoint: {folder}")


def _check(settings: TrainTinyConfig) -> None:
    """Raise UserError, before any work, for what cannot be."""
    sizes = dict.fromkeys(("num_layers", "num_attention_heads", "max_text_seq_length", "clips_per_caption"), (1, 10**4))
    fractions = dict.fromkeys(("spread", "kl_weight", "caption_dropout"), (0, 1))
    check_ranges(settings, seed=(0, 2**63 - 1), **sizes, **fractions)
    GenerateRequest("any", height=settings.height, width=settings.width, num_frames=settings.num_frames)
    if settings.start_from is not None and not Path(settings.start_from).is_file():
        raise UserError(f"start_from={settings.start_from}: expected transformer.pt of another work_dir.")
    require_writable(f"folder={settings.folder}", Path(settings.folder))


if __name__ == "__main__":
    sys.exit(main())
