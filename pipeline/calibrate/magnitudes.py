"""MagCache's calibration: how what the transformer's blocks add grows from step to step (arXiv:2506.09045)."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from pipeline.checkpoints.magcache import MagnitudeRatios
from pipeline.model.placement import to_host
from pipeline.requests.reuse import CacheOptions
from pipeline.stages.denoise_loop import DenoiseLoop
from pipeline.stages.progress import Progress, StageClock, StageEvent, Work
from pipeline.stages.stages import StageContext, Stages

#: Keeps what the blocks add, and always runs them.
_OBSERVED = CacheOptions("teacache", threshold=0.0, coefficients=(0.0,))
_TINY = 1e-8  # of norms, below which nothing is divided by them


def measure_ratios(context: StageContext, progress: Progress) -> MagnitudeRatios:
    """Run a request; return each step's ratio: of the norms, over channels, of what all blocks add, to the step before.

    It is the mean over the video's tokens and the prompts. Raises what the stages raise.
    """

    def timed(stage: Work) -> StageContext:
        return dataclasses.replace(context, clock=StageClock(stage, progress))

    stages = Stages()
    embeddings = stages.encode(timed("text"), context.request.prompts)
    stages.drop("text")
    moments = stages.encode_source(timed("encode"))
    denoiser = stages.loaded("denoise", timed("denoise"))
    request = dataclasses.replace(context.request, cache=_OBSERVED)
    norm = jax.jit(lambda residual: jnp.linalg.norm(residual.astype(jnp.float32), axis=-1))
    norms: list[np.ndarray] = []

    def observe(event: StageEvent) -> None:
        if event.phase == "run" and event.step:
            norms.append(to_host(norm(loop.kept("residual")))[:, loop.video_rows])
        progress(event)

    loop = DenoiseLoop(denoiser, request, embeddings, StageClock("denoise", observe), None, None, moments)
    loop.run()
    ratios = [float((after / (before + _TINY)).mean()) for before, after in itertools.pairwise(norms)]
    return MagnitudeRatios(tuple(map(float, loop.timesteps)), (1.0, *ratios))
