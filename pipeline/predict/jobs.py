"""The job of a worker: compile one stage for a topology that is not here, add up its cost. Payload, result: JSON."""

import dataclasses
import math
import resource
import sys
from collections.abc import Mapping
from typing import Any

import jax

from offline_tpu import CompilerOptionError, Prediction, libtpu, predict
from offline_tpu.machine.topology import parse_topology
from pipeline.model.attention import resolve_attention
from pipeline.model.denoise_step import EVERYTHING, NOTHING, DenoiseStep, Reuse, StepWork
from pipeline.model.device_share import DeviceShare
from pipeline.model.latents import TokenLayout
from pipeline.model.sharding import ParallelPlan
from pipeline.model.transformer import TransformerShape
from pipeline.requests.request import AttentionOptions, GenerateRequest, Stage
from pipeline.stages.programs import denoise_program, model_request, text_program, vae_programs
from splash_attn.pallas import assumed_grid_sizes, slow_grid_sizes
from splash_attn.types import AttentionShape
from splash_workbench.program import Program
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import compile_error

_MAX_OPS = 60
#: Queries at a time of a kernel that compiles in seconds.
_SHORT_BLOCK_Q = 1024
_TOTALS = ("time_s", "interval_s", "slow_time_s", "peak_hbm_bytes", "compile_time_s", "compile_cpu_s")
_OP_FIELDS = ("name", "scope", "category", "calls", "time_s", "hbm_bytes", "bound")
#: What a prediction's categories of ops (`offline_tpu.OpCost`) are called in a stage's breakdown.
_TERMS = {
    "matmul": "projections",  # and the feed-forward's, with the gates and biases that the compiler fuses with them
    "elementwise": "norms_and_gates",
    "kernel": "norms_and_gates",  # of a step: all but attention's
    "layout": "layout_copies",
    "collective": "collectives",
}
_VAE_TERMS = {
    **_TERMS,
    **dict.fromkeys(("matmul", "kernel"), "convolutions"),  # the kernel's, with the norms that it computes on the way
    "elementwise": "norms_and_activations",
}


@dataclasses.dataclass(frozen=True)
class StageJob:
    """One stage to predict.

    configs: of the checkpoint's parts. compiler_options: flags of libtpu, on top of those that a program has itself.
    reuse, work: of a denoising step. step_options: flags that it has itself; None: see `pipeline.model.step_options`.
    short_attention: let a denoising step's attention kernel compute few queries at a time: it compiles in seconds, and
    what surrounds it is the same.
    """

    stage: Stage
    topology: str
    plan: ParallelPlan
    request: GenerateRequest
    configs: Mapping[str, Mapping[str, Any]]
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    reuse: Reuse = NOTHING
    work: StepWork = EVERYTHING
    step_options: dict[str, str] | None = None
    short_attention: bool = False

    @property
    def devices(self) -> list[jax.Device]:
        """Return the topology's devices, which are not here."""
        _, name = parse_topology(self.topology)
        return libtpu.describe_topology(name).devices


def predict_stage(payload: dict[str, Any]) -> dict[str, Any]:
    """Predict the stage of a `StageJob` as a dict. See `summary` for the result."""
    job = decode(payload, StageJob)
    try:
        return {"text": _text, "denoise": _denoise, "vae": _vae}[job.stage](job)
    except (jax.errors.JaxRuntimeError, CompilerOptionError) as error:
        raise compile_error(error) from error


def predict_model(payload: dict[str, Any]) -> dict[str, Any]:
    """Predict one call of a stage of a named model, as `pipeline.stages.programs.model_program` makes it.

    Payload: model, stage, topology, hbm_bytes. Returns time_s, and interval_s where the prediction has one.
    """
    device, name = parse_topology(payload["topology"])
    num_devices = device.devices_per_chip * math.prod(map(int, name.partition(":")[2].split("x")))
    request, configs, plan = model_request(payload["model"], num_devices, payload["hbm_bytes"])
    job = StageJob(payload["stage"], payload["topology"], plan, request, configs)
    result = predict_stage(dataclasses.asdict(job))
    program = result["programs"][-1] if job.stage == "vae" else result
    return {"time_s": program["time_s"], "interval_s": program.get("interval_s")}


def _denoise(job: StageJob) -> dict[str, Any]:
    request, plan = job.request, job.plan
    on_tpu = dataclasses.replace(request.attention, implementation="pallas_tpu")

    def make(attention: AttentionOptions) -> tuple[Program, DenoiseStep]:
        with_it = dataclasses.replace(request, attention=attention)
        return denoise_program(with_it, job.configs, plan, job.devices, job.reuse, job.work, job.step_options)

    program, step = make(on_tpu)
    weights = program.arguments[0]
    call, options = step.call(weights), step.options(weights) | job.compiler_options
    tokens, sizes = step.layout.tokens, step.shape
    num_prompts = len(request.prompts) if job.work.negative else 1
    groups = DeviceShare(plan, step.layout).head_groups(sizes.num_heads)  # a call each
    num_heads = plan.local_heads(sizes.num_heads) // groups
    queries = tokens if plan.kv == 1 else step.layout.rows // plan.kv
    shape = AttentionShape(num_prompts // plan.dp, num_heads, queries, tokens, sizes.head_dim)
    device, _ = parse_topology(job.topology)
    resolution = resolve_attention(request.attention, shape, request.dtype, device.device_kind)
    assert resolution.variant is not None and resolution.block_sizes is not None
    grid_sizes, assumptions = assumed_grid_sizes(shape, resolution.variant)
    about = {"num_layers": sizes.num_layers, "step_call": dataclasses.asdict(call), "step_options": options}
    if not job.work.blocks:
        return summary(_predict(job, program)) | about
    if job.short_attention:
        blocks = dataclasses.replace(
            resolution.block_sizes, block_q=min(_SHORT_BLOCK_Q, resolution.block_sizes.block_q)
        )
        short = dataclasses.replace(on_tpu, block_sizes=blocks, variant=resolution.variant, qk_dtype=None)
        program, _ = make(short)
    prediction = _predict(job, program, grid_sizes, slow_grid_sizes(shape, resolution.variant))
    flops = step_flops(sizes, step.layout, num_prompts)
    return (
        summary(prediction)
        | about
        | {
            "flops": flops,
            "mfu_fraction": flops / (plan.num_devices * device.peak_bf16_flops_per_s * prediction.time_s),
            "attention": {"shape": str(shape), "resolution": str(resolution)},
            "notes": [*assumptions, *prediction.unresolved],
        }
    )


def _text(job: StageJob) -> dict[str, Any]:
    return summary(_predict(job, text_program(job.request, job.configs, job.devices)))


def _vae(job: StageJob) -> dict[str, Any]:
    programs = vae_programs(job.request, job.configs, job.devices)
    results = [summary(_predict(job, program), _VAE_TERMS) for program, _ in programs]
    return together(results, [count for _, count in programs])


def _predict(
    job: StageJob,
    program: Program,
    grid_sizes: Mapping[str, int] | None = None,
    slow_grid_sizes: Mapping[str, int] | None = None,
) -> Prediction:
    return predict(
        program.jitted,
        *program.arguments,
        topology=job.topology,
        mesh=program.mesh,
        grid_sizes=grid_sizes,
        slow_grid_sizes=slow_grid_sizes,
        compiler_options=job.compiler_options,
    )


def together(results: list[dict[str, Any]], calls: list[int]) -> dict[str, Any]:
    """Add up the summaries of programs that run one after the other, each `calls` times."""
    pairs = list(zip(results, calls, strict=False))
    kinds = {kind for result in results for kind in result["breakdown_s"]}
    breakdown = {kind: sum(result["breakdown_s"].get(kind, 0.0) * n for result, n in pairs) for kind in kinds}
    by_call, once = ("time_s", "hbm_traffic_bytes", "link_bytes"), ("compile_time_s", "compile_cpu_s")
    return {
        "breakdown_s": dict(sorted(breakdown.items(), key=lambda item: -item[1])),
        **{name: sum(result[name] * n for result, n in pairs) for name in by_call},
        "interval_s": tuple(sum(result["interval_s"][end] * n for result, n in pairs) for end in (0, 1)),
        **{name: sum(result[name] for result in results) for name in once},
        **{name: max(result[name] for result in results) for name in ("peak_hbm_bytes", "compile_peak_rss_bytes")},
        "programs": [{"calls": n, **result} for result, n in pairs],
    }


def step_flops(shape: TransformerShape, layout: TokenLayout, batch_size: int) -> int:
    """Multiply-adds, twice, that a step needs on real tokens: projections, feed-forward and attention of all layers."""
    channels = shape.num_heads * shape.head_dim
    products = 2 * 12 * channels**2 * layout.tokens
    attention = 4 * channels * layout.tokens**2
    return batch_size * shape.num_layers * (products + attention)


def summary(prediction: Prediction, terms: Mapping[str, str] = _TERMS) -> dict[str, Any]:
    """Return seconds, bytes and compile cost of a program on one chip. JSON-able; times are predicted.

    terms: what categories are called. The compile cost is this process's: wall and CPU seconds, and memory at its peak.
    """
    kinds: dict[str, float] = {}
    for op in prediction.ops:
        kind = "attention_kernel" if "splash_attention" in op.name else terms.get(op.category, op.category)
        kinds[kind] = kinds.get(kind, 0.0) + op.time_s
    collectives = [op for op in prediction.collectives if op.collective is not None]
    return {
        **{name: getattr(prediction, name) for name in _TOTALS},
        "breakdown_s": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "hbm_traffic_bytes": prediction.hbm_bytes,
        "link_bytes": sum(op.collective.link_bytes * op.calls for op in collectives if op.collective),
        "collectives": [
            {"op": str(op.collective), "calls": op.calls, "time_s": op.time_s, "scope": op.scope} for op in collectives
        ],
        "compile_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024),
        "ops": [
            {name: getattr(op, name) for name in _OP_FIELDS}
            for op in sorted(prediction.ops, key=lambda op: -op.time_s)[:_MAX_OPS]
        ],
        "timeline": prediction.to_dict()["ops"],
    }
