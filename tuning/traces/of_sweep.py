"""Show the timelines of a sweep's best candidates in TensorBoard."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from offline_tpu import timeline
from offline_tpu.machine.devices import by_name
from splash_workbench.errors import UserError
from splash_workbench.profiles import sessions
from splash_workbench.profiles.sessions import Recorder, Session
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Label, Status
from tuning.backends.jobs import Request, normal_arguments, request_of
from tuning.trials.records import Trial

#: Runs in the trace of a candidate, each a step.
TRACED_RUNS = 10


def write(trials: Sequence[Trial], logdir: Path, top: int, kernel: str | None = None) -> Iterator[str]:
    """Write the timelines of the `top` first trials that are timed; yield lines for the user.

    kernel: where a user's kernel is, see `loading.find`; None: the trials' own.
    """
    if top < 0:
        raise UserError(f"profile_top={top}: expected 0 or more.")
    for trial in [trial for trial in trials if trial.status is Status.OK and trial.time_ms is not None][:top]:
        session = predicted(trial, logdir) if trial.label is Label.PREDICTED else measured(trial, logdir, kernel)
        yield f"{trial.label} timeline: {sessions.profile_dir(logdir) / session.name}"
    yield f"look: {sessions.tensorboard_command(logdir)}"


def predicted(trial: Trial, logdir: Path) -> Session:
    """Write the timeline that a trial was predicted to have, which replaces that of the same trial."""
    session = Session(
        run=f"{timeline.PREFIX}{_name(trial)}",
        part="",
        repeat=1,  # the same prediction again is no other sample
        label=Label.PREDICTED,
        device=trial.device_kind,
        made_by=timeline.predicted_by(trial.environment.versions),
        config=_config(trial),
        environment=trial.environment,
    )
    sessions.write_session(logdir, session, space_of_trial(trial))
    return session


def space_of_trial(trial: Trial) -> Any:
    """Return the timeline, an XSpace, of a trial that was predicted. Raises ValueError for another."""
    if trial.label is not Label.PREDICTED or not trial.ops:
        raise ValueError(f"trial {trial.record_id} ({trial.status}, {trial.label}): expected a prediction with ops.")
    program = timeline.Program(f"{trial.workload} {trial.config}", trial.ops)
    return timeline.space_of([program], by_name(trial.device), timeline.predicted_by(trial.environment.versions))


def measured(trial: Trial, logdir: Path, kernel: str | None = None) -> Session:
    """Run the candidate of a trial on the device that is here, and record a trace of it."""
    device = jax.devices()[0]
    request = decode(request_of(trial, kernel), Request)
    arguments = normal_arguments(request.arguments())
    function = request.timed("pallas_interpret" if device.platform == "cpu" else "pallas_tpu")
    options: Any = request.options_of_compiler or None
    compiled = jax.jit(function).lower(*arguments).compile(compiler_options=options)
    jax.block_until_ready(compiled(*arguments))
    recorder = Recorder(logdir, _name(trial), _config(trial))
    with recorder.record() as session:
        for number in range(1, TRACED_RUNS + 1):
            with jax.profiler.StepTraceAnnotation(trial.kernel, step_num=number):
                jax.block_until_ready(compiled(*arguments))
    return session


def _name(trial: Trial) -> str:
    variant = [name if value is True else str(value) for name, value in trial.variant.items() if value]
    kernel = [] if trial.kernel == "splash_attn" else [trial.kernel]
    blocks = [str(trial.block_sizes)] if trial.block_sizes else []
    return sessions.safe_name("-".join([trial.workload, trial.device, *kernel, *blocks, *variant]))


def _config(trial: Trial) -> dict[str, str]:
    names = ("kernel", "workload", "dtype", "record_id")
    return {"candidate": trial.config, "shape": trial.call} | {name: str(getattr(trial, name)) for name in names}
