"""Runs the stages of a request in a folder of its own, reusing what is already there for the same request."""

import dataclasses
import gc
import hashlib
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from pipeline import records
from pipeline.denoise import Denoiser
from pipeline.errors import PipelineError, RequestError, StageOutputError
from pipeline.files import append_json_line, write_json
from pipeline.loading import Checkpoint, import_libraries, resolve_checkpoint
from pipeline.parallel import ParallelOptions
from pipeline.profiling import Progress, StageTimings, no_progress
from pipeline.request import STAGES, GenerateRequest, Stage
from pipeline.stage_output import StageKey, check_stage, load_details, load_stage, save_stage, stage_key
from pipeline.text_encoder import TextEncoder
from pipeline.vae import VaeDecoder
from pipeline.video import write_mp4

logger = logging.getLogger(__name__)

VIDEO_NAME = "video.mp4"
SIDECAR_NAME = "video.json"
_PARTS: Mapping[Stage, tuple[str, ...]] = {
    "text": ("tokenizer", "text_encoder"),
    "denoise": ("transformer", "scheduler"),
    "vae": ("vae",),
}


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """What a run left. video_path: None unless the stage "vae" was among those asked for.

    timings: one of every stage asked for; those of a reused stage are from the run that made it.
    """

    run_dir: Path
    video_path: Path | None
    timings: tuple[StageTimings, ...]


def generate(
    request: GenerateRequest,
    *,
    stages: Sequence[Stage] = STAGES,
    run_dir: Path | None = None,
    output_dir: Path = Path("videos"),
    resume: bool = True,
    parallel: ParallelOptions | None = None,
    cache_dir: Path | None = None,
    results_path: Path | None = None,
    progress: Progress = no_progress,
) -> GenerateResult:
    """Run stages of one request, each with only its own weights in memory, and write the video.

    run_dir: where the stages' outputs and the video go; a folder under `output_dir` named after the request without
    it. resume: take a stage's saved output where it belongs to exactly this request, rather than run the stage again.
    parallel: how to lay the work out over the devices; does not change what is computed, so that a stage's output may
    be reused by a run with another plan. cache_dir: for checkpoint "tiny-random". results_path: a JSON-lines file that
    gets a record of the timings.
    progress: told of every step; may raise to interrupt, after which the same call resumes at the stage it was in.

    Raises CheckpointError, StageOutputError (a stage that was left out has no fitting output), NonFiniteError.
    """
    if "denoise" in stages:
        _check_attention_device(request)
    checkpoint = resolve_checkpoint(request.checkpoint, request.revision, cache_dir)
    keys = _stage_keys(request, checkpoint, stages[-1])
    run_dir = run_dir or output_dir / run_name(request)
    if run_dir.exists() and not run_dir.is_dir():
        raise RequestError(f"run_dir={str(run_dir)!r}: a file; expected a folder, or a name that is free")
    timings: list[StageTimings] = []
    details: dict[Stage, dict[str, Any]] = {}
    for stage in stages:
        if resume and _reusable(run_dir, keys[stage]):
            details[stage] = load_details(run_dir, stage)
            timings.append(details[stage]["timings"])
            continue
        arrays = _inputs(run_dir, keys, stage)
        timing = StageTimings(stage)
        arrays, details[stage] = _run_stage(request, checkpoint, stage, arrays, timing, progress, parallel)
        save_stage(run_dir, keys[stage], arrays, {**details[stage], "timings": timing.to_dict()})
        timings.append(timing)
        del arrays
        gc.collect()  # torch modules are cyclic; their device memory is wanted by the next stage
    if "denoise" in keys and "denoise" not in details and _belongs(run_dir, keys["denoise"]):
        details["denoise"] = load_details(run_dir, "denoise")
    record = records.make_record(request, timings, details.get("denoise", {}))
    if results_path is not None and not all(timing.reused for timing in timings):
        append_json_line(results_path, record)
    video_path = _write_video(request, run_dir, keys["vae"], timings, record) if "vae" in stages else None
    return GenerateResult(run_dir, video_path, tuple(timings))


def warm_up(
    request: GenerateRequest,
    *,
    stages: Sequence[Stage] = STAGES,
    parallel: ParallelOptions | None = None,
    cache_dir: Path | None = None,
    progress: Progress = no_progress,
) -> tuple[StageTimings, ...]:
    """Compile every stage of a request and try it on a single denoising step; keeps no output.

    With a persistent compilation cache the next run, of any number of steps, starts without compiling. `stages` must
    begin with "text". Raises as `generate` does.
    """
    if stages[0] != "text":
        raise RequestError(f"stages={','.join(stages)}: warming up starts from nothing; expected text first")
    with tempfile.TemporaryDirectory() as folder:
        result = generate(
            dataclasses.replace(request, num_inference_steps=1),
            stages=stages,
            run_dir=Path(folder),
            resume=False,
            parallel=parallel,
            cache_dir=cache_dir,
            progress=progress,
        )
    return result.timings


def run_name(request: GenerateRequest) -> str:
    """A folder name: the beginning of the prompt, size, frames, seed, and a digest of everything but fps."""
    slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:40].strip("-") or "video"
    size = f"{request.width}x{request.height}x{request.num_frames}"
    fields = {name: value for name, value in dataclasses.asdict(request).items() if name != "fps"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return f"{slug}-{size}-seed{request.seed}-{digest[:8]}"


def _check_attention_device(request: GenerateRequest) -> None:
    platform = jax.default_backend()
    if request.attention.implementation == "pallas_tpu" and platform != "tpu":
        raise RequestError(
            f"attention.implementation='pallas_tpu': needs a TPU, and JAX runs on {platform!r} here; "
            "leave it out, or take xla or pallas_interpret"
        )


def _stage_keys(request: GenerateRequest, checkpoint: Checkpoint, last: Stage) -> dict[Stage, StageKey]:
    needed = STAGES[: STAGES.index(last) + 1]
    identities = {stage: checkpoint.identity(*_PARTS[stage]) for stage in needed}
    return {stage: stage_key(request, stage, identities) for stage in needed}


def _belongs(run_dir: Path, key: StageKey) -> bool:
    try:
        check_stage(run_dir, key)
    except StageOutputError:
        return False
    return True


def _reusable(run_dir: Path, key: StageKey) -> bool:
    if not (run_dir / f"{key.stage}.json").exists():
        return False
    try:
        check_stage(run_dir, key)
    except StageOutputError as error:
        logger.warning("%s: running it again", error)
        return False
    logger.info("%s: reusing the output in %s", key.stage, run_dir)
    return True


def _inputs(run_dir: Path, keys: Mapping[Stage, StageKey], stage: Stage) -> dict[str, np.ndarray]:
    if stage == "text":
        return {}
    before = STAGES[STAGES.index(stage) - 1]
    try:
        return load_stage(run_dir, keys[before])
    except StageOutputError as error:
        raise StageOutputError(f"{error}; run that stage too (stages={before},{stage}), or name its run_dir") from error


def _run_stage(
    request: GenerateRequest,
    checkpoint: Checkpoint,
    stage: Stage,
    inputs: Mapping[str, np.ndarray],
    timings: StageTimings,
    progress: Progress,
    parallel: ParallelOptions | None,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The stage's arrays, and details for its JSON file."""
    import_libraries()
    run: Callable[..., tuple[dict[str, np.ndarray], dict[str, Any]]]
    run = {"text": _run_text, "denoise": _run_denoise, "vae": _run_vae}[stage]
    try:
        return run(request, checkpoint, inputs, timings, progress, parallel or ParallelOptions())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise PipelineError(
            f"{stage}: not enough device memory for {request.width}x{request.height}, {request.num_frames} frames, "
            f"{request.dtype}; try a smaller size, fewer frames, or dtype=bfloat16"
        ) from error


def _dtype(request: GenerateRequest) -> torch.dtype:
    return getattr(torch, request.dtype)


def _run_text(request, checkpoint, inputs, timings, progress, parallel):  # type: ignore[no-untyped-def]
    with timings.measure("load", progress):
        encoder = TextEncoder.load(checkpoint, _dtype(request))
    if not request.do_classifier_free_guidance:
        return {"prompt_embeds": encoder.encode([request.prompt], timings, progress)}, {}
    negative, positive = encoder.encode([request.negative_prompt, request.prompt], timings, progress)
    return {"prompt_embeds": positive[None], "negative_prompt_embeds": negative[None]}, {}


def _run_denoise(request, checkpoint, inputs, timings, progress, parallel):  # type: ignore[no-untyped-def]
    with timings.measure("load", progress):
        guided = request.do_classifier_free_guidance
        denoiser = Denoiser.load(checkpoint, _dtype(request), request.attention, parallel, guided)
    names = ("negative_prompt_embeds", "prompt_embeds") if request.do_classifier_free_guidance else ("prompt_embeds",)
    embeddings = np.concatenate([inputs[name] for name in names])
    latents = denoiser.denoise(request, embeddings, timings, progress)
    return {"latents": latents}, {
        "attention": denoiser.describe_attention(request, embeddings.shape[1]),
        "parallel": denoiser.plan.to_dict(),
    }


def _run_vae(request, checkpoint, inputs, timings, progress, parallel):  # type: ignore[no-untyped-def]
    with timings.measure("load", progress):
        decoder = VaeDecoder.load(checkpoint, _dtype(request))
    return {"frames": decoder.decode(inputs["latents"], timings, progress)}, {}


def _write_video(
    request: GenerateRequest, run_dir: Path, key: StageKey, timings: Sequence[StageTimings], record: Mapping[str, Any]
) -> Path:
    path = run_dir / VIDEO_NAME
    frames = load_stage(run_dir, key)["frames"]
    write_mp4(path, frames, request.fps)
    sidecar = {**record, "fingerprint": key.fingerprint, "stages": [timing.to_dict() for timing in timings]}
    write_json(run_dir / SIDECAR_NAME, sidecar)
    return path
