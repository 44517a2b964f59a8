"""The Python API for one request: `generate` makes its video, `warm_up` compiles its stages ahead of time."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.checkpoints.checks import check_request, read_configs
from pipeline.checkpoints.loading import resolve_checkpoint
from pipeline.requests.errors import RequestError
from pipeline.requests.options import RunOptions
from pipeline.requests.request import STAGES, GenerateRequest, Stage
from pipeline.requests.run_names import run_name
from pipeline.runs.request_run import GenerateResult, RequestRun, needed_stages
from pipeline.stages.progress import Progress, StageTimings, no_progress
from pipeline.stages.stages import Stages


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
    checkpoint = resolve_checkpoint(request.checkpoint, request.revision, cache_dir)
    check_request(request, read_configs(checkpoint))
    identities = checkpoint.identities(*needed_stages(stages))
    run = RequestRun(request, stages, run_dir, checkpoint, identities, run_options)
    with run.locked():
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
            dataclasses.replace(request, num_inference_steps=1),
            stages=stages,
            run_dir=Path(folder),
            run_options=dataclasses.replace(run_options or RunOptions(), resume=False),
            **options,
        )
    return result.timings
