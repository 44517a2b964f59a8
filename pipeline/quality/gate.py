"""Compares ways to compute the same videos: each variant against the reference, on the same prompts, seeds and noise.

A variant is a name and keys of `pipeline.generate` (dtype, attention, parallel ...). Its videos are compared frame by
frame with the reference's (PSNR, SSIM), and read back (`pipeline.quality.read_back`).
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline.checkpoints.checks import check_request, read_configs
from pipeline.checkpoints.loading import resolve_checkpoint
from pipeline.checkpoints.shapes import draw, parse_caption, random_scene
from pipeline.model.latents import LatentGeometry
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.model.transformer import TransformerShape
from pipeline.quality.config import Budget
from pipeline.quality.read_back import Reading, fractions, read_video
from pipeline.requests.errors import PipelineError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import STAGES, GenerateRequest
from pipeline.stages.stages import StageContext, Stages
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Runner

Say = Callable[[str], None]
_DRAWN = "drawn"  # in place of an image's path
IMAGE_SPREAD = 0.3  # of drawn first frames, as configs/what/i2v.yaml has it
_TIMEOUT_S = 86400.0  # of videos on simulated devices


@dataclasses.dataclass(frozen=True)
class QualityVariant:
    """One way to compute the videos. request: all but prompt and seed count."""

    name: str
    request: GenerateRequest
    parallel: ParallelOptions
    budget: Budget


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A variant beside the reference, one entry a video. psnr_db: infinite where the videos are the same."""

    variant: QualityVariant
    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    readings: tuple[Reading, ...]
    reference_readings: tuple[Reading, ...]
    captions: tuple[str, ...]

    @property
    def read_back(self) -> dict[str, float]:
        """Return the fractions of the videos that show what their prompts say."""
        return fractions(self.readings, self.captions)

    @property
    def failures(self) -> list[str]:
        """Say why the variant is over its budget; empty where it is not."""
        budget, found = self.variant.budget, []
        if not min(self.psnr_db) >= budget.psnr_db:
            found.append(f"PSNR {min(self.psnr_db):.1f} dB < {budget.psnr_db:g} dB")
        if not min(self.ssim) >= budget.ssim:
            found.append(f"SSIM {min(self.ssim):.4f} < {budget.ssim:g}")
        if budget.read_back:
            changed = [
                caption
                for caption, here, there in zip(self.captions, self.readings, self.reference_readings, strict=True)
                if (here.colour, here.shape, here.motion) != (there.colour, there.shape, there.motion)
            ]
            if changed:
                found.append(f"reads otherwise than the reference in {len(changed)} of {len(self.captions)}")
        return found


def compare(variant: QualityVariant, videos: np.ndarray, reference: np.ndarray, captions: Sequence[str]) -> Comparison:
    """Compare float videos [videos, frames, height, width, 3] in [0, 1] with the reference's."""
    psnr, ssim = zip(*(_similarity(one, other) for one, other in zip(videos, reference, strict=True)), strict=True)
    readings, reference_readings = (
        tuple(read_video(to_uint8(video)) for video in each) for each in (videos, reference)
    )
    return Comparison(variant, psnr, ssim, readings, reference_readings, tuple(captions))


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Quantize float frames in [0, 1] as the VAE stage does."""
    return np.round(frames * 255).astype(np.uint8)


def _similarity(video: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Return PSNR in dB over the video, and SSIM as the frames' mean."""
    if np.array_equal(video, reference):
        return float("inf"), 1.0
    psnr = peak_signal_noise_ratio(reference, video, data_range=1.0)
    frames = zip(video, reference, strict=True)
    ssim = [structural_similarity(there, here, data_range=1.0, channel_axis=-1) for here, there in frames]
    return float(psnr), float(np.mean(ssim))


def first_frames(
    request: GenerateRequest, prompts: Sequence[str], seeds: Sequence[int], cache_dir: Path | None = None
) -> np.ndarray | None:
    """Draw what the videos of captions begin with, uint8 [prompts x seeds, height, width, 3]; None of a text model."""
    checkpoint = resolve_checkpoint(request.checkpoint, request.revision, cache_dir)
    if not TransformerShape.from_config(checkpoint.config("transformer")).takes_image:
        return None
    size = request.height, request.width
    drawn = []
    for prompt in prompts:
        for seed in seeds:
            rng = np.random.default_rng([seed, *prompt.encode()])
            scene = random_scene(rng, *size, spread=IMAGE_SPREAD, **parse_caption(prompt))  # type: ignore[arg-type]
            drawn.append(draw(scene, 1, *size)[0])
    return np.stack(drawn)


def first_frame_psnr(videos: np.ndarray, images: np.ndarray) -> list[float]:
    """Return the PSNR in dB of each video's first frame with its image. videos: as of `compare`. images: uint8."""
    pairs = zip(videos, images / np.float32(255), strict=True)
    return [float(peak_signal_noise_ratio(image, video[0], data_range=1.0)) for video, image in pairs]


def make_videos(
    request: GenerateRequest,
    parallel: ParallelOptions,
    prompts: Sequence[str],
    seeds: Sequence[int],
    cache_dir: Path | None = None,
    say: Say = lambda text: None,
) -> np.ndarray:
    """Make float32 videos [prompts x seeds, frames, height, width, 3] in [0, 1], seeds running fastest.

    The initial noise of a seed is drawn in float32 and then rounded to the request's dtype, so that it is the same for
    all. An image-to-video model begins with `first_frames`. Raises what the stages raise.
    """
    images = first_frames(request, prompts, seeds, cache_dir)
    if images is not None:
        request = dataclasses.replace(request, image=_DRAWN)
    checkpoint = resolve_checkpoint(request.checkpoint, request.revision, cache_dir, request.transformer)
    configs = read_configs(checkpoint)
    check_request(request, configs)
    stages = Stages()
    base = StageContext(checkpoint, request, checkpoint.identities(*STAGES), parallel)
    base.loaded_key("denoise")  # raises for a plan that does not fit, before the text is encoded
    geometry = LatentGeometry.from_request(request, configs["transformer"], configs["vae"])
    videos: list[np.ndarray] = []
    for prompt in prompts:
        prompted = dataclasses.replace(request, prompt=prompt)
        embeddings = stages.encode(base, prompted.prompts)
        for seed in seeds:
            noise = torch.randn(geometry.shape, generator=torch.Generator().manual_seed(seed))
            noise = noise.to(getattr(torch, request.dtype))
            context = dataclasses.replace(base, request=dataclasses.replace(prompted, seed=seed))
            pictures = None if images is None else [Image.fromarray(images[len(videos)])]
            moments = stages.encode_source(context, pictures)
            latents = stages.denoise(context, embeddings, latents=torch_to_numpy(noise), moments=moments)
            videos.append(stages.decode(context, latents, quantize=False))
            say(f"{len(videos)} of {len(prompts) * len(seeds)} videos")
    return np.stack(videos)


def variant_videos(
    variant: QualityVariant,
    prompts: Sequence[str],
    seeds: Sequence[int],
    cache_dir: Path | None = None,
    say: Say = lambda text: None,
) -> np.ndarray:
    """Call `make_videos` here, or, on a CPU with too few devices for the plan, in a process that simulates them."""
    wanted = variant.parallel.num_devices or 1
    if wanted <= jax.device_count() or jax.default_backend() != "cpu":
        return make_videos(variant.request, variant.parallel, prompts, seeds, cache_dir, say)
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={wanted}".strip()
    with tempfile.TemporaryDirectory() as folder:
        job = {
            "request": dataclasses.asdict(variant.request),
            "parallel": dataclasses.asdict(variant.parallel),
            "prompts": list(prompts),
            "seeds": list(seeds),
            "cache_dir": str(cache_dir) if cache_dir else None,
            "compilation_cache_dir": jax.config.values["jax_compilation_cache_dir"],
            "output": f"{folder}/videos.npy",
        }
        outcome = Runner(Path(folder)).run(
            f"{__name__}:save_videos",
            job,
            timeout_s=_TIMEOUT_S,
            variables=lambda _: {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        )
        if outcome.status != Status.OK:
            raise PipelineError(f"{variant.name}: failed on {wanted} simulated devices ({outcome.error})")
        return np.load(job["output"])


def save_videos(job: Mapping[str, Any]) -> dict[str, Any]:
    """Call `make_videos`, in a worker, with the arguments that a job names; write them to its "output"."""
    jax.config.update("jax_compilation_cache_dir", job["compilation_cache_dir"])
    cache_dir = Path(job["cache_dir"]) if job["cache_dir"] else None
    request, parallel = decode(job["request"], GenerateRequest), decode(job["parallel"], ParallelOptions)
    np.save(job["output"], make_videos(request, parallel, job["prompts"], job["seeds"], cache_dir))
    return {}
