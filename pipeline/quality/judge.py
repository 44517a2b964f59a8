"""Judges the reference and the candidates: makes their videos, compares and reads them, keeps records."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.checkpoints.loading import resolve_checkpoint, use_compilation_cache
from pipeline.checkpoints.shapes import parse_caption
from pipeline.quality.config import Budget, QualityConfig
from pipeline.quality.gate import (
    Comparison,
    QualityVariant,
    compare,
    first_frame_psnr,
    first_frames,
    to_uint8,
    variant_videos,
)
from pipeline.requests.config import GenerateConfig
from pipeline.requests.options import to_parallel
from pipeline.requests.request import to_request
from pipeline.runs.records import devices, environment
from pipeline.runs.video import write_mp4
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import require_writable
from splash_workbench.records import jsonl
from splash_workbench.records.quality import QualityRecord
from splash_workbench.trial_status import Label

_NOT_OF_A_CANDIDATE = {"name", "budget"}


def judge(settings: QualityConfig) -> int:
    """Print a table, append records; return 1 where one is over its budget or prompts are not followed enough."""
    if settings.compilation_cache:
        use_compilation_cache()
    from_config(lambda: [parse_caption(caption) for caption in settings.captions])
    captions = [caption for caption in settings.captions for _ in settings.seeds]
    if not captions:
        raise UserError("captions, seeds: expected at least one each")
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(GenerateConfig)}
    base = GenerateConfig(**{**fields, "prompt": settings.captions[0]})
    reference = QualityVariant("reference", to_request(base), to_parallel(base), Budget(float("inf"), 1.0))
    candidates = [_candidate(base, fields, settings.budget) for fields in settings.candidates]
    names = [candidate.name for candidate in candidates]
    if unknown := set(settings.only) - set(names):
        raise UserError(f"only={sorted(unknown)}: expected some of {', '.join(names)}")
    chosen = [candidate for candidate in candidates if candidate.name in (settings.only or names)]
    cache_dir = Path(settings.cache_dir) if settings.cache_dir else None
    if not 0 <= settings.follows <= 1:
        raise UserError(f"follows={settings.follows}: expected 0 to 1, a part of the videos")
    if not settings.first_frame_db >= 0:
        raise UserError(f"first_frame_db={settings.first_frame_db}: expected 0 or more, in dB")
    resolve_checkpoint(reference.request.checkpoint, reference.request.revision, cache_dir)
    if settings.videos_dir is not None:
        require_writable(f"videos_dir={settings.videos_dir}", Path(settings.videos_dir))

    def videos_of(candidate: QualityVariant) -> np.ndarray:
        def say(text: str) -> None:
            print(f"  {candidate.name}: {text}", file=sys.stderr, flush=True)

        say("compiling ...")
        return variant_videos(candidate, settings.captions, settings.seeds, cache_dir, say)

    expected = videos_of(reference)
    images = first_frames(reference.request, settings.captions, settings.seeds, cache_dir)
    first_frame_db = [] if images is None else first_frame_psnr(expected, images)
    if settings.videos_dir is not None:
        for caption, seed, video in zip(captions, settings.seeds * len(settings.captions), expected, strict=True):
            path = Path(settings.videos_dir) / f"{caption.replace(' ', '-')}-seed{seed}.mp4"
            write_mp4(path, to_uint8(video), reference.request.fps)
    failed = False
    print(_HEADER, flush=True)
    for candidate in (reference, *chosen):
        videos = expected if candidate is reference else videos_of(candidate)
        outcome = compare(candidate, videos, expected, captions)
        failures = outcome.failures
        if candidate is reference and outcome.read_back["all"] < settings.follows:
            failures = [f"follows its prompts in {outcome.read_back['all']:.0%}, expected {settings.follows:.0%}"]
        if candidate is reference and first_frame_db:
            print(f"  first frames beside their images: {min(first_frame_db):.1f} dB or more", flush=True)
            if min(first_frame_db) < settings.first_frame_db:
                failures.append(f"first frame {min(first_frame_db):.1f} dB < {settings.first_frame_db:g} dB")
        failed = failed or bool(failures)
        print(_row(outcome, failures), flush=True)
        if settings.results_path is not None:
            jsonl.append(Path(settings.results_path), _record(outcome, failures, settings))
    print("over budget" if failed else "all within budget")
    return int(failed)


def _candidate(base: GenerateConfig, fields: dict[str, Any], budget: Budget) -> QualityVariant:
    """Return a candidate of the configuration: the reference's keys with its own in their place."""
    name = fields.get("name")
    if not name:
        raise UserError(f"candidates: expected a name in {fields}")
    changes = {key: value for key, value in fields.items() if key not in _NOT_OF_A_CANDIDATE}
    own = fields.get("budget", {})  # a Budget where it names another key of the configuration
    limits = {**dataclasses.asdict(budget), **(dataclasses.asdict(own) if isinstance(own, Budget) else own)}
    try:
        settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), changes))
        return QualityVariant(name, to_request(settings), to_parallel(settings), Budget(**limits))
    except (UserError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"candidate {name!r}: {str(error).splitlines()[0]}") from error


_COLUMNS = ("colour", "shape", "motion", "all")
_HEADER = f"  {'':<22} {'PSNR dB':>8} {'SSIM':>7} " + " ".join(f"{name:>7}" for name in _COLUMNS)


def _row(outcome: Comparison, failures: list[str]) -> str:
    """Return a line: the worst video's PSNR and SSIM, and the fractions of videos that show what the prompt says."""
    psnr = min(outcome.psnr_db)
    figures = " ".join(f"{outcome.read_back[name]:>7.0%}" for name in _COLUMNS)
    verdict = "; ".join(failures) or "ok"
    same = "same" if psnr == float("inf") else f"{psnr:.1f}"
    return f"  {outcome.variant.name:<22} {same:>8} {min(outcome.ssim):>7.4f} {figures}  {verdict}"


def _record(outcome: Comparison, failures: list[str], settings: QualityConfig) -> QualityRecord:
    """Return the record of a candidate; PSNR is None where a video is the reference's very own."""
    candidate = outcome.variant
    is_reference = candidate.name == "reference"
    return QualityRecord(
        label=Label.MEASURED,
        device=devices(),
        environment=environment(),
        request=dataclasses.asdict(candidate.request),
        candidate=candidate.name,
        parallel=dataclasses.asdict(candidate.parallel),
        prompts=tuple(settings.captions),
        seeds=tuple(settings.seeds),
        budget={"follows": settings.follows} if is_reference else dataclasses.asdict(candidate.budget),
        psnr_db=tuple(None if value == float("inf") else value for value in outcome.psnr_db),
        ssim=tuple(outcome.ssim),
        readings=tuple(dataclasses.asdict(reading) for reading in outcome.readings),
        read_back=outcome.read_back,
        failures=tuple(failures),
    )
