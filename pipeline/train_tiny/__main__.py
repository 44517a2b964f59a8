"""Command line: `python -m pipeline.train_tiny`. Makes the tiny checkpoint from nothing, and what changes it."""

import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints.tiny import TinySpec, build_modules, write_checkpoint
from pipeline.train_tiny.changes import train_image_to_video, train_outline
from pipeline.train_tiny.config import (
    DrawnClips,
    TrainTinyConfig,
    begin,
    check_settings,
    optimize_transformer,
    write_provenance,
)
from pipeline.train_tiny.training import optimize, vae_loss
from splash_workbench import cli
from splash_workbench.errors import UserError


@cli.command("train_tiny", TrainTinyConfig)
def main(settings: TrainTinyConfig) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(format="  %(message)s", level=logging.INFO)
    torch.set_num_threads(1)
    check_settings(settings)
    _TRAINS[settings.what](settings)
    return 0


def train_model(settings: TrainTinyConfig) -> None:
    """Train, or go on training, and write the checkpoint. What is done is kept in `work_dir`, tied to the settings."""
    work_dir = begin(settings)
    sizes = ("num_layers", "num_attention_heads", "max_text_seq_length")
    modules = build_modules(TinySpec(**{name: getattr(settings, name) for name in sizes}))
    trained = {name: modules[name] for name in ("transformer", "text_encoder")}
    begun = None if settings.start_from is None else load_average(settings.start_from, trained)
    frame, vae = (settings.height, settings.width, settings.num_frames), modules["vae"]
    loss = vae_loss(vae, *frame, settings.vae.steps, settings.kl_weight)
    vae_history, vae_time_s = optimize("vae", {"vae": vae}, settings.vae, loss, settings.seed, work_dir / "vae.pt")

    clips = DrawnClips(settings, work_dir)
    scaling_factor = round(float(1 / clips.latents(vae).std()), 4)
    vae.register_to_config(scaling_factor=scaling_factor)
    history, time_s = optimize_transformer("transformer", trained, clips, modules)

    folder = Path(settings.folder)
    shutil.rmtree(folder, ignore_errors=True)
    write_checkpoint(folder, modules, torch.float16)
    write_provenance(
        folder,
        settings,
        cpu_time_s={"vae": round(vae_time_s), "transformer": round(time_s)},
        parameters={name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        scaling_factor=scaling_factor,
        started_from=begun,
        losses={"vae": vae_history[-1], "transformer": history[-1]},
    )
    print(f"checkpoint: {folder}")


def load_average(path: str, trained: dict[str, torch.nn.Module]) -> Any:
    """Load the averaged weights of an earlier training. Returns the end of its history; UserError for another file."""
    try:
        state = torch.load(path, weights_only=True)
        torch.nn.ModuleDict(trained).load_state_dict(state["average"])
        return state["history"][-1]
    except Exception as error:  # whatever a library makes of another file
        said = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"start_from={path}: expected transformer.pt of another work_dir, of a model of these sizes "
            f"({type(error).__name__}: {said})."
        ) from error


_TRAINS = {"model": train_model, "outline": train_outline, "i2v": train_image_to_video}


if __name__ == "__main__":
    sys.exit(main())
