"""Makes the videos that are compared: one after the other, of the same prompts, seeds and initial noise for all."""

import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

from pipeline.checkpoints.checks import check_request, check_weights, checkpoint_of, read_configs
from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.shapes import draw, parse_caption, random_scene
from pipeline.model.latents import LatentGeometry
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.model.transformer import TransformerShape
from pipeline.quality.gate import QualityVariant
from pipeline.requests.errors import PipelineError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import STAGES, GenerateRequest
from pipeline.stages.progress import Progress, StageClock, no_progress
from pipeline.stages.stages import StageContext, Stages
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Runner

#: A prompt and a seed: what a video is made of besides its request.
Wanted = tuple[str, int]
_DRAWN = "drawn"  # in place of an image's path
IMAGE_SPREAD = 0.3  # of drawn first frames, as configs/what/i2v.yaml has it
_TIMEOUT_S = 86400.0  # of videos on simulated devices


@dataclasses.dataclass(frozen=True)
class Made:
    """A video, float32 [frames, height, width, 3] in [0, 1].

    denoise_time_s: of its denoising steps; steps_computed: how many of them ran the transformer's blocks.
    """

    frames: np.ndarray
    denoise_time_s: float
    steps_computed: int


def begins_with_drawn(request: GenerateRequest, checkpoint: Checkpoint) -> bool:
    """Return whether the model begins with an image, and the request gives none: `first_frame` is drawn for it."""
    takes_image = TransformerShape.from_config(checkpoint.config("transformer")).takes_image
    return takes_image and request.image is None


def first_frame(request: GenerateRequest, prompt: str, seed: int) -> np.ndarray:
    """Draw what the video of a caption begins with, uint8 [height, width, 3]. Raises ValueError for another prompt."""
    size = request.height, request.width
    rng = np.random.default_rng([seed, *prompt.encode()])
    scene = random_scene(rng, *size, spread=IMAGE_SPREAD, **parse_caption(prompt))  # type: ignore[arg-type]
    return draw(scene, 1, *size)[0]


def first_frame_psnr(video: np.ndarray, image: np.ndarray) -> float:
    """Return the PSNR in dB of a video's first frame with its image. video: as of `Made`. image: uint8."""
    return float(peak_signal_noise_ratio(image / np.float32(255), video[0], data_range=1.0))


def each_video(
    request: GenerateRequest,
    parallel: ParallelOptions,
    wanted: Sequence[Wanted],
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
) -> Iterator[Made]:
    """Make the videos of prompts and seeds, one when asked for it; equal prompts in a row are encoded once.

    The initial noise of a seed is drawn in float32 and then rounded to the request's dtype, so that it is the same for
    all. An image-to-video model without an image begins with `first_frame`. progress: told of denoising steps. Raises
    what the stages raise.
    """
    checkpoint = checkpoint_of(request, cache_dir)
    drawn = begins_with_drawn(request, checkpoint)
    if drawn:
        request = dataclasses.replace(request, image=_DRAWN)
    configs = read_configs(checkpoint)
    check_request(request, configs)
    check_weights(checkpoint, configs, STAGES, request.encodes)
    stages = Stages()
    base = StageContext(checkpoint, request, checkpoint.identities(*STAGES), parallel)
    base.loaded_key("denoise")  # raises for a plan that does not fit, before the text is encoded
    geometry = LatentGeometry.from_request(request, configs["transformer"], configs["vae"])
    encoded, embeddings = None, np.empty(0)
    for prompt, seed in wanted:
        prompted = dataclasses.replace(request, prompt=prompt)
        if prompt != encoded:
            encoded, embeddings = prompt, stages.encode(base, prompted.prompts)
        noise = torch.randn(geometry.shape, generator=torch.Generator().manual_seed(seed))
        noise = noise.to(getattr(torch, request.dtype))
        context = dataclasses.replace(base, request=dataclasses.replace(prompted, seed=seed))
        pictures = [Image.fromarray(first_frame(request, prompt, seed))] if drawn else None
        moments = stages.encode_source(context, pictures)
        clock = StageClock("denoise", progress)
        timed = dataclasses.replace(context, clock=clock)
        latents = stages.denoise(timed, embeddings, latents=torch_to_numpy(noise), moments=moments)
        computed = clock.timings.steps_computed
        yield Made(
            stages.decode(context, latents, quantize=False),
            sum(clock.timings.step_times_s),
            request.num_inference_steps if computed is None else computed,
        )


def variant_videos(
    variant: QualityVariant,
    wanted: Sequence[Wanted],
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
) -> Iterator[Made]:
    """Call `each_video` here, or, on a CPU with too few devices for the plan, in a process that simulates them."""
    num_devices = variant.parallel.num_devices or 1
    if num_devices <= jax.device_count() or jax.default_backend() != "cpu":
        yield from each_video(variant.request, variant.parallel, wanted, cache_dir, progress)
        return
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}".strip()
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "request": dataclasses.asdict(variant.request),
            "parallel": dataclasses.asdict(variant.parallel),
            "wanted": [list(one) for one in wanted],
            "cache_dir": str(cache_dir) if cache_dir else None,
            "compilation_cache_dir": jax.config.values["jax_compilation_cache_dir"],
            "output": folder,
        }
        outcome = Runner(Path(folder)).run(
            f"{__name__}:save_videos",
            job,
            timeout_s=_TIMEOUT_S,
            variables=lambda _: {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        )
        if outcome.status != Status.OK:
            raise PipelineError(f"{variant.name}: failed on {num_devices} simulated devices ({outcome.error})")
        for index in range(len(wanted)):
            with np.load(f"{folder}/{index}.npz") as made:
                yield Made(made["frames"], float(made["denoise_time_s"]), int(made["steps_computed"]))


def save_videos(job: Mapping[str, Any]) -> dict[str, Any]:
    """Call `each_video`, in a worker, with the arguments that a job names; write them to its folder "output"."""
    jax.config.update("jax_compilation_cache_dir", job["compilation_cache_dir"])
    cache_dir = Path(job["cache_dir"]) if job["cache_dir"] else None
    request, parallel = decode(job["request"], GenerateRequest), decode(job["parallel"], ParallelOptions)
    wanted = [(prompt, seed) for prompt, seed in job["wanted"]]
    for index, made in enumerate(each_video(request, parallel, wanted, cache_dir)):
        np.savez(f"{job['output']}/{index}.npz", **vars(made))
    return {}
