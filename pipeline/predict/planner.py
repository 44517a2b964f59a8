"""Compiles the programs of a prediction, each in a process of its own, and takes the best plan."""

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from offline_tpu import check_versions, worker_environment
from offline_tpu.compile import parse_topology
from pipeline.model.denoise_step import EVERYTHING, NOTHING, Reuse, StepWork
from pipeline.model.sharding import ParallelPlan, check_quantization, resolve_plan
from pipeline.predict.jobs import StageJob
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest, Stage
from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Runner

_AUTO = (ParallelOptions(plan="auto"), ParallelOptions(plan="megatron"))
#: Tried where none of _AUTO fits.
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

    say: told of every program that is compiled. compiler_options: flags of libtpu for all of them. reuse: between
    denoising steps.
    """

    topology: str
    request: GenerateRequest
    configs: Mapping[str, Any]
    timeout_s: float
    say: Callable[[str], None]
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    reuse: Reuse = NOTHING

    def predict(self, stages: Sequence[Stage], parallel: ParallelOptions) -> VideoPrediction:
        """Predict the stages, the denoise stage with the best plan that `parallel` allows.

        Raises RequestError for a topology or plan that there is not, PipelineError where no stage fits, UserError for
        compiler options that libtpu refuses.
        """
        check_versions()
        try:
            device, name = parse_topology(self.topology)
        except ValueError as error:
            raise RequestError(str(error)) from error
        num_devices = device.devices_per_chip * math.prod(map(int, name.partition(":")[2].split("x")))
        num_heads = self.configs["transformer"]["num_attention_heads"]

        def plan_of(choice: ParallelOptions) -> ParallelPlan:
            choice = dataclasses.replace(choice, num_devices=parallel.num_devices, dp=parallel.dp)
            plan = resolve_plan(choice, num_devices, self.request.do_classifier_free_guidance, num_heads)
            check_quantization(self.request.quantization, plan)
            return plan

        plans = [plan_of(_AUTO[0] if parallel.plan == "auto" else parallel)]
        if parallel.plan == "auto":
            with contextlib.suppress(RequestError):  # of heads that do not divide, which the first plan takes
                plans = list(dict.fromkeys([*plans, *map(plan_of, _AUTO[1:])]))
        if plans[0].num_devices == plans[0].dp:
            plans = plans[:1]  # with one device a prompt the plans are the same
        elif parallel.plan == "auto":
            plans.append(plan_of(_FRUGAL))
        tried: dict[ParallelPlan, dict[str, Any]] = {}
        refused: dict[str, str] = {}
        for plan in plans if "denoise" in stages else ():
            if not (tried and plan.gathers_weights):
                try:
                    tried[plan] = self._run("denoise", plan)
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
                results[stage] = tried[best] if stage == "denoise" else self._run(stage, best)
            except PipelineError as error:
                failures[stage] = str(error)
        if not results:
            raise PipelineError("; ".join(failures.values()))
        others = {str(plan): result["time_s"] for plan, result in tried.items() if plan != best} | refused
        return VideoPrediction(best, results, others, failures)

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
        return plan, self._run("denoise", plan, work)

    def _run(self, stage: Stage, plan: ParallelPlan, work: StepWork = EVERYTHING) -> dict[str, Any]:
        device, _ = parse_topology(self.topology)
        denoise = stage == "denoise"
        kind = "" if work == EVERYTHING else f", {work}"
        self.say(f"{stage}: compiling for {self.topology}" + (f", {plan}{kind}" if denoise else ""))
        options = dict(self.compiler_options)
        job = StageJob(stage, self.topology, plan, self.request, self.configs, options, self.reuse, work)
        with tempfile.TemporaryDirectory() as folder:
            outcome = Runner(Path(folder)).run(
                "pipeline.predict.jobs:predict_stage",
                dataclasses.asdict(job),
                timeout_s=self.timeout_s,
                variables=lambda job_dir: worker_environment(device, job_dir / "dump"),
            )
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
