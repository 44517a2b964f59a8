"""A prediction as a record and on a terminal, next to what was reported for the published pipeline."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.model.sharding import ParallelPlan
from pipeline.predict.planner import VideoPrediction
from pipeline.requests.request import STAGES, GenerateRequest
from pipeline.runs.records import git_state, package_versions

SCHEMA_VERSION = 2
_GIB = 2**30
#: Of a chip's HBM, so much is left to the runtime and to fragmentation.
HBM_MARGIN_FRACTION = 0.1
#: Of the published CogVideoX TPU nodes (yangwhale/ComfyUI-CogVideoX-TPU) on a v6e-8 at 1280x720, 81 frames, 50 steps.
REPORTED_SEED = {
    "label": "reported",
    "source": "author of ComfyUI-CogVideoX-TPU, on a v6e-8; its README says about 3 min",
    "total_time_s": 106.47,
    "step_time_s": 2.13,
}
#: Milliseconds of the seed's own kernel a layer, which is not in this tree: 12 heads a chip, 39826 tokens, head_dim 64,
#: float32 operands, blocks 3328/2816/256; predicted from the compiler's schedule.
SEED_KERNEL_MS = {"1x12x39826x64": 24.0}


def make_report(
    request: GenerateRequest, topology: str, prediction: VideoPrediction, config_source: str
) -> dict[str, Any]:
    """A JSON-able record. All times and bytes are predicted, but for the entry "reported"."""
    stages = prediction.stages
    denoise = stages.get("denoise")
    step_time_s = own_kernel_s = None
    notes: list[str] = []
    if denoise is not None:
        step_time_s = own_kernel_s = denoise["time_s"]
        if prediction.plan.uses_stock_block:
            step_time_s, note = _with_seed_kernel(denoise)
            notes.append(note)
    stage_times = {stage: result["time_s"] for stage, result in stages.items()}
    if step_time_s is not None:
        stage_times["denoise"] = step_time_s * request.num_inference_steps
    complete = set(stages) == set(STAGES)
    return {
        "schema_version": SCHEMA_VERSION,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "label": "predicted",
        "topology": topology,
        "request": dataclasses.asdict(request),
        "config_source": config_source,
        "plan": prediction.plan.to_dict(),
        "step_time_s": step_time_s,
        "step_time_own_kernel_s": own_kernel_s,
        "total_time_s": sum(stage_times.values()) if complete else None,
        "stage_times_s": stage_times,
        **_hbm(stages),
        "compile_time_s": {stage: result["compile_time_s"] for stage, result in stages.items()},
        "mfu_fraction": denoise["mfu_fraction"] if denoise else None,
        "stages": stages,
        "other_plans": prediction.others,
        "failures": prediction.failures,
        "reported": REPORTED_SEED if _is_reported_case(request, topology) else None,
        "notes": notes,
        "versions": package_versions(),
        "git": git_state(),
    }


def _hbm(stages: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """The peak of a chip's memory over all stages, which run one after the other, against what it has."""
    peak = max(result["peak_hbm_bytes"] for result in stages.values())
    has = next(iter(stages.values()))["hbm_bytes"]
    return {
        "peak_hbm_gib": peak / _GIB,
        "hbm_gib": has / _GIB,
        "hbm_has_margin": peak <= (1 - HBM_MARGIN_FRACTION) * has,
    }


def _with_seed_kernel(denoise: dict[str, Any]) -> tuple[float, str]:
    shape = denoise["attention"]["shape"]
    ours_s = denoise["breakdown_s"].get("attention_kernel", 0.0)
    seed_ms = SEED_KERNEL_MS.get(shape)
    if seed_ms is None:
        return denoise["time_s"], f"seed_tp with this project's kernel: the seed's is not known at {shape}"
    theirs_s = seed_ms / 1e3 * denoise["num_layers"]
    return denoise["time_s"] - ours_s + theirs_s, (
        f"seed_tp: this project's kernel ({ours_s:.3f} s a step) replaced by the seed's, {seed_ms} ms a layer "
        f"({theirs_s:.3f} s), as predicted for it separately"
    )


def _is_reported_case(request: GenerateRequest, topology: str) -> bool:
    size = (request.width, request.height, request.num_frames, request.num_inference_steps)
    return size == (1280, 720, 81, 50) and topology in ("v6e-8", "v6e:2x4")


def print_report(report: dict[str, Any]) -> None:
    """The report as lines of text."""
    request, plan = report["request"], ParallelPlan(**report["plan"])
    print(
        f"{request['checkpoint']}, {request['width']}x{request['height']}, {request['num_frames']} frames, "
        f"{request['num_inference_steps']} steps on {report['topology']}: predicted from the compiler's schedule, "
        "nothing was run"
    )
    print(f"  plan {plan}" + "".join(f"; {name}: {_other(value)}" for name, value in report["other_plans"].items()))
    for stage, result in report["stages"].items():
        times = report["step_time_s"] if stage == "denoise" else result["time_s"]
        unit = "s a step" if stage == "denoise" else "s"
        print(f"  {stage:<8} {times:8.3f} {unit}")
        for kind, seconds in result["breakdown_s"].items():
            print(f"    {kind.replace('_', ' '):<18} {seconds:8.4f} s  {seconds / result['time_s']:6.1%}")
        memory = f"{result['peak_hbm_bytes'] / _GIB:.2f} of {result['hbm_bytes'] / _GIB:.0f} GiB"
        print(
            f"    HBM peak {memory} ({result['peak_hbm_bytes'] / result['hbm_bytes']:.0%}); traffic "
            f"{result['hbm_traffic_bytes'] / 1e9:.1f} GB HBM, {result['link_bytes'] / 1e9:.2f} GB busiest link"
        )
        print(
            f"    compiled in {result['compile_time_s']:.0f} s ({result['compile_cpu_s']:.0f} s of CPU) with "
            f"{result['compile_peak_rss_bytes'] / 1e9:.1f} GB of host memory"
        )
        if "mfu_fraction" in result:
            print(f"    MFU {result['mfu_fraction']:.1%}; attention {result['attention']['resolution']}")
    for stage, reason in report["failures"].items():
        print(f"  {stage:<8} {reason.partition(chr(10))[0]}")
    limit = f"{1 - HBM_MARGIN_FRACTION:.0%} of the chip's {report['hbm_gib']:.0f} GiB"
    print(
        f"  HBM peak {report['peak_hbm_gib']:.2f} GiB a chip over {', '.join(report['stages'])}: "
        f"{'under' if report['hbm_has_margin'] else 'MORE THAN'} {limit}"
    )
    if report["total_time_s"] is not None:
        print(f"  total    {report['total_time_s']:8.2f} s predicted")
    if report["reported"] is not None:
        reported = report["reported"]
        print(
            f"  reported for the published pipeline: {reported['step_time_s']} s a step, "
            f"{reported['total_time_s']} s in all ({reported['source']})"
        )
    for note in report["notes"]:
        print(f"  note: {note}")


def compact(report: dict[str, Any]) -> dict[str, Any]:
    """The report without its list of ops: what is kept in results/."""

    def without_ops(result: dict[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in result.items() if name not in ("ops", "collectives", "timeline")}
        if "programs" in kept:
            kept["programs"] = [without_ops(program) for program in kept["programs"]]
        return kept

    return {**report, "stages": {stage: without_ops(result) for stage, result in report["stages"].items()}}


def markdown_table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Predictions as one table, what was reported for the published pipeline below it.

    One line a case and plan: the newest, with stages that it lacks from the one before.
    """
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for report in reports:
        key = (f"{_case(report)} on {report['topology']}", str(ParallelPlan(**report["plan"])))
        newest[key] = _joined(newest[key], report) if key in newest else dict(report)
    lines = [
        "| video | plan | s a step | text s | vae s | total s | HBM peak GiB | MFU | label |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (case, plan), report in sorted(newest.items()):
        times = report["stage_times_s"]
        cells = [case, plan, _cell(report["step_time_s"])]
        refused = {stage: "does not fit" for stage, text in report.get("failures", {}).items() if "not fit" in text}
        cells += [_cell(times.get(stage)) or refused.get(stage, "") for stage in ("text", "vae")]
        cells += [_cell(report["total_time_s"], 1)]
        cells += [_cell(report["peak_hbm_gib"], 1), _cell(report["mfu_fraction"], 2), report["label"]]
        lines.append(f"| {' | '.join(cells)} |")
        lines += [
            f"| {case} | {other} | {value:.3f} | | | | | | predicted |"
            for other, value in report["other_plans"].items()
            if not isinstance(value, str) and (case, other) not in newest
        ]
    if any(report["reported"] for report in reports):
        seed = REPORTED_SEED
        lines.append(
            f"| 1280x720x81, 50 steps on v6e-8 | published nodes | {seed['step_time_s']} | | | {seed['total_time_s']} "
            f"| | | reported: {seed['source']} |"
        )
    notes = sorted({note for report in newest.values() for note in report["notes"]})
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def _joined(before: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, Any]:
    times = {**before["stage_times_s"], **report["stage_times_s"]}
    joined = {**report, "stage_times_s": times}
    for name in ("step_time_s", "mfu_fraction"):
        joined[name] = before[name] if report[name] is None else report[name]
    stages = joined["stages"] = {**before["stages"], **report["stages"]}
    joined["total_time_s"] = sum(times.values()) if len(times) == len(STAGES) else None
    return joined | _hbm(stages)


def _case(report: Mapping[str, Any]) -> str:
    request = report["request"]
    return f"{request['width']}x{request['height']}x{request['num_frames']}, {request['num_inference_steps']} steps"


def _cell(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _other(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3f} s a step"
