"""Trains the tiny model's parts on drawn videos, in torch on the CPU: first the VAE, then transformer and T5 together.

What is trained on is what `pipeline.generate` makes of the checkpoint: prompts padded to max_text_seq_length and not
masked, the leading latent frame that fills the last temporal patch, latents times scaling_factor, the scheduler's
noise.
"""

import copy
import dataclasses
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pipeline.checkpoints.shapes import draw, random_scene
from pipeline.model.latents import LatentGeometry, rotary_embedding
from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path

logger = logging.getLogger(__name__)

_OFS = 2.0  # fixed in diffusers' CogVideoXImageToVideoPipeline

#: The loss of a step, and what to report of it.
Loss = tuple[torch.Tensor, dict[str, float]]
LossOf = Callable[[int, np.random.Generator, torch.Generator], Loss]


def fast_precision() -> Any:
    """Return a context in which matrices and convolutions are of bfloat16, where this CPU is the faster for it.

    Without AVX-512, oneDNN has no fast bfloat16 convolution: one of 16 channels takes 35 times as long (measured).
    """
    return torch.autocast("cpu", torch.bfloat16, enabled=torch.backends.cpu.get_cpu_capability().startswith("AVX512"))


def check_ranges(settings: Any, **ranges: tuple[float, float]) -> None:
    """Raise UserError for the first field that is not from its least to its greatest value."""
    for name, (least, greatest) in ranges.items():
        if not least <= getattr(settings, name) <= greatest:
            raise UserError(f"{name}={getattr(settings, name)}: expected {least:g} to {greatest:g}.")


@dataclasses.dataclass
class Loop:
    """An optimization.

    matrix_rate: learning rate of Muon, for matrices and convolutions. other_rate: of AdamW, for all else and for a
    LoRA. Both rise over warm_up_steps, stay, and fall in a line to 0 over the last decay_fraction of the steps.
    ema_decay: of the averaged weights, which are what comes out.
    """

    steps: int = 1
    batch_size: int = 16
    matrix_rate: float = 0.02
    other_rate: float = 3e-3
    warm_up_steps: int = 20
    decay_fraction: float = 1.0
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        check_ranges(self, steps=(1, 10**9), batch_size=(0, 10**6), warm_up_steps=(1, 10**9))
        check_ranges(self, matrix_rate=(0, 1), other_rate=(0, 1), decay_fraction=(1e-9, 1), ema_decay=(0, 1))

    def rate(self, step: int) -> float:
        """Return the factor on the learning rates, 0 to 1."""
        rise, left = (step + 1) / self.warm_up_steps, (1 - step / self.steps) / self.decay_fraction
        return min(1.0, rise) * min(1.0, left)


class Muon(torch.optim.Muon):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), of convolutions as matrices [out, in x kernel]."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], lr: float):
        self._weights = list(parameters)
        self._matrices = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in self._weights]  # the same memory
        super().__init__(self._matrices, lr, weight_decay=0.0)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()


def to_video(frames: np.ndarray) -> torch.Tensor:
    """Turn uint8 [..., frames, height, width, 3] into float32 [..., 3, frames, height, width] in [-1, 1]."""
    return torch.from_numpy(frames).movedim(-1, -4).float() / 127.5 - 1


@torch.enable_grad()  # whatever the caller has set
def optimize(
    name: str,
    modules: dict[str, torch.nn.Module],
    loop: Loop,
    loss_of: LossOf,
    seed: int,
    state_path: Path,
    save_every: int = 100,
) -> tuple[list[dict[str, float]], float]:
    """Run a loop from where `state_path` left off; `modules` end up with the averaged weights.

    Trained is what requires a gradient.
    loss_of: of a step, with generators that depend on seed and step alone, so that a resumed run goes on as it would
    have. Returns the means of what it reports, over every `save_every` steps, and the CPU seconds of all its runs.
    """
    trained = torch.nn.ModuleDict(modules)
    average = copy.deepcopy(trained)
    named = [(name, parameter) for name, parameter in trained.named_parameters() if parameter.requires_grad]
    is_matrix = {id(p): p.ndim > 1 and not re.search("shared|relative_attention|lora_", name) for name, p in named}
    matrices, others = ([p for _, p in named if is_matrix[id(p)] == wanted] for wanted in (True, False))
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if matrices:  # a LoRA has none
        optimizers["matrices"] = Muon(matrices, loop.matrix_rate)
    optimizers["others"] = torch.optim.AdamW(others, loop.other_rate, betas=(0.9, 0.98), weight_decay=0.0)
    first, history, recent = 0, [], []
    cpu_time_s, started = 0.0, time.process_time()
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        trained.load_state_dict(state["trained"])
        average.load_state_dict(state["average"])
        for key, optimizer in optimizers.items():
            optimizer.load_state_dict(state[key])
        first, history, cpu_time_s = state["step"], state["history"], state.get("cpu_time_s", 0.0)
        logger.info("%s: going on at step %d", name, first)
    trained.train()
    bar = tqdm(range(first, loop.steps), initial=first, total=loop.steps, desc=name, mininterval=5)
    for step in bar:
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * loop.rate(step)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        loss, report = loss_of(step, np.random.default_rng([seed, step]), generator)
        trained.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        decay = min(loop.ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
        recent.append(report)
        if (step + 1) % save_every == 0 or step + 1 == loop.steps:
            means = {key: _mean([report[key] for report in recent]) for key in recent[0]}
            history.append({"step": step + 1, **means})
            recent = []
            bar.set_postfix(means)
            state = {
                "trained": trained.state_dict(),
                "average": average.state_dict(),
                **{key: optimizer.state_dict() for key, optimizer in optimizers.items()},
                "step": step + 1,
                "history": history,
                "cpu_time_s": cpu_time_s + time.process_time() - started,
            }
            with atomic_path(state_path) as temporary:
                torch.save(state, temporary)
    trained.load_state_dict(average.state_dict())
    trained.eval()
    return history, cpu_time_s + time.process_time() - started


def _mean(values: Sequence[float]) -> float:
    """Return the mean of the values that are not NaN (a step without what is reported); NaN where there are none."""
    known = [value for value in values if not math.isnan(value)]
    return statistics.fmean(known) if known else math.nan


# --- VAE


def vae_loss(vae: Any, height: int, width: int, num_frames: int, steps: int, kl_weight: float) -> LossOf:
    """Return the loss: reconstruction, the shape counting five times the background, and the KL of the latents.

    In the first half of the steps single frames, which teach the picture for a ninth of the time, then videos, half as
    long as the real ones or whole. Mostly windows around the shape, but also whole frames, which the group norms see
    in the end, and more of them towards the end.
    """

    def loss_of(step: int, rng: np.random.Generator, generator: torch.Generator) -> Loss:
        whole = rng.random() < (0.25 if step < 0.75 * steps else 0.5)
        frames, count = num_frames, 1
        if step < steps // 2:
            frames, count = 1, 2 if whole else 8
        elif rng.random() < 0.5:
            frames, count = num_frames // 16 * 8 + 1, 1 if whole else 2  # 8k + 1, as the VAE wants
        windows = [_window(rng, height, width, num_frames, frames, whole) for _ in range(count)]
        target, weights = map(torch.stack, zip(*windows, strict=True))
        with fast_precision():
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.mean.float() + posterior.std.float() * noise).sample.float()
        error = decoded - target
        squared = (weights * error.square()).mean()
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        loss = squared + 0.1 * (weights * error.abs()).mean() + kl_weight * kl
        return loss, {"squared": squared.item(), "mse": error.square().mean().item(), "kl": kl.item()}

    return loss_of


def _window(
    rng: np.random.Generator, height: int, width: int, num_frames: int, frames: int, whole: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a video in [-1, 1], [3, frames, h, w], and the weights of its pixels, [1, frames, h, w]."""
    scene = random_scene(rng, height, width)
    first = int(rng.integers(0, num_frames - frames + 1))
    video = to_video(draw(scene, num_frames, height, width)[first : first + frames])
    if not whole:
        h, w = height // 2, width // 2
        x, y = np.array(scene.start) + rng.random() * (np.array(scene.end) - np.array(scene.start))
        short = min(height, width)
        top = int(np.clip(y * short - h * rng.uniform(0.2, 0.8), 0, height - h))
        left = int(np.clip(x * short - w * rng.uniform(0.2, 0.8), 0, width - w))
        video = video[:, :, top : top + h, left : left + w]
    background = scene.background / 127.5 - 1
    differs = ((video - background).abs().amax(dim=0, keepdim=True) > 0.02).float()
    return video, 1 + 4 * torch.nn.functional.max_pool3d(differs, (1, 3, 3), 1, (0, 1, 1))


# --- transformer and text encoder


def rotary_tables(config: Any, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines for latents [..., frames, channels, height, width], as `pipeline.model.latents` does."""
    *_, frames, channels, height, width = shape
    patch = config.patch_size_t, config.patch_size, config.patch_size
    geometry = LatentGeometry(frames, 0, channels, height, width, patch)
    tables = rotary_embedding(geometry, config)
    assert tables is not None, "the tiny model's shape is that of CogVideoX 1.5"
    cos, sin = map(torch.from_numpy, tables)
    return cos, sin


def diffusion_loss(
    transformer: Any,
    text_encoder: Any,
    scheduler: Any,
    latents: torch.Tensor,
    token_ids: torch.Tensor,
    empty_ids: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    batch_size: int,
    caption_dropout: float,
    conditions: torch.Tensor | None = None,
) -> LossOf:
    """Return the loss of the velocity: its squared error at random timesteps.

    latents: scaled, [clips, latent frames with padding, 16, h, w]. token_ids: [clips, tokens]. empty_ids: of "".
    conditions: of the shape of `latents`, what stands beside them for an image-to-video model. One example in ten is
    at the last timestep, where the sample is noise alone: every video starts there.
    """
    last = scheduler.config.num_train_timesteps - 1
    more = {} if conditions is None else {"ofs": torch.full((1,), _OFS)}

    def loss_of(step: int, rng: np.random.Generator, generator: torch.Generator) -> Loss:
        chosen = torch.from_numpy(rng.integers(0, len(latents), batch_size))
        clean, ids = latents[chosen], token_ids[chosen].clone()
        ids[torch.from_numpy(rng.random(batch_size) < caption_dropout)] = empty_ids
        timesteps = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size
        timesteps = (timesteps * (last + 1) / 0.9).long().clamp(max=last)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        velocity = scheduler.get_velocity(clean, noise, timesteps)
        if conditions is not None:
            noisy = torch.cat([noisy, conditions[chosen]], dim=2)
        with fast_precision():
            embeddings = text_encoder(ids)[0]
            inputs = {"timestep": timesteps, "image_rotary_emb": rotary, **more}
            predicted = transformer(noisy, embeddings, return_dict=False, **inputs)[0]
        errors = (predicted.float() - velocity).square().mean(dim=(1, 2, 3, 4))
        report = {"loss": errors.mean().item(), "loss_last": errors[timesteps == last].mean().item()}
        return errors.mean(), report

    return loss_of
