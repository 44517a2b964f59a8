"""Compiles the programs of a prediction, each in a process of its own, and takes the best plan."""

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import offline_tpu
from offline_tpu import check_setup, worker_environment
from offline_tpu.machine.topology import parse_topology
from pipeline.model import step_options
from pipeline.model.denoise_step import EVERYTHING, NOTHING, Reuse, StepWork
from pipeline.model.sharding import ParallelPlan, check_quantization, resolve_plan
from pipeline.predict.jobs import StageJob
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest, Stage
from pipeline.runs.records import environment
from splash_workbench.errors import UserError
from splash_workbench.provenance import COMPILER_PACKAGES, package_versions
from splash_workbench.records.jsonl import decode
from splash_workbench.records.prediction import StagePrediction
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import Outcome, Runner

JOB = "pipeline.predict.jobs:predict_stage"
#: What a prediction is made by, the kernel apart.
SOURCES = (*offline_tpu.SOURCES, "pipeline/model/*.py", "pipeline/model/*/*.py", "pipeline/stages/*.py")
#: Tried in this order where the plan is left open, the last where none of the others fits.
_AUTO, _MEGATRON = ParallelOptions(plan="auto"), ParallelOptions(plan="megatron")
_FRUGAL = ParallelOptions(plan="auto", weights="sharded")


@dataclasses.dataclass(frozen=True)
class VideoPrediction:
    """Predicted stages of a video.

    plan: of the denoise stage. stages: results of `pipeline.predict.jobs`. others: of plans not chosen, the step time,
    or why they cannot be. failures: why a stage cannot be predicted; most often it does not fit.
    """

    plan: ParallelPlan
    stages: dict[Stage, dict[str, Any]]
    others: dict[str, float | str]
    failures: dict[Stage, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Predict stages of one request on one topology.

    say: told of every program that is compiled. compiler_options: flags of libtpu for all of them; step_options: see
    `StageJob`. reuse: between denoising steps. cache: of what was compiled before, so that a command that was stopped
    goes on; None: compile anew. runner: of the compilations, for who may have to end those of other threads; None: one
    for each.
    """

    topology: str
    request: GenerateRequest
    configs: Mapping[str, Any]
    timeout_s: float
    say: Callable[[str], None]
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reuse: Reuse = NOTHING
    step_options: Mapping[str, str] | None = None
    cache: JobCache | None = None
    runner: Runner | None = None

    def predict(self, stages: Sequence[Stage], parallel: ParallelOptions) -> VideoPrediction:
        """Predict the stages, the denoise stage with the best plan that `parallel` allows.

        Raises RequestError for a topology or plan that there is not, PipelineError where no stage fits, UserError for
        compiler options that libtpu refuses.
        """
        check_setup()
        plans = [self.plan(parallel)]
        # With one device a prompt the plans are the same.
        if parallel.plan == "auto" and plans[0].num_devices > plans[0].dp:
            with contextlib.suppress(RequestError):  # of heads that do not divide, which the first plan takes
                plans.append(self.plan(parallel, _MEGATRON))
            plans.append(self.plan(parallel, _FRUGAL))
        tried: dict[ParallelPlan, dict[str, Any]] = {}
        refused: dict[str, str] = {}
        for plan in plans if "denoise" in stages else ():
            if not (tried and plan.gathers_weights):
                try:
                    tried[plan] = self.stage("denoise", plan)
                except PipelineError as error:
                    refused[str(plan)] = str(error)
        best = min(tried, key=lambda plan: tried[plan]["time_s"], default=plans[0])
        results: dict[Stage, dict[str, Any]] = {}
        failures: dict[Stage, str] = {}
        for stage in stages:
            if stage == "denoise" and not tried:
                failures[stage], refused = "; ".join(refused.values()), {}
                continue
            try:
                results[stage] = tried[best] if stage == "denoise" else self.stage(stage, best)
            except PipelineError as error:
                failures[stage] = str(error)
        if not results:
            raise PipelineError("; ".join(failures.values()))
        others = {str(plan): result["time_s"] for plan, result in tried.items() if plan != best} | refused
        return VideoPrediction(best, results, others, failures)

    def plan(self, parallel: ParallelOptions, choice: ParallelOptions | None = None) -> ParallelPlan:
        """Return the plan of `parallel` on the topology, the first that is tried where that leaves it open.

        choice: how a step is shared, on the devices and prompts of `parallel`. Raises RequestError as `predict` does.
        """
        try:
            device, name = parse_topology(self.topology)
        except ValueError as error:
            raise RequestError(str(error)) from error
        num_devices = device.devices_per_chip * math.prod(map(int, name.partition(":")[2].split("x")))
        num_heads = self.configs["transformer"]["num_attention_heads"]
        choice = choice or (_AUTO if parallel.plan == "auto" else parallel)
        choice = dataclasses.replace(choice, num_devices=parallel.num_devices, dp=parallel.dp)
        plan = resolve_plan(choice, num_devices, self.request.do_classifier_free_guidance, num_heads)
        check_quantization(self.request.quantization, plan)
        return plan

    def step(
        self, like: ParallelPlan, parallel: ParallelOptions, work: StepWork
    ) -> tuple[ParallelPlan, dict[str, Any]]:
        """Return a kind of denoising step, with a plan like another's, but that `parallel` lays out the two prompts.

        Raises what `predict` does.
        """
        guided, num_heads = self.request.do_classifier_free_guidance, self.configs["transformer"]["num_attention_heads"]
        as_like = "auto" if parallel.plan == "auto" and like.splits_sequence else like.plan  # twice a prompt's devices
        choice = dataclasses.replace(parallel, plan=as_like, weights=like.weights)
        plan = resolve_plan(choice, like.num_devices, guided, num_heads)
        return plan, self.stage("denoise", plan, work)

    def stage(
        self, stage: Stage, plan: ParallelPlan, work: StepWork = EVERYTHING, short_attention: bool = False
    ) -> dict[str, Any]:
        """Return the prediction of a stage with a plan, from the cache or compiled now.

        work, short_attention: of a denoising step, see `StageJob`. Raises PipelineError where it does not compile or
        fit, UserError for compiler options that libtpu refuses.
        """
        device, _ = parse_topology(self.topology)
        denoise = stage == "denoise"
        kind = "" if work == EVERYTHING else f", {work}"
        what = f"{stage}: compiling for {self.topology}" + (f", {plan}{kind}" if denoise else "")
        job = StageJob(
            stage=stage,
            topology=self.topology,
            plan=plan,
            request=self.request,
            configs=self.configs,
            compiler_options=dict(self.compiler_options),
            reuse=self.reuse,
            work=work,
            step_options=dict(self.step_options) if self.step_options is not None else None,
            short_attention=short_attention,
        )
        payload = dataclasses.asdict(job)

        def compile_now() -> Outcome:
            self.say(what)
            with tempfile.TemporaryDirectory() as folder:
                runner = self.runner or Runner(Path(folder))
                return runner.run(
                    JOB,
                    payload,
                    timeout_s=self.timeout_s,
                    variables=lambda job_dir: worker_environment(device, job_dir / "dump"),
                )

        if self.cache is None:
            outcome = compile_now()
        else:
            # A prediction is of the sizes, not of what the video shows.
            asked = payload | {"request": payload["request"] | {"prompt": "", "negative_prompt": "", "seed": 0}}
            entries = step_options.entry_hashes(step=self.step_options is None) if denoise else []
            key = JobCache.key(JOB, asked, _code() | {"entries": entries})
            outcome, was_there = self.cache.outcome(key, compile_now, accept=_check_stored)
            if was_there:
                self.say(f"{what}: on record, of the same sources and versions")
        where = f"{stage} on {self.topology}" + (f" with {plan}" if denoise else "")
        if outcome.status == Status.OUT_OF_MEMORY:
            raise PipelineError(
                f"{where}: does not fit a chip's {device.hbm_bytes / 2**30:.0f} GiB; try more chips, "
                f"{'parallel=ulysses_sharded, ' if denoise else ''}or a smaller video ({outcome.error})"
            )
        if outcome.error and outcome.error.startswith("compiler_options"):
            raise UserError(outcome.error)
        if outcome.status != Status.OK:
            raise PipelineError(f"{where}: {outcome.status}: {outcome.error}\n{outcome.log_tail}")
        return outcome.result | {"hbm_bytes": device.hbm_bytes, "wall_time_s": outcome.wall_time_s}


def _check_stored(outcome: Outcome) -> None:
    """Raise ValueError for a stored outcome that is no prediction; it is made again."""
    if outcome.status == Status.OK:
        decode(outcome.result | {"hbm_bytes": 0, "wall_time_s": 0.0}, StagePrediction)


@functools.cache
def _code() -> dict[str, Any]:
    """Return what every prediction depends on besides its job: versions, flags, and hashes of sources."""
    captured = environment(SOURCES)
    return {
        "versions": package_versions((*COMPILER_PACKAGES, "torch", "torchax", "diffusers", "transformers")),
        "flags": {name: value for name, value in captured.flags.items() if name != "JAX_PLATFORMS"},
        "sources": [captured.kernel_hash, captured.backend_hash],
    }
