"""CogVideoX schedulers as tables of numbers, so that one compiled step serves every step of every length.

Stock `scheduler.step` needs the timestep as a Python value and so cannot be compiled once. But a step of either
CogVideoX scheduler is linear in its inputs, with coefficients that depend on the step alone:

    x0        = x0_sample * sample + x0_model * model_output
    sample    = prev_sample * sample + prev_x0 * x0 + prev_old_x0 * old_x0 + prev_noise * noise

The table is read off the stock scheduler itself, by stepping it in float64 on unit inputs: no formula is repeated here.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from pipeline.requests.errors import CheckpointError, RequestError

_PROBE_SEED = 0


@dataclasses.dataclass(frozen=True)
class StepTable:
    """One row a denoising step.

    timesteps: int64 [steps], what the model is told. coefficients: float64 [steps, 6] in the order x0_sample,
    x0_model, prev_sample, prev_x0, prev_old_x0, prev_noise. noise_draws: how often stock draws noise of the sample's
    shape in a step (only the last draw is used; the others keep the random stream in place). init_noise_sigma:
    factor of the initial noise.
    """

    timesteps: np.ndarray
    coefficients: np.ndarray
    noise_draws: tuple[int, ...]
    init_noise_sigma: float

    @property
    def needs_noise(self) -> bool:
        return any(self.noise_draws)


def build_scheduler(config: Mapping[str, Any], scheduler: str = "checkpoint") -> Any:
    """Build the stock scheduler of a scheduler_config.json, or "ddim" / "dpm" made from the same configuration."""
    from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler

    classes: dict[Any, Any] = {cls.__name__: cls for cls in (CogVideoXDDIMScheduler, CogVideoXDPMScheduler)}
    named = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler", "checkpoint": config.get("_class_name")}
    name = named[scheduler]
    if not isinstance(name, str) or name not in classes:
        raise CheckpointError(f"the scheduler is for {name!r}, expected one of {', '.join(classes)}")
    return classes[name].from_config(config)


def step_table(scheduler: Any, num_inference_steps: int, first: int = 0) -> StepTable:
    """Read the coefficients of every step off a stock CogVideoX DDIM or DPM scheduler (see the module's docstring).

    first: the index of the step that is the first, where those before it are left out.
    """
    limit = scheduler.config.num_train_timesteps
    if num_inference_steps > limit:
        raise RequestError(f"num_inference_steps={num_inference_steps}: this scheduler has at most {limit}")
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps[first:]
    probed = [_probe_step(scheduler, *pair) for pair in zip(timesteps, [None, *timesteps[:-1]], strict=True)]
    rows, draws = zip(*probed, strict=True)
    for index, row in enumerate(rows):
        if not np.isfinite(row).all():
            raise CheckpointError(f"{num_inference_steps=}: the scheduler's step {index} is not finite: {row}")
    return StepTable(timesteps.numpy(), np.stack(rows), draws, float(scheduler.init_noise_sigma))


def _probe_step(scheduler: Any, timestep: torch.Tensor, previous: torch.Tensor | None) -> tuple[np.ndarray, int]:
    """Step on unit vectors: element 0 has only a sample, 1 only a model output, 2 only an old x0, 3 nothing."""
    sample, model_output, old_x0, nothing = torch.eye(4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    if "timestep_back" in inspect.signature(scheduler.step).parameters:
        old = old_x0 if previous is not None else None
        prev, x0 = scheduler.step(model_output, old, timestep, previous, sample, generator=generator, return_dict=False)
    else:
        prev, x0 = scheduler.step(model_output, timestep, sample, generator=generator, return_dict=False)
    count, noise = _noise_drawn(generator, nothing)
    prev_noise = float(prev[3] / noise[3]) if count else 0.0
    prev = prev - prev_noise * noise
    x0_sample, x0_model = float(x0[0]), float(x0[1])
    # prev[0] and prev[1] come through x0 as well as directly; the model output has no other way in.
    prev_x0 = float(prev[1]) / x0_model if x0_model else 0.0
    if not x0_model and float(prev[1]):
        raise CheckpointError(f"scheduler step at {timestep=} is not of the expected linear form")
    prev_sample = float(prev[0]) - prev_x0 * x0_sample
    return np.array([x0_sample, x0_model, prev_sample, prev_x0, float(prev[2]), prev_noise]), count


def _noise_drawn(generator: torch.Generator, like: torch.Tensor) -> tuple[int, torch.Tensor]:
    """Return how many tensors of this shape a step drew from its generator, and the last of them."""
    replay = torch.Generator().manual_seed(_PROBE_SEED)
    noise = torch.zeros_like(like)
    for count in range(4):
        if torch.equal(replay.get_state(), generator.get_state()):
            return count, noise
        noise = torch.randn(like.shape, generator=replay, dtype=like.dtype)
    raise CheckpointError("the scheduler draws noise in an unexpected way")


def guidance_scales(guidance_scale: float, timesteps: np.ndarray, use_dynamic_cfg: bool) -> np.ndarray:
    """Return the guidance of every step, float64 [steps].

    Dynamic guidance is as in diffusers' CogVideoXPipeline, which feeds the timestep (0-999) to a formula meant for the
    step's index, so that guidance jumps about. Kept for parity.
    """
    steps = len(timesteps)
    if not use_dynamic_cfg:
        return np.full(steps, guidance_scale, np.float64)
    return np.array(
        [1 + guidance_scale * (1 - math.cos(math.pi * ((steps - int(t)) / steps) ** 5.0)) / 2 for t in timesteps]
    )
