"""A prediction as a record, on a terminal, for TensorBoard, and beside what was reported for the published pipeline."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

import offline_tpu
from offline_tpu import libtpu
from offline_tpu.machine.topology import parse_topology
from offline_tpu.options import options_text
from offline_tpu.timeline import PREFIX, Program, predicted_by, space_of
from pipeline.model.sharding import ParallelPlan
from pipeline.predict.planner import SOURCES, VideoPrediction
from pipeline.requests.request import GenerateRequest
from pipeline.runs.records import environment
from splash_workbench.profiles import sessions
from splash_workbench.profiles.sessions import Session
from splash_workbench.records.jsonl import decode, encode
from splash_workbench.records.prediction import (
    GIB,
    HBM_MARGIN_FRACTION,
    STAGES,
    Plan,
    PredictionRecord,
    PresetPrediction,
    ReportedVideo,
    StagePrediction,
    hbm_fields,
)
from splash_workbench.trial_status import Label

_OTHER_END = "where every head needs the online softmax"

#: Of the published CogVideoX TPU nodes (yangwhale/ComfyUI-CogVideoX-TPU) on a v6e-8 at 1280x720, 81 frames, 50 steps.
REPORTED_SEED = ReportedVideo(
    label=Label.REPORTED,
    source="author of ComfyUI-CogVideoX-TPU, on a v6e-8; its README says about 3 min",
    total_time_s=106.47,
    step_time_s=2.13,
)
#: Milliseconds of the seed's own kernel a layer, which is not in this tree: 12 heads a chip, 39826 tokens, head_dim 64,
#: float32 operands, blocks 3328/2816/256; predicted from the compiler's schedule.
SEED_KERNEL_MS = {"1x12x39826x64": 24.0}


def make_report(
    request: GenerateRequest,
    topology: str,
    prediction: VideoPrediction,
    config_source: str,
    compiler_options: Mapping[str, str] | None = None,
    presets: Mapping[str, PresetPrediction] | None = None,
    more_notes: Sequence[str] = (),
) -> PredictionRecord:
    """Return the record of a prediction. All times and bytes are predicted, but for the field `reported`.

    presets: of quality; the request's own decides over the time of its steps.
    """
    stages: dict[str, StagePrediction] = {
        stage: decode(result, StagePrediction) for stage, result in prediction.stages.items()
    }
    denoise = stages.get("denoise")
    step_time_s = denoise.time_s if denoise else None
    notes = list(more_notes)
    if denoise is not None and prediction.plan.uses_stock_block:
        step_time_s, note = _with_seed_kernel(denoise)
        notes.append(note)
    size = (request.width, request.height, request.num_frames, request.num_inference_steps)
    is_reported = size == (1280, 720, 81, 50) and topology in ("v6e-8", "v6e:2x4")
    stage_times = {stage: result.time_s for stage, result in stages.items()}
    if step_time_s is not None:
        stage_times["denoise"] = step_time_s * request.num_inference_steps
    own = (presets or {}).get(request.quality)
    if own is not None:
        stage_times["denoise"] = own.stage_times_s["denoise"]
    total_time_s = sum(stage_times.values()) if set(stages) == set(STAGES) else None
    slow_total_time_s = None
    if total_time_s and denoise and denoise.slow_time_s and step_time_s == denoise.time_s:
        slow_total_time_s = total_time_s + (denoise.slow_time_s - denoise.time_s) * request.num_inference_steps
    return PredictionRecord(
        label=Label.PREDICTED,
        topology=topology,
        request=dataclasses.asdict(request),
        config_source=config_source,
        compiler_options=dict(compiler_options or {}),
        plan=decode(encode(prediction.plan), Plan),
        step_time_s=step_time_s,
        step_time_own_kernel_s=denoise.time_s if denoise else None,
        total_time_s=total_time_s,
        slow_total_time_s=slow_total_time_s,
        total_interval_s=_total_interval(stages, stage_times) if set(stages) == set(STAGES) else None,
        stage_times_s=stage_times,
        **hbm_fields(stages.values()),
        compile_time_s={stage: result.compile_time_s for stage, result in stages.items()},
        mfu_fraction=denoise.mfu_fraction if denoise else None,
        stages=stages,
        other_plans=prediction.others,
        failures={str(stage): reason for stage, reason in prediction.failures.items()},
        reported=REPORTED_SEED if is_reported else None,
        presets=dict(presets or {}),
        notes=tuple(notes),
        environment=libtpu.with_compiler(environment(SOURCES)),
    )


def _with_seed_kernel(denoise: StagePrediction) -> tuple[float, str]:
    assert denoise.attention is not None and denoise.num_layers is not None
    shape = denoise.attention.shape
    ours_s = denoise.breakdown_s.get("attention_kernel", 0.0)
    seed_ms = SEED_KERNEL_MS.get(shape)
    if seed_ms is None:
        return denoise.time_s, f"seed_tp with this project's kernel: the seed's is not known at {shape}"
    theirs_s = seed_ms / 1e3 * denoise.num_layers
    return denoise.time_s - ours_s + theirs_s, (
        f"seed_tp: this project's kernel ({ours_s:.3f} s a step) replaced by the seed's, {seed_ms} ms a layer "
        f"({theirs_s:.3f} s), as predicted for it separately"
    )


def _total_interval(stages: Mapping[str, StagePrediction], times_s: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the sums of the stages' intervals, each for the time that the stage takes in all."""
    low = high = 0.0
    for stage, result in stages.items():
        if result.interval_s is None:
            return None
        low += result.interval_s[0] / result.time_s * times_s[stage]
        high += result.interval_s[1] / result.time_s * times_s[stage]
    return low, high


def _between(interval_s: tuple[float, float] | None, of_s: float = 1.0, digits: int = 3) -> str:
    """Return an interval for print; `of_s`: over the predicted time it was of."""
    return "" if interval_s is None else f" ({interval_s[0] * of_s:.{digits}f} to {interval_s[1] * of_s:.{digits}f})"


def print_report(report: PredictionRecord) -> None:
    """Print the report as lines of text."""
    video = report.video
    print(
        f"{video.checkpoint}, {video.width}x{video.height}, {video.num_frames} frames, "
        f"{video.num_inference_steps} steps on {report.topology}: predicted from the compiler's schedule, "
        "nothing was run; in brackets, between which four fifths of the measured times of such work lie"
    )
    shown = ((name, v if isinstance(v, str) else f"{v:.3f} s a step") for name, v in report.other_plans.items())
    others = "".join(f"; {name}: {value}" for name, value in shown)
    print(f"  plan {_plan(report)}" + others)
    if quantization := report.request.get("quantization"):
        print(f"  quantization {quantization}: the linears of the transformer's blocks")
    if report.compiler_options:
        print(f"  compiler options {options_text(report.compiler_options)}")
    for stage, result in report.stages.items():
        _print_stage(report, stage, result)
    for stage, reason in report.failures.items():
        print(f"  {stage:<8} {reason.partition(chr(10))[0]}")
    limit = f"{1 - HBM_MARGIN_FRACTION:.0%} of the chip's {report.hbm_gib:.0f} GiB"
    print(
        f"  HBM peak {report.peak_hbm_gib:.2f} GiB a chip over {', '.join(report.stages)}: "
        f"{'under' if report.hbm_has_margin else 'MORE THAN'} {limit}"
    )
    if report.total_time_s is not None:
        slow = report.slow_total_time_s
        other_end = "" if slow is None else f"; {slow:.2f} s {_OTHER_END}"
        print(
            f"  total    {report.total_time_s:8.2f} s predicted{_between(report.total_interval_s, digits=1)}{other_end}"
        )
    if (reported := report.reported) is not None:
        print(
            f"  reported for the published pipeline: {reported.step_time_s} s a step, "
            f"{reported.total_time_s} s in all ({reported.source})"
        )
    if report.presets:
        _print_presets(report)
    for note in report.notes:
        print(f"  note: {note}")


def _print_presets(report: PredictionRecord) -> None:
    print(
        f"\n  {'quality':<9} {'computed':>9} {'s a step':>9} {'denoise s':>9} {'total s':>8}  {'interval':<15} HBM GiB"
    )
    for name, preset in report.presets.items():
        total = "" if preset.total_time_s is None else f"{preset.total_time_s:.2f}"
        ends = preset.total_interval_s
        between = "" if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}"
        print(
            f"  {name:<9} {preset.steps_computed:>3} of {preset.steps:>2} {preset.step_time_s:>9.3f} "
            f"{preset.stage_times_s['denoise']:>9.2f} {total:>8}  {between:<15} {preset.peak_hbm_gib:>7.2f}"
        )
        for kind in preset.kinds:
            parts = ", ".join(f"{part.replace('_', ' ')} {seconds:.3f}" for part, seconds in kind.breakdown_s.items())
            print(f"    {kind.count:>3} x {kind.time_s:.4f} s {kind.work}: {parts}")
        cpu = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in preset.compile_cpu_s.items())
        print(f"    compiling, CPU s: {cpu}" + (f"\n    {preset.note}" if preset.note else ""))
    if (reported := report.reported) is not None:
        print(f"  {'reported':<9} {'':>9} {reported.step_time_s:>9.3f} {'':>9} {reported.total_time_s:>8.2f}")


def _print_stage(report: PredictionRecord, stage: str, result: StagePrediction) -> None:
    times, unit = (report.step_time_s, "s a step") if stage == "denoise" else (result.time_s, "s")
    interval = _between(result.interval_s, (times or 0.0) / result.time_s)
    is_own_kernel = times == result.time_s
    other_end = f"; {result.slow_time_s:.3f} {_OTHER_END}" if result.slow_time_s and is_own_kernel else ""
    print(f"  {stage:<8} {times:8.3f} {unit}{interval}{other_end}")
    for kind, seconds in result.breakdown_s.items():
        print(f"    {kind.replace('_', ' '):<18} {seconds:8.4f} s  {seconds / result.time_s:6.1%}")
    memory = f"{result.peak_hbm_bytes / GIB:.2f} of {result.hbm_bytes / GIB:.0f} GiB"
    print(
        f"    HBM peak {memory} ({result.peak_hbm_bytes / result.hbm_bytes:.0%}); traffic "
        f"{result.hbm_traffic_bytes / 1e9:.1f} GB HBM, {result.link_bytes / 1e9:.2f} GB busiest link"
    )
    print(
        f"    compiled in {result.compile_time_s:.0f} s ({result.compile_cpu_s:.0f} s of CPU) with "
        f"{result.compile_peak_rss_bytes / 1e9:.1f} GB of host memory"
        + (f", {options_text(result.step_options)}" if result.step_options else "")
    )
    if result.mfu_fraction is not None and result.attention is not None:
        print(f"    MFU {result.mfu_fraction:.1%}; attention {result.attention.resolution}")


def write_timelines(report: PredictionRecord, logdir: Path, run: str | None) -> Sequence[str]:
    """Write a session for each stage of a report, with its ops still in it: a denoise step, a batch of latent frames.

    Replaces those of the same run. run: its name; None: made from topology, size and plan. Returns lines for the user.
    """
    video, topology = report.video, report.topology
    size = f"{video.size}-{report.request['dtype']}"
    name = run or sessions.safe_name(f"{Path(video.checkpoint).name}-{size}-{topology}-{report.plan.plan}")
    name = PREFIX + sessions.check_name(name).removeprefix(PREFIX)
    device, _ = parse_topology(topology)
    captured = offline_tpu.capture()
    made_by = predicted_by(captured.versions)
    for stage, result in report.stages.items():
        programs = [
            Program(
                f"{stage}-{number}" if number else stage,
                tuple(decode(op, offline_tpu.OpCost) for op in program.timeline),
            )
            for number, program in enumerate(result.programs or (result,))
        ]
        session = Session(
            run=name,
            part=stage,
            repeat=1,
            label=Label.PREDICTED,
            device=f"{device.device_kind} ({topology}, one chip)",
            made_by=made_by,
            config={**report.request, "plan": encode(report.plan)},
            environment=captured,
        )
        sessions.write_session(logdir, session, space_of(programs, device, made_by))
    return sessions.how_to_look(logdir, name)


def markdown_table(reports: Sequence[PredictionRecord]) -> str:
    """Return predictions as one table, what was reported for the published pipeline below it.

    One line a case and plan: the newest, with stages that it lacks from the one before.
    """
    newest: dict[tuple[str, str], PredictionRecord] = {}
    for report in reports:
        video = report.video
        case = f"{Path(video.checkpoint).name}, {video.size}, {video.num_inference_steps} steps on {report.topology}"
        case += _approximations(report)
        case += f", {options_text(report.compiler_options)}" if report.compiler_options else ""
        key = (case, str(_plan(report)))
        newest[key] = _joined(newest[key], report) if key in newest else report
    lines = [
        "| video | plan | s a step | text s | vae s | total s | HBM peak GiB | MFU | label |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (case, plan), report in sorted(newest.items()):
        refused = {stage: "does not fit" for stage, text in report.failures.items() if "not fit" in text}
        stages = [_cell(report.stage_times_s.get(stage)) or refused.get(stage, "") for stage in ("text", "vae")]
        cells = [case, plan, _cell(report.step_time_s), *stages, _cell(report.total_time_s, 1)]
        cells += [_cell(report.peak_hbm_gib, 1), _cell(report.mfu_fraction, 2), report.label]
        lines.append(f"| {' | '.join(cells)} |")
        lines += [
            f"| {case} | {other} | {value:.3f} | | | | | | predicted |"
            for other, value in report.other_plans.items()
            if not isinstance(value, str) and (case, other) not in newest
        ]
        lines += [
            f"| {case}, quality={name}, {preset.steps_computed} computed | {ParallelPlan(**encode(preset.plan))} "
            f"| {preset.step_time_s:.3f} | {stages[0]} | {stages[1]} | {_cell(preset.total_time_s, 1)} "
            f"| {preset.peak_hbm_gib:.1f} | | predicted |"
            for name, preset in report.presets.items()
            if name != report.request.get("quality")
        ]
    if any(report.reported for report in reports):
        seed = REPORTED_SEED
        lines.append(
            "| CogVideoX1.5-5B, 1280x720x81, 50 steps on v6e-8 | published nodes "
            f"| {seed.step_time_s} | | | {seed.total_time_s} | | | reported: {seed.source} |"
        )
    notes = sorted({note for report in newest.values() for note in report.notes})
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _approximations(report: PredictionRecord) -> str:
    """Return what of a request is not exact, to follow its case; empty where all is."""
    request = report.request
    if request.get("quality", "exact") != "exact":
        return f", quality={request['quality']}"
    quantization, cache = request.get("quantization"), (request.get("cache") or {}).get("method")
    said = "" if quantization in (None, "none") else f", quantization={quantization}"
    return said + (f", cache={cache}" if cache not in (None, "none") else "")


def _joined(before: PredictionRecord, report: PredictionRecord) -> PredictionRecord:
    """Return the newer report with the stages and other plans that only the older one has."""
    times, stages = before.stage_times_s | report.stage_times_s, before.stages | report.stages
    return msgspec.structs.replace(
        report,
        presets=report.presets or before.presets,
        other_plans=before.other_plans | report.other_plans,
        stage_times_s=times,
        stages=stages,
        step_time_s=before.step_time_s if report.step_time_s is None else report.step_time_s,
        mfu_fraction=before.mfu_fraction if report.mfu_fraction is None else report.mfu_fraction,
        total_time_s=sum(times.values()) if len(times) == len(STAGES) else None,
        **hbm_fields(stages.values()),
    )


def _plan(report: PredictionRecord) -> ParallelPlan:
    return ParallelPlan(**encode(report.plan))


def _cell(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
