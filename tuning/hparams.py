"""Show trials in TensorBoard's HParams tab: `python -m tuning.hparams`, see --help.

A trial is a folder `<logdir>/hparams/<sweep>/<block sizes and variant>`. No experiment is declared: TensorBoard then
takes parameters and metrics from the trials, and sweeps can share a logdir.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from omegaconf import MISSING

from splash_workbench import cli
from splash_workbench.errors import UserError
from splash_workbench.files import require_writable
from splash_workbench.profiles import sessions
from splash_workbench.trial_status import Status
from tuning.search.schemas import WorkloadSchema
from tuning.trials import records
from tuning.trials.records import TRIALS_FILE, Trial


def parameters(trial: Trial) -> dict[str, str | float | bool]:
    """Return the candidate and its call: the axes of the parallel coordinates."""
    blocks = dataclasses.asdict(trial.block_sizes) if trial.block_sizes else {}
    variant = {
        name: value if isinstance(value, bool | int | float) else str(value) for name, value in trial.variant.items()
    }
    about = {name: str(getattr(trial, name)) for name in ("kernel", "workload", "shape", "device")}
    return {**blocks, **variant, **about, "status": trial.status.value}


def metrics(trial: Trial) -> dict[str, float]:
    """Return the figures of an ok trial. TensorBoard sorts by name, and colours by the first."""
    if trial.status is not Status.OK:
        return {}
    found = {
        f"attention ms ({trial.label})": trial.time_ms,
        f"kernel ms ({trial.label})": trial.kernel_time_ms,
        "kernel Mcycles": None if trial.cycles is None else trial.cycles / 1e6,
        "spills": trial.spill_count,
        "vmem MiB": None if trial.vmem_bytes is None else trial.vmem_bytes / 2**20,
        "compile s": trial.compile_time_s,
    }
    return {name: float(value) for name, value in found.items() if value is not None}


def write(trials: Sequence[Trial], logdir: Path, sweep: str) -> Path:
    """Write the trials of a sweep, in place of what an earlier call wrote of it. Returns their folder."""
    sessions.require_tensorboard("HParams")
    folder = logdir / "hparams" / sweep
    shutil.rmtree(folder, ignore_errors=True)
    for trial in trials:
        values = [trial.block_sizes or trial.kernel, *trial.variant.values(), trial.record_id[:6]]
        _write_trial(trial, folder / sessions.safe_name("-".join(map(str, values))))
    return folder


def _write_trial(trial: Trial, folder: Path) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    ended_s = datetime.fromisoformat(trial.created_at).timestamp()
    started_s = ended_s - (trial.wall_time_s or 0.0)
    outcome = api_pb2.STATUS_SUCCESS if trial.status is Status.OK else api_pb2.STATUS_FAILURE
    end = plugin_data_pb2.HParamsPluginData(
        session_end_info=plugin_data_pb2.SessionEndInfo(status=outcome, end_time_secs=ended_s)
    )
    ended = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(end),
        tensor=metadata.NULL_TENSOR,
    )
    figures = [Summary.Value(tag=name, simple_value=value) for name, value in metrics(trial).items()]
    start = summary_v2.hparams_pb(parameters(trial), trial_id=trial.record_id, start_time_secs=started_s)
    writer = EventFileWriter(str(folder))
    try:
        for summary in (start, Summary(value=[*figures, ended])):
            writer.add_event(Event(wall_time=ended_s, step=0, summary=summary))
    finally:
        writer.close()


@dataclasses.dataclass
class HParamsSchema:
    """Fields of configs/hparams.yaml."""

    results_dir: str = MISSING
    logdir: str = MISSING
    workload: WorkloadSchema | None = None


@cli.command("hparams", HParamsSchema)
def main(settings: HParamsSchema) -> int:
    """Run the command; return its exit code."""
    results_dir, logdir = Path(settings.results_dir), Path(settings.logdir)
    sessions.require_tensorboard("python -m tuning.hparams")
    require_writable(f"logdir={logdir}", logdir)
    workload = settings.workload.frozen() if settings.workload else None
    sweeps: dict[str, list[Trial]] = {}  # the same one may be in the folders of several machines
    for path in sorted(results_dir.rglob(TRIALS_FILE)):
        found = [t for t in records.read(path) if workload is None or (t.shape, t.dtype) == workload.identity]
        sweeps.setdefault(path.parent.name, []).extend(found)
    for name, trials in sweeps.items():
        if trials := records.once(trials):
            print(f"{len(trials)} trials: {write(trials, logdir, name)}")
    if not any(sweeps.values()):
        wanted = f" of workload={workload.name} ({workload.shape} {workload.dtype})" if workload else ""
        raise UserError(f"results_dir={results_dir}: no trials{wanted}; run python -m tuning.sweep first.")
    print(f"look: {sessions.tensorboard_command(logdir)}\n      http://127.0.0.1:{sessions.PORT}/#hparams")
    return 0


if __name__ == "__main__":
    sys.exit(main())
