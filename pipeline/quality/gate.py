"""Compares ways to compute the same videos: each variant against the reference, on the same prompts, seeds and noise.

A variant is a name and keys of `pipeline.generate` (dtype, attention, parallel ...). Its videos are compared frame by
frame with the reference's (PSNR, SSIM, `pipeline.quality.learned`), and read back (`pipeline.quality.read_back`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from pipeline.quality.config import Budget
from pipeline.quality.learned import lpips
from pipeline.quality.read_back import Reading, fractions, read_video
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest
from splash_workbench.records.jsonl import decode
from splash_workbench.records.quality import PairRecord


@dataclasses.dataclass(frozen=True)
class QualityVariant:
    """One way to compute the videos. request: all but prompt and seed count."""

    name: str
    request: GenerateRequest
    parallel: ParallelOptions
    budget: Budget


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A variant's videos beside the reference's, at least one."""

    variant: QualityVariant
    pairs: Sequence[PairRecord]

    @property
    def psnr_db(self) -> tuple[float, ...]:
        """Return PSNR in dB, one a video; infinite where the videos are the same."""
        return tuple(float("inf") if pair.psnr_db is None else pair.psnr_db for pair in self.pairs)

    @property
    def ssim(self) -> tuple[float, ...]:
        """Return SSIM, one a video."""
        return tuple(pair.ssim for pair in self.pairs)

    @property
    def lpips(self) -> tuple[float, ...]:
        """Return LPIPS, one a video; empty where it was not computed."""
        return tuple(pair.lpips for pair in self.pairs if pair.lpips is not None)

    @property
    def denoise_time_s(self) -> float:
        """Return seconds of a video's denoising steps, the median of the videos."""
        return float(np.median([pair.denoise_time_s for pair in self.pairs]))

    @property
    def is_read_back(self) -> bool:
        """Return whether the prompts are captions, of which something can be read back."""
        return all(pair.reading is not None for pair in self.pairs)

    @property
    def read_back(self) -> dict[str, float]:
        """Return the fractions of the videos that show what their prompts say; empty where nothing is read back."""
        if not self.is_read_back:
            return {}
        return fractions([decode(pair.reading, Reading) for pair in self.pairs], [pair.prompt for pair in self.pairs])

    @property
    def failures(self) -> list[str]:
        """Say why the variant is over its budget; empty where it is not."""
        budget, found = self.variant.budget, []
        psnr_db, ssim = np.min(self.psnr_db), np.min(self.ssim)  # NaN where any is, unlike min()
        if not psnr_db >= budget.psnr_db:
            found.append(f"PSNR {psnr_db:.1f} dB < {budget.psnr_db:g} dB")
        if not ssim >= budget.ssim:
            found.append(f"SSIM {ssim:.4f} < {budget.ssim:g}")
        if self.lpips and not np.max(self.lpips) <= budget.lpips:
            found.append(f"LPIPS {np.max(self.lpips):.4f} > {budget.lpips:g}")
        if budget.read_back and self.is_read_back:
            changed = sum(not _read_alike(pair) for pair in self.pairs)
            if changed:
                found.append(f"reads otherwise than the reference in {changed} of {len(self.pairs)}")
        return found


def _read_alike(pair: PairRecord) -> bool:
    here, there = (decode(reading, Reading) for reading in (pair.reading, pair.reference_reading))
    return (here.colour, here.shape, here.motion) == (there.colour, there.shape, there.motion)


def measure(video: np.ndarray, reference: np.ndarray, with_lpips: bool, with_readings: bool) -> dict[str, Any]:
    """Return the fields of a PairRecord that say how a video differs from the reference's.

    video, reference: float [frames, height, width, 3] in [0, 1].
    """
    psnr_db, ssim = _similarity(video, reference)
    found: dict[str, Any] = {"psnr_db": psnr_db, "ssim": ssim, "lpips": lpips(video, reference) if with_lpips else None}
    if with_readings:
        for name, frames in (("reading", video), ("reference_reading", reference)):
            found[name] = dataclasses.asdict(read_video(to_uint8(frames)))
    return found


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Quantize float frames in [0, 1] as the VAE stage does."""
    return np.round(frames * 255).astype(np.uint8)


def _similarity(video: np.ndarray, reference: np.ndarray) -> tuple[float | None, float]:
    """Return PSNR in dB over the video, None where it is the same, and SSIM as the frames' mean."""
    if np.array_equal(video, reference):
        return None, 1.0
    psnr = peak_signal_noise_ratio(reference, video, data_range=1.0)
    frames = zip(video, reference, strict=True)
    ssim = [structural_similarity(there, here, data_range=1.0, channel_axis=-1) for here, there in frames]
    return float(psnr), float(np.mean(ssim))
