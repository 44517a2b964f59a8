"""The schema of configs/train_tiny.yaml, and what is the same for all that is trained."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.checkpoints.published import COGVIDEOX_1_5_5B
from pipeline.checkpoints.shapes import Scene, captions, draw, parse_caption, random_scene
from pipeline.checkpoints.tiny import build_tokenizer
from pipeline.model.latents import LatentGeometry
from pipeline.model.noise_schedule import build_scheduler
from pipeline.requests.request import GenerateRequest
from pipeline.runs.records import environment
from pipeline.stages.conditioning import image_condition
from pipeline.train_tiny.training import (
    Loop,
    check_ranges,
    diffusion_loss,
    fast_precision,
    optimize,
    rotary_tables,
    to_video,
)
from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path, require_writable, user_path, write_json
from splash_workbench.records.base import utc_now

#: Of the file that says how something was trained, beside it.
PROVENANCE_NAME = "training.json"


@dataclasses.dataclass
class TrainTinyConfig:
    """Keys of the command line."""

    what: str = "model"
    base: str | None = None
    folder: str = "tiny_model"
    work_dir: str = "tiny_train"
    seed: int = 0
    height: int = 64
    width: int = 96
    num_frames: int = 17
    num_layers: int = 4
    num_attention_heads: int = 4
    max_text_seq_length: int = 32
    rank: int = 8
    clips_per_caption: int = 2
    spread: float = 0.1
    start_from: str | None = None
    kl_weight: float = 5e-4
    caption_dropout: float = 0.1
    vae: Loop = dataclasses.field(default_factory=Loop)
    transformer: Loop = dataclasses.field(default_factory=Loop)


def check_settings(settings: TrainTinyConfig) -> None:
    """Raise UserError, before any work, for what cannot be."""
    sizes = ("num_layers", "num_attention_heads", "max_text_seq_length", "clips_per_caption", "rank")
    fractions = dict.fromkeys(("spread", "kl_weight", "caption_dropout"), (0, 1))
    check_ranges(settings, seed=(0, 2**63 - 1), **dict.fromkeys(sizes, (1, 10**4)), **fractions)
    GenerateRequest("any", height=settings.height, width=settings.width, num_frames=settings.num_frames)
    if settings.start_from is not None and not (settings.what == "model" and Path(settings.start_from).is_file()):
        raise UserError(
            f"start_from={settings.start_from}: expected transformer.pt of another work_dir, for what=model."
        )
    if settings.what == "model" and settings.base is not None:
        raise UserError(f"base={settings.base}: expected null for what=model, which begins from nothing.")
    folder = Path(settings.folder)
    require_writable(f"folder={settings.folder}", folder)
    _require_ours(folder, settings)


def _require_ours(folder: Path, settings: TrainTinyConfig) -> None:
    """Raise UserError for a folder, which training replaces, that holds more than an earlier training's."""
    used = [Path(settings.work_dir).resolve(), Path.cwd()]
    if settings.what != "model" and settings.base is not None:
        used.append(user_path(settings.base).resolve())
    inside = any(path.is_relative_to(folder.resolve()) for path in used)
    is_empty = not folder.is_dir() or not any(folder.iterdir())
    if inside or not (is_empty or (folder / PROVENANCE_NAME).is_file()):
        raise UserError(
            f"folder={settings.folder}: would be replaced, and holds more than what this command made; expected a new "
            "folder, or one of an earlier training"
        )


def asked_for(settings: TrainTinyConfig) -> dict[str, Any]:
    """Return the settings that decide what comes out."""
    fields = dataclasses.asdict(settings).items()
    return {name: value for name, value in fields if name not in ("folder", "work_dir")}


def begin(settings: TrainTinyConfig) -> Path:
    """Return the folder of the training's state. Raises UserError where it holds another training's."""
    work_dir, asked = Path(settings.work_dir), asked_for(settings)
    if (work_dir / "settings.json").exists() and json.loads((work_dir / "settings.json").read_text()) != asked:
        raise UserError(f"work_dir={str(work_dir)!r}: holds a run with other settings; expected another folder")
    write_json(work_dir / "settings.json", asked)
    torch.manual_seed(settings.seed)
    return work_dir


@dataclasses.dataclass(frozen=True)
class DrawnClips:
    """Drawn videos: their scenes, and how to encode them once, at the size of the settings."""

    settings: TrainTinyConfig
    work_dir: Path
    line_width: float | None = None

    @functools.cached_property
    def scenes(self) -> list[Scene]:
        """`clips_per_caption` scenes of every caption."""
        settings = self.settings
        rng, size = np.random.default_rng([settings.seed, 1]), (settings.height, settings.width)
        wanted = [parse_caption(caption) for caption in captions() for _ in range(settings.clips_per_caption)]
        return [random_scene(rng, *size, spread=settings.spread, **attributes) for attributes in wanted]  # type: ignore[arg-type]

    def token_ids(self, *more: str) -> torch.Tensor:
        """Return the tokens of the captions and of `more` texts, [texts, tokens]."""
        texts, length = [*(scene.caption for scene in self.scenes), *more], self.settings.max_text_seq_length
        return build_tokenizer()(texts, padding="max_length", max_length=length, return_tensors="pt")["input_ids"]

    def latents(self, vae: Any, num_frames: int | None = None) -> torch.Tensor:
        """Return unscaled latents [clips, latent frames, 16, h, w], of whole videos or of their first frames as images.

        What is encoded is kept in `work_dir`.
        """
        count = num_frames or self.settings.num_frames
        path = self.work_dir / ("latents.npy" if num_frames is None else f"latents{count}.npy")
        if not path.exists():
            encoded = []
            for start in tqdm(range(0, len(self.scenes), 4), desc="latents", mininterval=5):
                scenes, size = self.scenes[start : start + 4], (self.settings.height, self.settings.width)
                videos = np.stack([draw(scene, count, *size, self.line_width) for scene in scenes])
                with torch.no_grad(), fast_precision():
                    means = vae.encode(to_video(videos)).latent_dist.mean
                encoded.append(means.float().transpose(1, 2))
            with atomic_path(path) as temporary:
                np.save(temporary, torch.cat(encoded).numpy())
        return torch.from_numpy(np.load(path))


def optimize_transformer(
    name: str, trained: dict[str, Any], clips: DrawnClips, parts: Mapping[str, Any], images: torch.Tensor | None = None
) -> tuple[list[dict[str, float]], float]:
    """Train modules by the loss of the transformer that is in `parts`, beside its T5 and VAE; return as `optimize`.

    images: unscaled latents of what the clips begin with, of an image-to-video model.
    """
    settings, transformer, vae = clips.settings, parts["transformer"], parts["vae"]
    patch_size_t = transformer.config.patch_size_t
    latents = clips.latents(vae)
    padding = [latents[:, :1]] * (-latents.shape[1] % patch_size_t)  # fills the last temporal patch
    latents = torch.cat([*padding, latents], dim=1) * vae.config.scaling_factor
    conditions = None
    if images is not None:
        frames, channels, height, width = latents.shape[1:]
        geometry = LatentGeometry(frames, 0, channels, height, width, (patch_size_t, 2, 2))
        conditions = torch.cat([image_condition(image[None], geometry, vae.config) for image in images])
    *token_ids, empty_ids = clips.token_ids("")
    loss = diffusion_loss(
        transformer,
        parts["text_encoder"],
        build_scheduler(COGVIDEOX_1_5_5B["scheduler"]),
        latents,
        torch.stack(token_ids),
        empty_ids,
        rotary_tables(transformer.config, latents.shape),
        settings.transformer.batch_size,
        settings.caption_dropout,
        conditions,
    )
    path = clips.work_dir / "transformer.pt"
    return optimize(name, trained, settings.transformer, loss, settings.seed, path)


def write_provenance(folder: Path, settings: TrainTinyConfig, **more: Any) -> None:
    """Write beside what was trained how it was made."""
    made = {
        "made_by": "python -m pipeline.train_tiny",
        "settings": asked_for(settings),
        "finished_at": utc_now(),
        "environment": dataclasses.asdict(environment()),
    }
    write_json(folder / PROVENANCE_NAME, made | more)
