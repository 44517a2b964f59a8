"""Choose what is shown of whole videos: predictions by kind of work, HBM, timings of runs, quality."""

import dataclasses
from collections.abc import Mapping, Sequence

from splash_workbench.records.base import Video
from splash_workbench.records.generation import GenerationRecord, StageTimes
from splash_workbench.records.prediction import GIB, STAGES, PredictionRecord, ReportedVideo, StagePrediction
from splash_workbench.records.quality import QualityRecord
from splash_workbench.status import Label
from tuning.report.parts import BarRow, Stack, origin, stack

_WHOLE = "not broken down"
_STAGE_COLOURS = {"text": "c4", "denoise": "c1", "vae": "c3"}
_STAGE_TITLES = {"text": "Text encoder", "denoise": "A denoising step", "vae": "VAE decoder"}
_KIND_COLOURS = {
    "attention_kernel": "c1",
    "matmul": "c3",
    "elementwise": "c4",
    "layout": "c5",
    "collective": "c2",
    "other": "c6",
}
_PHASE_COLOURS = {"load": "c4", "compile": "c5", "run": "c1"}


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """A plan: what its newest predictions say. total_s is None where a stage is not predicted; `lacking` names it."""

    plan: str
    step_s: float | None
    stage_s: Mapping[str, float]
    total_s: float | None
    lacking: str
    peak_gib: float
    hbm_gib: float
    mfu_fraction: float | None


@dataclasses.dataclass(frozen=True)
class Case:
    """A video on a topology: bars by stage, a table of plans, and what was reported for the same."""

    title: str
    checkpoint: str
    plans: tuple[PlanRow, ...]
    stacks: tuple[Stack, ...]
    reported: ReportedVideo | None
    notes: tuple[str, ...]
    provenance: str


@dataclasses.dataclass(frozen=True)
class Generated:
    """The newest run of a checkpoint and size on a device. stages: in order; older: how many more are on record."""

    title: str
    checkpoint: str
    bars: Stack
    stages: Mapping[str, StageTimes]
    provenance: str
    older: int


@dataclasses.dataclass(frozen=True)
class QualityTable:
    """Candidates of one checkpoint, size and device. read: what was read back from the videos, by name."""

    title: str
    checkpoint: str
    read: tuple[str, ...]
    rows: tuple[QualityRecord, ...]
    provenance: str


def cases(runs: Sequence[PredictionRecord]) -> list[Case]:
    """Return one for each checkpoint, video and topology; of each plan and stage the newest prediction."""
    groups: dict[tuple[str, str, str], list[PredictionRecord]] = {}
    for run in sorted(runs, key=lambda run: run.created_at):
        groups.setdefault((run.topology, str(run.video), run.video.checkpoint), []).append(run)
    return [_case(topology, members) for (topology, _, _), members in sorted(groups.items())]


def _case(topology: str, runs: Sequence[PredictionRecord]) -> Case:
    newest: dict[str, dict[str, PredictionRecord]] = {}
    for run in runs:
        for stage in run.stages:
            newest.setdefault(run.plan.title, {})[stage] = run
    video = runs[0].video
    rows = sorted((_plan_row(plan, by_stage, video) for plan, by_stage in newest.items()), key=_plan_rank)
    used = list({id(run): run for by_stage in newest.values() for run in by_stage.values()}.values())
    reported = next((run.reported for run in reversed(runs) if run.reported), None)
    stacks = []
    bars: list[BarRow] = [(row.plan, Label.PREDICTED, row.stage_s, "") for row in rows if row.total_s is not None]
    if bars and reported:
        bars.append(("published nodes", Label.REPORTED, {_WHOLE: reported.total_time_s}, reported.source))
    if bars:
        stacks.append(stack("The whole video", "s", bars, {**_STAGE_COLOURS, _WHOLE: "c6"}))
    for stage in ("denoise", "vae", "text"):
        runs_of_stage = {row.plan: newest[row.plan][stage] for row in rows if stage in newest[row.plan]}
        bars = [(plan, Label.PREDICTED, _kinds(run, stage), "") for plan, run in runs_of_stage.items()]
        if stage == "denoise" and reported:
            bars.append(("published nodes", Label.REPORTED, {_WHOLE: reported.step_time_s}, reported.source))
        if bars:
            stacks.append(stack(_STAGE_TITLES[stage], "s", bars, {**_KIND_COLOURS, _WHOLE: "c6"}))
    return Case(
        title=f"{video} on {topology}",
        checkpoint=video.checkpoint,
        plans=tuple(rows),
        stacks=tuple(stacks),
        reported=reported,
        notes=tuple(sorted({note for run in used for note in (*run.notes, *_other_outcomes(run))})),
        provenance=origin(used, f"predicted for {topology} with "),
    )


def _other_outcomes(run: PredictionRecord) -> list[str]:
    """Return what became of stages without a prediction, and of the plans that were tried and not taken."""
    lines = [f"{run.plan.plan}: {stage}: {reason.splitlines()[0]}" for stage, reason in run.failures.items()]
    for other, outcome in run.other_plans.items():
        text = outcome.splitlines()[0] if isinstance(outcome, str) else f"{outcome:.3f} s a step"
        lines.append(f"{other}: {text}, predicted and not taken")
    return lines


def _plan_row(plan: str, by_stage: Mapping[str, PredictionRecord], video: Video) -> PlanRow:
    stages: dict[str, StagePrediction] = {stage: run.stages[stage] for stage, run in by_stage.items()}
    step_s = _step_time(by_stage["denoise"]) if "denoise" in by_stage else None
    stage_s = {stage: stages[stage].time_s for stage in STAGES if stage in stages}
    if step_s is not None:
        stage_s["denoise"] = step_s * video.num_inference_steps
    lacking = [stage for stage in STAGES if stage not in stages]
    return PlanRow(
        plan=plan,
        step_s=step_s,
        stage_s=stage_s,
        total_s=None if lacking else sum(stage_s.values()),
        lacking=", ".join(lacking),
        peak_gib=max(stage.peak_hbm_bytes for stage in stages.values()) / GIB,
        hbm_gib=min(stage.hbm_bytes for stage in stages.values()) / GIB,
        mfu_fraction=stages["denoise"].mfu_fraction if "denoise" in stages else None,
    )


def _plan_rank(row: PlanRow) -> tuple[float, str]:
    return (float("inf") if row.step_s is None else row.step_s, row.plan)


def _step_time(run: PredictionRecord) -> float:
    return run.stages["denoise"].time_s if run.step_time_s is None else run.step_time_s


def _kinds(run: PredictionRecord, stage: str) -> dict[str, float]:
    """Return seconds by kind; another attention kernel in place of ours has its time in ours' place."""
    kinds = dict(run.stages[stage].breakdown_s)
    if stage == "denoise" and (more := _step_time(run) - run.stages[stage].time_s):
        kinds["attention_kernel"] = kinds.get("attention_kernel", 0.0) + more
    return kinds


def generated(runs: Sequence[GenerationRecord]) -> list[Generated]:
    """Return the newest run of each checkpoint, size and device."""
    groups: dict[tuple[str, str, str], list[GenerationRecord]] = {}
    for run in sorted(runs, key=lambda run: run.created_at):
        if run.stages:  # else all were reused, and nothing was timed
            groups.setdefault((str(run.device), run.video.checkpoint, str(run.video)), []).append(run)
    shown = []
    for (device, checkpoint, video), members in sorted(groups.items()):
        run = members[-1]
        stages = {stage: run.stages[stage] for stage in dict.fromkeys((*STAGES, *run.stages)) if stage in run.stages}
        bars = [
            (stage, run.label, {"load": s.load_time_s, "compile": s.compile_time_s, "run": s.run_time_s}, "")
            for stage, s in stages.items()
        ]
        shown.append(
            Generated(
                title=f"{video} on {device}",
                checkpoint=checkpoint,
                bars=stack("", "s", bars, _PHASE_COLOURS),
                stages=stages,
                provenance=origin([run], f"{run.label} on {device} with "),
                older=len(members) - 1,
            )
        )
    return shown


def quality(runs: Sequence[QualityRecord]) -> list[QualityTable]:
    """Return a table for each checkpoint, size and device, with the newest line of each candidate."""
    groups: dict[tuple[str, str, str], dict[str, QualityRecord]] = {}
    for run in runs:
        members = groups.setdefault((run.video.checkpoint, str(run.video), str(run.device)), {})
        if run.candidate not in members or run.created_at >= members[run.candidate].created_at:
            members[run.candidate] = run
    return [
        QualityTable(
            title=f"{video} on {device}",
            checkpoint=checkpoint,
            read=tuple(dict.fromkeys(name for run in members.values() for name in run.read_back)),
            rows=tuple(members.values()),
            provenance=origin(list(members.values()), f"{next(iter(members.values())).label} on {device} with "),
        )
        for (checkpoint, video, device), members in groups.items()
    ]
