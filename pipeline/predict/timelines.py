"""Predictions of stages as timelines for TensorBoard: `python -m pipeline.predict profile=true`."""

from collections.abc import Sequence
from pathlib import Path

import offline_tpu
from offline_tpu.compile import parse_topology
from offline_tpu.timeline import PREFIX, Program, predicted_by, space_of
from splash_workbench import provenance
from splash_workbench.profiles import sessions
from splash_workbench.profiles.sessions import Session
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import PredictionRecord
from splash_workbench.trial_status import Label


def write_timelines(report: PredictionRecord, logdir: Path, run: str | None) -> Sequence[str]:
    """Write a session for each stage of a report, with its ops still in it: a denoise step, a batch of latent frames.

    Replaces those of the same run. run: its name; None: made from topology, size and plan. Returns lines for the user.
    """
    video, topology = report.video, report.topology
    size = f"{video.size}-{report.request['dtype']}"
    name = run or sessions.safe_name(f"{Path(video.checkpoint).name}-{size}-{topology}-{report.plan.plan}")
    name = PREFIX + sessions.check_name(name).removeprefix(PREFIX)
    device, _ = parse_topology(topology)
    captured = provenance.capture(offline_tpu.SOURCES)
    made_by = predicted_by(captured.versions)
    for stage, result in report.stages.items():
        programs = [
            Program(
                f"{stage}-{number}" if number else stage,
                tuple(jsonl.decode(op, offline_tpu.OpCost) for op in program.timeline),
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
            config={**report.request, "plan": jsonl.encode(report.plan)},
            environment=captured,
        )
        sessions.write_session(logdir, session, space_of(programs, device, made_by))
    return sessions.how_to_look(logdir, name)
