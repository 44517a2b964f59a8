"""One request on its way through its stages: what is there of it is reused, what is made is saved, then the video.

The Python API: `generate` makes a video, `warm_up` compiles its stages ahead of time.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pipeline.checkpoints.checks import check_request, check_weights, checkpoint_of, read_configs
from pipeline.checkpoints.loading import Checkpoint
from pipeline.model import step_options
from pipeline.model.attention import check_runs_here
from pipeline.model.placement import on_first_process
from pipeline.requests.errors import RequestError, StageOutputError
from pipeline.requests.media import check_files
from pipeline.requests.options import RunOptions
from pipeline.requests.request import STAGES, GenerateRequest, Stage
from pipeline.requests.run_names import run_name
from pipeline.runs import outputs, records
from pipeline.runs.hosts import check_same
from pipeline.runs.outputs import StageKey
from pipeline.runs.preview import PreviewWriter
from pipeline.runs.video import write_mp4
from pipeline.stages.progress import Progress, StageClock, StageTimings, no_progress
from pipeline.stages.resume import STATE_NAME, StateFile
from pipeline.stages.stages import StageContext, Stages
from splash_workbench.files import locked, remove_leftovers, require_writable, write_json
from splash_workbench.provenance import flags, package_versions
from splash_workbench.records import jsonl
from splash_workbench.records.generation import GenerationRecord

logger = logging.getLogger(__name__)

VIDEO_NAME = "video.mp4"
SIDECAR_NAME = "video.json"
LOCK_NAME = ".lock"
_FREE_BYTES = 2**20  # on the disk of a run's folder; a full one has none


@dataclasses.dataclass(frozen=True)
class GenerateResult:
    """Folder, video and timings of a run. video_path: None unless the stage "vae" was among those asked for.

    timings: one of every stage asked for; those of a reused stage are from the run that made it. record: of them; None
    where the video was there already.
    """

    run_dir: Path
    video_path: Path | None
    timings: tuple[StageTimings, ...]
    record: GenerationRecord | None = None


class RequestRun:
    """One request in a folder of its own.

    keys: of the outputs of the stages asked for and all before them. loaded_keys: of the stages asked for; runs with
    equal ones share what is loaded. timings, details: of the stages that are done.
    """

    def __init__(
        self,
        request: GenerateRequest,
        stages: Sequence[Stage],
        run_dir: Path,
        checkpoint: Checkpoint,
        identities: Mapping[Stage, str],
        run_options: RunOptions,
        writable: set[Path] | None = None,
    ):
        """Check a request against what is here, without any work. Raises RequestError and CheckpointError.

        identities: of the checkpoint's `needed_stages`. writable: folders that are known to be, of the runs of a batch.
        """
        self.stages, self.run_dir, self.run_options = tuple(stages), run_dir, run_options
        check_files(request)
        if jax.process_index() == 0:
            require_writable(f"run_dir={str(run_dir)!r}", run_dir, _FREE_BYTES, known=writable)
            for path in self._written:
                if path.is_dir():
                    raise RequestError(
                        f"run_dir={str(run_dir)!r}: {path.name} is a folder there; expected another run_dir"
                    )
        self.context = StageContext(checkpoint, request, identities, run_options.parallel)
        self.keys = {stage: outputs.stage_key(self.request, stage, identities) for stage in identities}
        if "denoise" in stages:
            check_runs_here(self.request.attention, self.request.dtype)
            if jax.default_backend() == "tpu":
                step_options.read(step_options.user_path())
        self.loaded_keys = {stage: self.context.loaded_key(stage) for stage in stages}
        self.timings: list[StageTimings] = []
        self.details: dict[Stage, dict[str, Any]] = {}

    @property
    def request(self) -> GenerateRequest:
        return self.context.request

    @property
    def described(self) -> list[Any]:
        """What is run, by readable names; JSON-able."""
        return [list(self.stages), *(dict(key.fields) for key in self.keys.values())]

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes out of the folder, but for those of the same run. Raises UserError if one is there."""
        if jax.process_index() != 0:
            return contextlib.nullcontext()
        return locked(
            self.run_dir / LOCK_NAME,
            f"run_dir={str(self.run_dir)!r}: another process is at work there; wait for it or stop it, or choose "
            "another run_dir or name",
        )

    def check_inputs(self) -> None:
        """Raise StageOutputError where a stage needs the output of one that is left out, and none that fits is there.

        All processes must call it.
        """
        on_first_process(lambda: outputs.check_inputs(self.run_dir, self.keys, self.stages, self.run_options.resume))

    def run_stage(self, stage: Stage, stages: Stages, progress: Progress = no_progress) -> None:
        """Run a stage and save its output, or take the saved one of exactly this request."""
        key = self.keys[stage]
        saved = on_first_process(lambda: self._saved(key)) if self.run_options.resume else None
        if saved is not None:
            self.details[stage] = saved
            self.timings.append(saved["timings"])
        else:
            inputs = on_first_process(lambda: outputs.load_inputs(self.run_dir, self.keys, stage))
            clock = StageClock(stage, progress)
            context = dataclasses.replace(self.context, clock=clock)
            arrays, self.details[stage] = self._compute(stage, context, inputs, stages)
            details = {**self.details[stage], "timings": dataclasses.asdict(clock.timings), "on_record": False}
            on_first_process(lambda: outputs.save_stage(self.run_dir, key, arrays, details))
            self.timings.append(clock.timings)
        if stage == "denoise":
            StateFile(self.run_dir, "").remove()

    def _compute(
        self, stage: Stage, context: StageContext, inputs: Mapping[str, np.ndarray], stages: Stages
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return a stage's arrays, and details for its JSON file."""
        if stage == "text":
            embeddings = stages.encode(context, self.request.prompts)
            return dict(zip(self._embedding_names, np.split(embeddings, len(embeddings)), strict=True)), {}
        if stage == "vae":
            return {"frames": stages.decode(context, inputs["latents"])}, {}
        embeddings = np.concatenate([inputs[name] for name in self._embedding_names])
        plan, options, clock = dataclasses.asdict(context.plan), self.run_options, context.clock
        fingerprint = _state_fingerprint(self.keys["denoise"], plan)
        state_file = StateFile(self.run_dir, fingerprint, options.checkpoint_every, options.resume)
        if options.preview_every and clock:
            clock.progress = PreviewWriter(self.run_dir, options.preview_every, clock.progress, context.checkpoint)
        moments = self._encode_source(context, stages)
        latents = stages.denoise(context, embeddings, None, state_file, moments)
        denoiser = stages.loaded("denoise", context)
        return {"latents": latents}, {
            "attention": denoiser.describe_attention(self.request, embeddings.shape[1]),
            "compiler_options": denoiser.compiler_options,
            "parallel": plan,
            "resumed_at_step": state_file.resumed_at_step,
        }

    def _encode_source(self, context: StageContext, stages: Stages) -> np.ndarray | None:
        """Encode the request's image or video, if it has one, timed by itself."""
        if not self.request.encodes:
            return None
        clock = StageClock("encode", context.clock.progress if context.clock else no_progress)
        moments = stages.encode_source(dataclasses.replace(context, clock=clock))
        self.timings.append(clock.timings)
        return moments

    @property
    def _embedding_names(self) -> list[str]:
        """Return the names of the saved arrays of `request.prompts`."""
        return ["negative_prompt_embeds", "prompt_embeds"][-len(self.request.prompts) :]

    def finish(self, results_path: Path | None = None) -> GenerateResult:
        """Record the timings, and write the video where its stage was among those run: the first process does.

        All processes must call it, as `run_stage` and `finished`.
        """
        return on_first_process(lambda: self._finish(results_path))

    def _finish(self, results_path: Path | None) -> GenerateResult:
        if "denoise" in self.keys and "denoise" not in self.details:
            with contextlib.suppress(StageOutputError):
                self.details["denoise"] = outputs.check_stage(self.run_dir, self.keys["denoise"])
        timings = [
            timing if self._is_on_record(timing) else dataclasses.replace(timing, reused=False)
            for timing in self.timings
        ]
        record = records.make_record(self.request, timings, self.details.get("denoise", {}))
        video_path = self._write_video(record) if "vae" in self.stages else None
        remove_leftovers(*self._written)
        if results_path is not None and record.stages:
            records.keep(results_path, record)  # last: the video matters more
        for stage in self.stages:
            outputs.mark_on_record(self.run_dir, stage)
        return GenerateResult(self.run_dir, video_path, tuple(self.timings), record)

    def _is_on_record(self, timing: StageTimings) -> bool:
        """Return False for a stage of a run that was killed before its record was made."""
        return all(saved.get("on_record", True) for stage, saved in self.details.items() if stage == timing.stage)

    @property
    def _written(self) -> list[Path]:
        names = [f"{stage}.{suffix}" for stage in self.stages for suffix in ("safetensors", "json")]
        return [self.run_dir / name for name in (*names, VIDEO_NAME, SIDECAR_NAME, STATE_NAME, LOCK_NAME)]

    def finished(self) -> GenerateResult | None:
        """Return the result where the video of exactly this request is already there, even if stage outputs are not."""
        return on_first_process(self._finished)

    def _finished(self) -> GenerateResult | None:
        try:
            sidecar = json.loads((self.run_dir / SIDECAR_NAME).read_text(encoding="utf-8"))
            timings = tuple(map(outputs.reused_timings, sidecar["stages"]))
            is_this = (
                "vae" in self.stages
                and sidecar["fingerprint"] == self.keys["vae"].fingerprint
                and sidecar["request"]["fps"] == self.request.fps
                and sidecar["video_bytes"] == (self.run_dir / VIDEO_NAME).stat().st_size
            )
        except outputs.UNREADABLE:
            return None
        return GenerateResult(self.run_dir, self.run_dir / VIDEO_NAME, timings) if is_this else None

    def _saved(self, key: StageKey) -> dict[str, Any] | None:
        """Return the details of a saved output that can be reused."""
        if not (self.run_dir / f"{key.stage}.json").exists():
            return None
        try:
            details = outputs.check_stage(self.run_dir, key)
        except StageOutputError as error:
            logger.warning("%s: running it again", error)
            return None
        logger.info("%s: reusing the output in %s", key.stage, self.run_dir)
        return details

    def _write_video(self, record: GenerationRecord) -> Path:
        path, key = self.run_dir / VIDEO_NAME, self.keys["vae"]
        frames = outputs.load_stage(self.run_dir, key)["frames"]
        write_mp4(path, frames, self.request.fps, records.video_tags(record, key.fingerprint))
        sidecar = {
            **jsonl.encode(record),
            "fingerprint": key.fingerprint,
            "video_bytes": path.stat().st_size,
            "weights": {stage: key.fields[f"{stage}_weights"] for stage in STAGES},
            "options": dataclasses.asdict(self.run_options),
            "stages": [dataclasses.asdict(timing) for timing in self.timings],
        }
        write_json(self.run_dir / SIDECAR_NAME, sidecar)
        return path


def needed_stages(stages: Sequence[Stage], request: GenerateRequest) -> tuple[Stage, ...]:
    """Return the stages asked for and all before them, whose weights decide what they make.

    With "vae" where an image or a video is encoded for them.
    """
    encodes = request.encodes and "denoise" in stages
    return STAGES if encodes else STAGES[: STAGES.index(stages[-1]) + 1]


def _state_fingerprint(key: StageKey, plan: Mapping[str, Any]) -> str:
    """Digest what the bits depend on: another plan, device, compiler or flag sums in another order.

    Of the tuned entries the denoising itself adds what it takes, see `StateFile.depends_on`.
    """
    device = jax.devices()[0]
    versions = package_versions(records.PACKAGES)
    described = [key.fingerprint, plan, device.platform, device.device_kind, versions, flags()]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def generate(
    request: GenerateRequest,
    *,
    stages: Sequence[Stage] = STAGES,
    run_dir: Path | None = None,
    output_dir: Path = Path("videos"),
    run_options: RunOptions | None = None,
    cache_dir: Path | None = None,
    results_path: Path | None = None,
    progress: Progress = no_progress,
) -> GenerateResult:
    """Run stages of one request, each with only its own weights in memory, and write the video.

    run_dir: where the stages' outputs and the video go; a folder under `output_dir` named after the request without
    it. cache_dir: for checkpoint "tiny-random". results_path: a JSON-lines file that gets a record of the timings.
    progress: told of every step; may raise to interrupt, after which the same call resumes where it was: at the step
    in the stage "denoise", else at the beginning of the stage.

    Raises CheckpointError, StageOutputError (a stage that was left out has no fitting output), NonFiniteError, and
    UserError where the folder cannot be written to or another process is at work there.
    """
    run_options, run_dir = run_options or RunOptions(), run_dir or output_dir / run_name(request)
    checkpoint = checkpoint_of(request, cache_dir)
    configs, needed = read_configs(checkpoint), needed_stages(stages, request)
    check_request(request, configs)
    run = RequestRun(request, stages, run_dir, checkpoint, checkpoint.identities(*needed), run_options)
    check_weights(checkpoint, configs, needed, request.encodes)
    check_same([run.described])
    with run.locked():
        run.check_inputs()
        loaded = Stages()
        for stage in stages:
            run.run_stage(stage, loaded, progress)
            loaded.drop(stage)
        return run.finish(results_path)


def warm_up(
    request: GenerateRequest,
    *,
    stages: Sequence[Stage] = STAGES,
    run_options: RunOptions | None = None,
    **options: Any,
) -> tuple[StageTimings, ...]:
    """Compile every stage of a request and try it on a single denoising step; keeps no output.

    With a persistent compilation cache the next run, of any number of steps, starts without compiling. `stages` must
    begin with "text". options: others of `generate`, which also says what is raised.
    """
    if stages[0] != "text":
        raise RequestError(f"stages={','.join(stages)}: warming up starts from nothing; expected text first")
    with tempfile.TemporaryDirectory() as folder:
        result = generate(
            dataclasses.replace(request, num_inference_steps=1, strength=1.0),
            stages=stages,
            run_dir=Path(folder),
            run_options=dataclasses.replace(run_options or RunOptions(), resume=False),
            **options,
        )
    return result.timings
