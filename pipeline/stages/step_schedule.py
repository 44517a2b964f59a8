"""Which denoising steps run the transformer's blocks, and for which prompts, as a request's cache options say."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.checkpoints.magcache import read_ratios
from pipeline.model.denoise_step import Reuse, StepWork
from pipeline.model.transformer import TransformerShape, timestep_embedding
from pipeline.requests.reuse import CacheOptions
from splash_workbench.files import user_path


@dataclasses.dataclass(frozen=True)
class StepSchedule:
    """What a run keeps from step to step, and the work of each step.

    Where the first block decides, every step may run all blocks, and how many did is known after the run only.
    """

    reuse: Reuse
    steps: tuple[StepWork, ...]

    @property
    def kinds(self) -> tuple[StepWork, ...]:
        """Return the kinds of steps that a run may have, of any number of steps: what is to be compiled."""
        prompts = (True, False) if self.reuse.guidance else (True,)
        blocks = (True, False) if self.reuse.residual and self.reuse.first_block is None else (True,)
        return tuple(StepWork(*kind) for kind in itertools.product(blocks, prompts))

    @property
    def steps_computed(self) -> int:
        """Return how many steps run the blocks, or may."""
        return sum(work.blocks for work in self.steps)

    @property
    def needs_kept(self) -> tuple[bool, ...]:
        """Return for each step whether it reads what was kept, so that a run that begins there must have it."""
        decides = self.reuse.first_block is not None
        return tuple(decides or not (work.blocks and work.negative) for work in self.steps)


def step_schedule(cache: CacheOptions, guided: bool, timesteps: np.ndarray, embed: Any) -> StepSchedule:
    """Return the schedule of a run.

    Args:
      cache: with nothing left open, see `pipeline.requests.reuse.Preset.cache`.
      guided: whether there is a negative prompt.
      timesteps: [steps], what the model is told.
      embed: timesteps -> their embeddings, [steps, channels]; called by teacache.
    """
    steps, method = len(timesteps), cache.method or "none"
    blocks = [True] * steps
    if method == "teacache":
        assert cache.coefficients is not None and cache.threshold is not None
        blocks = teacache_steps(embed(timesteps), cache.coefficients, cache.threshold)
    elif method == "magcache":
        assert cache.ratios is not None and cache.threshold is not None
        ratios = read_ratios(user_path(cache.ratios)).at(timesteps)
        blocks = magcache_steps(ratios.tolist(), cache.threshold, cache.max_reused, cache.first_steps)
    every = cache.unconditional_every or 1 if guided else 1
    first_block = cache.threshold if method == "first_block" else None
    return StepSchedule(Reuse(method != "none", every > 1, first_block), tuple(with_prompts(blocks, every)))


def teacache_steps(embeddings: np.ndarray, coefficients: Sequence[float], threshold: float) -> list[bool]:
    """Return which steps TeaCache runs: the first, the last, and where the change since has reached the threshold.

    embeddings: [steps, channels], of the timesteps. coefficients: of the polynomial, highest power first, from the
    relative change of the embedding to that of the model's output.
    """
    embeddings = np.asarray(embeddings, np.float64)
    steps, total, runs = len(embeddings), 0.0, []
    for index, embedding in enumerate(embeddings):
        if index in (0, steps - 1):
            run = True
        else:
            before = embeddings[index - 1]
            total += float(np.polyval(coefficients, np.abs(embedding - before).mean() / np.abs(before).mean()))
            run = not total < threshold
        total = 0.0 if run else total
        runs.append(run)
    return runs


def magcache_steps(ratios: Sequence[float], threshold: float, max_reused: int, first_steps: float) -> list[bool]:
    """Return which steps MagCache runs: where the sum of |1 - product of the ratios since| is beyond the threshold.

    ratios: of what the blocks add in each step over the step before. max_reused: steps in a row that do not run.
    first_steps: the fraction at the beginning that does.
    """
    ratio, error, reused, runs = 1.0, 0.0, 0, []
    for index, grown in enumerate(ratios):
        run = True
        if index and index >= int(first_steps * len(ratios) + 0.5):
            ratio, reused = ratio * grown, reused + 1
            error += abs(1 - ratio)
            run = error > threshold or reused > max_reused
        if run:
            ratio, error, reused = 1.0, 0.0, 0
        runs.append(run)
    return runs


def with_prompts(blocks: Sequence[bool], every: int) -> list[StepWork]:
    """Return the steps' work: of those that run the blocks each `every`-th, and the last, has the negative prompt.

    A step that does not run them has the prompts of the step that it reuses.
    """
    work, count, negative = [], 0, True
    for index, run in enumerate(blocks):
        if run:
            negative = count % every == 0 or index == len(blocks) - 1
            count += 1
        work.append(StepWork(run, negative))
    return work


def embed_timesteps(weights: Mapping[str, Any], shape: TransformerShape, timesteps: np.ndarray) -> np.ndarray:
    """Return the embeddings of timesteps, float32 [steps, time_embed_dim], computed in float32.

    weights: host arrays, of which those of the embeddings are read.
    """
    floats = {name: jnp.asarray(value, jnp.float32) for name, value in weights.items() if "_embedding." in name}
    with jax.default_matmul_precision("highest"):
        one = jax.jit(lambda timestep: timestep_embedding(floats, shape, timestep, jnp.float32))
        return np.stack([np.asarray(one(np.int32(timestep))) for timestep in timesteps])
