"""What each preset of quality costs: how many denoising steps run the transformer's blocks, and what a step takes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.machine.topology import parse_topology
from pipeline.checkpoints.checks import check_request, checkpoint_of, part_configs
from pipeline.checkpoints.loading import Checkpoint, load_module
from pipeline.checkpoints.magcache import ratios_path
from pipeline.model.denoise_step import EVERYTHING, Reuse, StepWork
from pipeline.model.noise_schedule import build_scheduler, step_table
from pipeline.model.sharding import ParallelPlan
from pipeline.model.transformer import TransformerShape
from pipeline.predict.planner import Predictor, VideoPrediction
from pipeline.requests.config import OF_RUNS, GenerateConfig
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.models import current_id
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest, to_request
from pipeline.requests.reuse import PRESETS, REPORTED_FRACTIONS
from pipeline.stages.presets import base_checkpoint, settle, settle_parallel
from pipeline.stages.step_schedule import StepSchedule, embed_timesteps, step_schedule, with_prompts
from splash_workbench.errors import from_config
from splash_workbench.records.jsonl import decode, encode
from splash_workbench.records.prediction import GIB, STAGES, Plan, PresetPrediction, StagePrediction, StepKind

#: All presets of quality.
ALL = "all"
#: Keys, or patterns of them, that make no difference to a prediction.
UNUSED = (
    *OF_RUNS,
    *("prompts", "compilation_cache", "verbose", "image", "noise_aug_strength", "video", "strength", "latents"),
    *("lora", "transformer"),
)


@dataclasses.dataclass(frozen=True)
class PresetSteps:
    """A quality's request, with its choices filled in, and the work of its steps. note: what was assumed of them."""

    request: GenerateRequest
    schedule: StepSchedule
    note: str | None


@dataclasses.dataclass(frozen=True)
class Video:
    """What a command line asks for, without weights.

    presets: by quality, the first decides what they share. refused: why others are not known. configs: of the
    checkpoint's parts; source: where they are from. topology: of chips, of which `device` is one.
    """

    presets: Mapping[str, PresetSteps]
    refused: Sequence[str]
    configs: Mapping[str, Any]
    source: str
    topology: str
    device: DeviceSpec

    @property
    def first(self) -> PresetSteps:
        """Return the first preset."""
        return next(iter(self.presets.values()))

    def predictor(self, preset: PresetSteps, timeout_s: float, say: Callable[[str], None], **more: Any) -> Predictor:
        """Return what predicts the stages of one of the presets. more: other fields of `Predictor`."""
        schedule = preset.schedule
        return Predictor(self.topology, preset.request, self.configs, timeout_s, say, reuse=schedule.reuse, **more)


def video_of(settings: GenerateConfig, topology: str, quality: str) -> Video:
    """Return the video of a command line with a preset of quality, or ALL of them. Raises UserError."""
    if quality not in (*PRESETS, ALL):
        raise RequestError(f"quality={quality!r}: expected one of {', '.join((*PRESETS, ALL))}")
    names = tuple(PRESETS) if quality == ALL else (quality,)
    # How long the prompt is makes no difference: it is padded.
    request = to_request(dataclasses.replace(settings, quality=names[0], prompt=settings.prompt or "any"))
    if request.attention.implementation not in (None, "pallas_tpu"):
        raise RequestError(
            f"attention.implementation={request.attention.implementation!r}: a prediction is of the TPU's kernel; "
            "expected pallas_tpu, or leave it out"
        )
    cache_dir = Path(settings.cache_dir) if settings.cache_dir else None
    configs, checkpoint = part_configs(request.checkpoint, lambda: checkpoint_of(request, cache_dir))
    if TransformerShape.from_config(configs["transformer"]).takes_image:
        request = dataclasses.replace(request, image="any")
    check_request(request, configs)
    device, _ = from_config(lambda: parse_topology(topology))
    presets, refused = settle_presets(request, names, configs, checkpoint, device.device_kind)
    return Video(presets, refused, configs, "built in" if checkpoint is None else "checkpoint", topology, device)


def preset_steps(
    request: GenerateRequest,
    quality: str,
    configs: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    device_kind: str,
) -> PresetSteps:
    """Return the steps of a request with a quality, on a kind of TPU.

    configs: of the checkpoint's parts. checkpoint: None where no weights are to be fetched: how often TeaCache runs the
    blocks is then as its authors' times say. Raises RequestError where that is not known.
    """
    request = dataclasses.replace(request, quality=quality)  # type: ignore[arg-type]
    transformer = configs["transformer"]

    def ratios() -> Path:
        if checkpoint is None:
            raise RequestError(
                f"cache=magcache: of checkpoint={request.checkpoint!r} no ratios are here; expected cache.ratios=path, "
                "a file of python -m pipeline.calibrate"
            )
        return ratios_path(checkpoint)

    request = settle(request, lambda: transformer, ratios, device_kind)
    scheduler = build_scheduler(configs["scheduler"], request.scheduler)
    timesteps = step_table(scheduler, request.num_inference_steps).timesteps
    guided = request.do_classifier_free_guidance
    if request.cache.method == "teacache" and checkpoint is None:
        return _as_reported(request, transformer, timesteps)

    def embed(timesteps: np.ndarray) -> np.ndarray:
        assert checkpoint is not None
        loaded = load_module(checkpoint, "transformer", torch.float32, lambda name: "_embedding." in name, np.asarray)
        return embed_timesteps(loaded.weights, TransformerShape.from_config(transformer), timesteps)

    schedule = step_schedule(request.cache, guided, timesteps, embed)
    decided = request.cache.method == "first_block"
    note = "cache=first_block decides in the run: every step is counted as if it ran all blocks" if decided else None
    return PresetSteps(request, schedule, note)


def settle_presets(
    request: GenerateRequest,
    names: Sequence[str],
    configs: Mapping[str, Any],
    checkpoint: Checkpoint | None,
    device_kind: str,
) -> tuple[dict[str, PresetSteps], list[str]]:
    """Return the steps of each quality, and why those of others are not known. Raises RequestError for a single one."""
    settled, refused = {}, []
    for name in names:
        try:
            settled[name] = preset_steps(request, name, configs, checkpoint, device_kind)
        except RequestError as error:
            if name == names[0]:
                raise
            refused.append(f"quality={name}: {error}")
    return settled, refused


def _as_reported(request: GenerateRequest, transformer: Mapping[str, Any], timesteps: np.ndarray) -> PresetSteps:
    """Return steps of which as many run the blocks as TeaCache's authors' times say, evenly spread."""
    name, steps = base_checkpoint(current_id(request.checkpoint), transformer), len(timesteps)
    known = {threshold: part for (of, threshold), part in REPORTED_FRACTIONS.items() if of == name}
    threshold = request.cache.threshold or 0.0
    if not known or threshold > max(known):
        thresholds = f"thresholds up to {max(known)}" if known else "no threshold"
        raise RequestError(
            f"cache.threshold={threshold}: how many steps TeaCache computes follows from weights; for "
            f"checkpoint={request.checkpoint!r} its authors report {thresholds}; expected such, or a folder"
        )
    part = float(np.interp(threshold, [0.0, *known], [1.0, *known.values()]))
    count = min(max(round(part * steps), 1), steps)
    computed = set(np.round(np.linspace(0, steps - 1, count)).astype(int))
    blocks = [index in computed for index in range(steps)]
    every = request.cache.unconditional_every or 1
    return PresetSteps(
        request,
        StepSchedule(Reuse(residual=True, guidance=every > 1), tuple(with_prompts(blocks, every))),
        f"{count} of {steps} steps computed: assumed from the times that TeaCache's authors report for threshold "
        f"{threshold:g} on an H100; the checkpoint's weights decide",
    )


def predict_presets(
    settled: Mapping[str, PresetSteps],
    predictor: Predictor,
    prediction: VideoPrediction,
    parallel: ParallelOptions,
) -> tuple[dict[str, PresetPrediction], list[str]]:
    """Return what each preset costs, and why others cannot be predicted.

    settled: by name; the first is the one of `prediction`, whose other stages they share. predictor: of that.
    """
    stages = {stage: decode(result, StagePrediction) for stage, result in prediction.stages.items()}
    if "denoise" not in stages or prediction.plan.uses_stock_block:
        return {}, []
    presets, notes = {}, []
    for index, (name, steps) in enumerate(settled.items()):
        own = dataclasses.replace(predictor, request=steps.request, reuse=steps.schedule.reuse)
        plan, kinds = prediction.plan, {EVERYTHING: stages["denoise"]} if index == 0 else {}
        try:
            for work in dict.fromkeys((EVERYTHING, *steps.schedule.steps)):
                if work not in kinds:
                    plan, result = own.step(prediction.plan, settle_parallel(parallel, steps.request), work)
                    kinds[work] = decode(result, StagePrediction)
        except PipelineError as error:
            notes.append(f"quality={name}: {error}")
            continue
        others: dict[str, StagePrediction] = {stage: result for stage, result in stages.items() if stage != "denoise"}
        presets[name] = _preset(steps, plan, kinds, others)
    return presets, notes


def _preset(
    steps: PresetSteps,
    plan: ParallelPlan,
    kinds: Mapping[StepWork, StagePrediction],
    others: Mapping[str, StagePrediction],
) -> PresetPrediction:
    works = steps.schedule.steps
    counted = tuple(
        decode(msgspec.structs.asdict(result) | {"work": str(work), "count": works.count(work)}, StepKind)
        for work, result in kinds.items()
    )
    parts: list[tuple[StepKind | StagePrediction, int]] = [(kind, kind.count) for kind in counted]
    parts += [(result, 1) for result in others.values()]
    times = {stage: result.time_s for stage, result in others.items()}
    times["denoise"] = sum(kind.time_s * kind.count for kind in counted)
    whole = set(times) == set(STAGES)
    intervals = [(part.interval_s, count) for part, count in parts if part.interval_s is not None]
    known = whole and len(intervals) == len(parts)
    compile_cpu_s = {stage: result.compile_cpu_s for stage, result in others.items()}
    return PresetPrediction(
        plan=decode(encode(plan), Plan),
        steps=len(works),
        steps_computed=steps.schedule.steps_computed,
        step_time_s=kinds[EVERYTHING].time_s,
        kinds=counted,
        stage_times_s=times,
        total_time_s=sum(times.values()) if whole else None,
        total_interval_s=tuple(sum(ends[end] * n for ends, n in intervals) for end in (0, 1)) if known else None,  # type: ignore[arg-type]
        peak_hbm_gib=max(part.peak_hbm_bytes for part, _ in parts) / GIB,
        compile_cpu_s=compile_cpu_s | {"denoise": sum(kind.compile_cpu_s for kind in counted)},
        note=steps.note,
    )
