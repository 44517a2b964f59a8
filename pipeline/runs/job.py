"""Runs the stages of a request in a folder of its own, reusing what is already there for the same request."""

import dataclasses
import json
import logging
import os
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from pipeline.checkpoints.loading import Checkpoint, resolve_checkpoint
from pipeline.requests.errors import RequestError, StageOutputError
from pipeline.requests.request import STAGES, GenerateRequest, Stage
from pipeline.requests.run_names import run_name
from pipeline.requests.run_options import RunOptions
from pipeline.runs import records
from pipeline.runs.outputs import StageKey, check_stage, load_details, load_stage, save_stage, stage_key
from pipeline.runs.run_stage import LoadedStages, denoise_key, run_stage, text_key
from pipeline.runs.video import write_mp4
from pipeline.stages.progress import Progress, StageTimings, no_progress
from pipeline.stages.resume import StateFile
from splash_workbench.files import remove_leftovers, write_json
from splash_workbench.records import jsonl
from splash_workbench.records.generation import GenerationRecord

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
    options: RunOptions | None = None,
    cache_dir: Path | None = None,
    results_path: Path | None = None,
    progress: Progress = no_progress,
) -> GenerateResult:
    """Run stages of one request, each with only its own weights in memory, and write the video.

    run_dir: where the stages' outputs and the video go; a folder under `output_dir` named after the request without
    it. cache_dir: for checkpoint "tiny-random". results_path: a JSON-lines file that gets a record of the
    timings.
    progress: told of every step; may raise to interrupt, after which the same call resumes where it was: at the step
    in the stage "denoise", else at the beginning of the stage.

    Raises CheckpointError, StageOutputError (a stage that was left out has no fitting output), NonFiniteError.
    """
    options, run_dir = options or RunOptions(), run_dir or output_dir / run_name(request)
    checkpoint = resolve_checkpoint(request.checkpoint, request.revision, cache_dir)
    job = Job.prepare(request, stages, run_dir, checkpoint, identities(checkpoint, stages), options)
    for stage in stages:
        loaded = LoadedStages()
        job.run(stage, loaded, options, progress)
        loaded.drop(stage)
    return job.finish(options, results_path)


def warm_up(
    request: GenerateRequest,
    *,
    stages: Sequence[Stage] = STAGES,
    options: RunOptions | None = None,
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
            options=dataclasses.replace(options or RunOptions(), resume=False),
            cache_dir=cache_dir,
            progress=progress,
        )
    return result.timings


@dataclasses.dataclass
class Job:
    """One request on its way through its stages.

    keys: of the stages asked for and all before them. shared: of the stages "text" and "denoise"; jobs with equal ones
    share what is loaded. timings, details: of the stages that are done.
    """

    request: GenerateRequest
    stages: tuple[Stage, ...]
    run_dir: Path
    checkpoint: Checkpoint
    keys: Mapping[Stage, StageKey]
    shared: Mapping[Stage, Hashable]
    timings: list[StageTimings] = dataclasses.field(default_factory=list)
    details: dict[Stage, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def prepare(
        cls,
        request: GenerateRequest,
        stages: Sequence[Stage],
        run_dir: Path,
        checkpoint: Checkpoint,
        identities: Mapping[Stage, str],
        options: RunOptions,
    ) -> Self:
        """Checked against what is here, without any work. Raises RequestError and CheckpointError."""
        _check_folder(run_dir)
        keys = {stage: stage_key(request, stage, identities) for stage in identities}
        shared: dict[Stage, Hashable] = {"text": text_key(request, keys["text"])}
        if "denoise" in stages:
            _check_attention_device(request)
            shared["denoise"] = denoise_key(request, keys["denoise"], checkpoint, options.parallel)
        return cls(request, tuple(stages), run_dir, checkpoint, keys, shared)

    def run(self, stage: Stage, loaded: LoadedStages, options: RunOptions, progress: Progress = no_progress) -> None:
        """Run a stage and save its output, or take the saved one of exactly this request."""
        key = self.keys[stage]
        if options.resume and self._reusable(key):
            self.details[stage] = load_details(self.run_dir, stage)
            self.timings.append(self.details[stage]["timings"])
        else:
            inputs, timings = self._inputs(stage), StageTimings(stage)
            arrays, self.details[stage] = run_stage(
                self.request, self.checkpoint, key, inputs, self.run_dir, timings, options, loaded, progress
            )
            save_stage(self.run_dir, key, arrays, {**self.details[stage], "timings": timings.to_dict()})
            self.timings.append(timings)
        if stage == "denoise":
            StateFile(self.run_dir, "").remove()

    def finish(self, options: RunOptions, results_path: Path | None = None) -> GenerateResult:
        """Record the timings, and write the video where its stage was among those run."""
        if "denoise" in self.keys and "denoise" not in self.details and self._belongs(self.keys["denoise"]):
            self.details["denoise"] = load_details(self.run_dir, "denoise")
        record = records.make_record(self.request, self.timings, self.details.get("denoise", {}))
        if results_path is not None and not all(timing.reused for timing in self.timings):
            jsonl.append(results_path, record)
        video_path = self._write_video(record, options) if "vae" in self.stages else None
        written = [f"{stage}.{suffix}" for stage in self.stages for suffix in ("safetensors", "json")]
        remove_leftovers(*(self.run_dir / name for name in (*written, VIDEO_NAME, SIDECAR_NAME)))
        return GenerateResult(self.run_dir, video_path, tuple(self.timings))

    def finished(self) -> GenerateResult | None:
        """The result where the video of exactly this request is already there, even if stage outputs are not."""
        try:
            sidecar = json.loads((self.run_dir / SIDECAR_NAME).read_text(encoding="utf-8"))
            timings = tuple(StageTimings(**{**timing, "reused": True}) for timing in sidecar["stages"])
            is_this = (
                "vae" in self.stages
                and sidecar["fingerprint"] == self.keys["vae"].fingerprint
                and sidecar["request"]["fps"] == self.request.fps
                and sidecar["video_bytes"] == (self.run_dir / VIDEO_NAME).stat().st_size
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return GenerateResult(self.run_dir, self.run_dir / VIDEO_NAME, timings) if is_this else None

    def _belongs(self, key: StageKey) -> bool:
        try:
            check_stage(self.run_dir, key)
        except StageOutputError:
            return False
        return True

    def _reusable(self, key: StageKey) -> bool:
        if not (self.run_dir / f"{key.stage}.json").exists():
            return False
        try:
            check_stage(self.run_dir, key)
        except StageOutputError as error:
            logger.warning("%s: running it again", error)
            return False
        logger.info("%s: reusing the output in %s", key.stage, self.run_dir)
        return True

    def _inputs(self, stage: Stage) -> dict[str, np.ndarray]:
        if stage == "text":
            return {}
        before = STAGES[STAGES.index(stage) - 1]
        try:
            return load_stage(self.run_dir, self.keys[before])
        except StageOutputError as error:
            raise StageOutputError(
                f"{error}; run that stage too (stages={before},{stage}), or name its run_dir"
            ) from error

    def _write_video(self, record: GenerationRecord, options: RunOptions) -> Path:
        path, key = self.run_dir / VIDEO_NAME, self.keys["vae"]
        frames = load_stage(self.run_dir, key)["frames"]
        write_mp4(path, frames, self.request.fps, records.video_tags(record, key.fingerprint))
        sidecar = {
            **jsonl.encode(record),
            "fingerprint": key.fingerprint,
            "video_bytes": path.stat().st_size,
            "weights": {stage: key.fields[f"{stage}_weights"] for stage in STAGES},
            "options": dataclasses.asdict(options),
            "stages": [timing.to_dict() for timing in self.timings],
        }
        write_json(self.run_dir / SIDECAR_NAME, sidecar)
        return path


def identities(checkpoint: Checkpoint, stages: Sequence[Stage]) -> dict[Stage, str]:
    """What tells the weights from others, of the stages and all before them. Raises CheckpointError."""
    return {stage: checkpoint.identity(*_PARTS[stage]) for stage in STAGES[: STAGES.index(stages[-1]) + 1]}


def _check_folder(run_dir: Path) -> None:
    there = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RequestError(
            f"run_dir={str(run_dir)!r}: {there.name} is a file; expected a folder, or a name that is free"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise RequestError(f"run_dir={str(run_dir)!r}: {there} is not writable; choose another output_dir or run_dir")


def _check_attention_device(request: GenerateRequest) -> None:
    platform = jax.default_backend()
    if request.attention.implementation == "pallas_tpu" and platform != "tpu":
        raise RequestError(
            f"attention.implementation='pallas_tpu': needs a TPU, and JAX runs on {platform!r} here; "
            "leave it out, or take xla or pallas_interpret"
        )
