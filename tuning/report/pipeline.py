"""Choose what is shown of whole videos, as dicts for the templates: predictions, HBM, timings of runs, quality."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from splash_workbench.records.base import PipelineRecord, Video
from splash_workbench.records.generation import GenerationRecord
from splash_workbench.records.prediction import GIB, STAGES, PredictionRecord
from splash_workbench.records.quality import QualityRecord
from splash_workbench.trial_status import Label
from tuning.report.parts import BarRow, origin, stack

R = TypeVar("R", bound=PipelineRecord)

_WHOLE = {"not broken down": "c6"}
_STAGE_COLOURS = {"text": "c4", "denoise": "c1", "vae": "c3"}
_STAGE_TITLES = {"denoise": "A denoising step", "vae": "VAE decoder", "text": "Text encoder"}
_KIND_COLOURS = dict(attention_kernel="c1", matmul="c3", elementwise="c4", layout="c5", collective="c2", other="c6")
_PHASE_COLOURS = {"load": "c4", "compile": "c5", "run": "c1"}


def _grouped(runs: Iterable[R], place: Callable[[R], object]) -> list[tuple[str, str, list[R]]]:
    """Return (title, checkpoint, runs oldest first) of each video at each place, in the order of the places."""
    groups: dict[tuple[str, str, str], list[R]] = {}
    for run in sorted(runs, key=lambda run: run.created_at):
        groups.setdefault((str(place(run)), str(run.video), run.video.checkpoint), []).append(run)
    return [
        (f"{video} on {where}", checkpoint, members) for (where, video, checkpoint), members in sorted(groups.items())
    ]


def cases(runs: Sequence[PredictionRecord]) -> list[dict[str, Any]]:
    """Return one for each checkpoint, video and topology; of each plan and stage the newest prediction."""
    return [
        {"title": title, "checkpoint": checkpoint, **_case(members)}
        for title, checkpoint, members in _grouped(runs, lambda run: run.topology)
    ]


def _case(runs: Sequence[PredictionRecord]) -> dict[str, Any]:
    newest: dict[str, dict[str, PredictionRecord]] = {}
    for run in runs:
        for stage in run.stages:
            newest.setdefault(run.plan.title, {})[stage] = run
    rows = [_plan_row(plan, by_stage, runs[0].video) for plan, by_stage in newest.items()]
    rows.sort(key=lambda row: (math.inf if row["step_s"] is None else row["step_s"], row["plan"]))
    used = list({id(run): run for by_stage in newest.values() for run in by_stage.values()}.values())
    reported = next((run.reported for run in reversed(runs) if run.reported), None)

    def published(time_s: Callable[[Any], float]) -> list[BarRow]:
        """Return the bar of what was reported for the same, of one piece."""
        if reported is None:
            return []
        return [("published nodes", Label.REPORTED, dict.fromkeys(_WHOLE, time_s(reported)), reported.source)]

    stacks = []
    bars: list[BarRow] = [
        (row["plan"], Label.PREDICTED, row["stage_s"], "") for row in rows if row["total_s"] is not None
    ]
    if bars:
        bars += published(lambda video: video.total_time_s)
        stacks.append(stack("The whole video", "s", bars, _STAGE_COLOURS | _WHOLE))
    for stage, title in _STAGE_TITLES.items():
        plans = [row["plan"] for row in rows if stage in newest[row["plan"]]]
        bars = [(plan, Label.PREDICTED, _kinds(newest[plan][stage], stage), "") for plan in plans]
        bars += published(lambda video: video.step_time_s) if stage == "denoise" else []
        if bars:
            stacks.append(stack(title, "s", bars, _KIND_COLOURS | _WHOLE))
    return {
        "plans": rows,
        "stacks": stacks,
        "reported": reported,
        "notes": sorted({note for run in used for note in (*run.notes, *_other_outcomes(run))}),
        "provenance": origin(used, f"predicted for {runs[0].topology} with "),
    }


def _other_outcomes(run: PredictionRecord) -> list[str]:
    """Return what became of stages without a prediction, and of the plans that were tried and not taken."""
    lines = [f"{run.plan.plan}: {stage}: {reason.splitlines()[0]}" for stage, reason in run.failures.items()]
    for other, outcome in run.other_plans.items():
        text = outcome.splitlines()[0] if isinstance(outcome, str) else f"{outcome:.3f} s a step"
        lines.append(f"{other}: {text}, predicted and not taken")
    return lines


def _plan_row(plan: str, by_stage: Mapping[str, PredictionRecord], video: Video) -> dict[str, Any]:
    """Return what the newest predictions of a plan say; total_s: None where a stage is `lacking`."""
    stages = {stage: by_stage[stage].stages[stage] for stage in STAGES if stage in by_stage}
    stage_s = {stage: prediction.time_s for stage, prediction in stages.items()}
    step_s = _step_time(by_stage["denoise"]) if "denoise" in by_stage else None
    if step_s is not None:
        stage_s["denoise"] = step_s * video.num_inference_steps
    lacking = [stage for stage in STAGES if stage not in stages]
    return {
        "plan": plan,
        "step_s": step_s,
        "stage_s": stage_s,
        "total_s": None if lacking else sum(stage_s.values()),
        "lacking": ", ".join(lacking),
        "peak_gib": max(stage.peak_hbm_bytes for stage in stages.values()) / GIB,
        "hbm_gib": min(stage.hbm_bytes for stage in stages.values()) / GIB,
        "mfu_fraction": stages["denoise"].mfu_fraction if "denoise" in stages else None,
    }


def _step_time(run: PredictionRecord) -> float:
    return run.stages["denoise"].time_s if run.step_time_s is None else run.step_time_s


def _kinds(run: PredictionRecord, stage: str) -> dict[str, float]:
    """Return seconds by kind; another attention kernel in place of ours has its time in ours' place."""
    kinds = dict(run.stages[stage].breakdown_s)
    if stage == "denoise" and (more := _step_time(run) - run.stages[stage].time_s):
        kinds["attention_kernel"] = kinds.get("attention_kernel", 0.0) + more
    return kinds


def generated(runs: Sequence[GenerationRecord]) -> list[dict[str, Any]]:
    """Return the newest run of each checkpoint, size and device; `older`: how many more are on record."""
    shown = []
    timed = [run for run in runs if run.stages]  # else all were reused, and nothing was timed
    for title, checkpoint, members in _grouped(timed, lambda run: run.device):
        run = members[-1]
        stages = {stage: run.stages[stage] for stage in dict.fromkeys((*STAGES, *run.stages)) if stage in run.stages}
        bars = [
            (stage, run.label, {"load": s.load_time_s, "compile": s.compile_time_s, "run": s.run_time_s}, "")
            for stage, s in stages.items()
        ]
        shown.append(
            {
                "title": title,
                "checkpoint": checkpoint,
                "bars": stack("", "s", bars, _PHASE_COLOURS),
                "stages": stages,
                "provenance": origin([run], f"{run.label} on {run.device} with "),
                "older": len(members) - 1,
            }
        )
    return shown


def quality(runs: Sequence[QualityRecord]) -> list[dict[str, Any]]:
    """Return a table for each checkpoint, size and device, with the newest line of each candidate."""
    tables = []
    for title, checkpoint, members in _grouped(runs, lambda run: run.device):
        rows = list({run.candidate: run for run in members}.values())
        tables.append(
            {
                "title": title,
                "checkpoint": checkpoint,
                "read": list(dict.fromkeys(name for run in rows for name in run.read_back)),
                "rows": rows,
                "provenance": origin(rows, f"{rows[0].label} on {rows[0].device} with "),
            }
        )
    return tables
