"""Show trials in TensorBoard's HParams tab: `python -m tuning.hparams`, see --help."""

import dataclasses
import sys
from pathlib import Path

from omegaconf import MISSING

from splash_workbench import cli
from splash_workbench.errors import UserError
from splash_workbench.profiles import sessions
from tuning.search.schemas import WorkloadSchema
from tuning.traces.hparams import write
from tuning.trials import records
from tuning.trials.records import TRIALS_FILE


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
    workload = settings.workload.frozen() if settings.workload else None
    count = 0
    for path in sorted(results_dir.rglob(TRIALS_FILE)):
        trials = [t for t in records.read(path) if workload is None or (t.shape, t.dtype) == workload.identity]
        if trials:
            print(f"{len(trials)} trials: {write(trials, logdir, path.parent.name)}")
            count += len(trials)
    if not count:
        wanted = f" of workload={workload.name} ({workload.shape} {workload.dtype})" if workload else ""
        raise UserError(f"results_dir={results_dir}: no trials{wanted}; run python -m tuning.sweep first.")
    print(f"look: {sessions.tensorboard_command(logdir)}\n      http://127.0.0.1:{sessions.PORT}/#hparams")
    return 0


if __name__ == "__main__":
    sys.exit(main())
