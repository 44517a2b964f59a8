"""Show trials in TensorBoard's HParams tab: `python -m tuning.hparams`, see --help."""

import dataclasses
import sys
from pathlib import Path

from omegaconf import MISSING, DictConfig

from splash_workbench import cli
from splash_workbench.accelerator import quiet_jax_without_accelerator
from splash_workbench.profiles import sessions
from tuning.traces.hparams import write
from tuning.trials import records
from tuning.trials.records import TRIALS_FILE


@dataclasses.dataclass
class HParamsSchema:
    """Fields of configs/hparams.yaml."""

    results_dir: str = MISSING
    logdir: str = MISSING
    workload: cli.WorkloadSchema | None = None


cli.store_schema("hparams_schema", HParamsSchema)


def _command(config: DictConfig) -> int:
    results_dir, logdir = Path(config.results_dir), Path(config.logdir)
    sessions.require_tensorboard("python -m tuning.hparams")
    workload = config.workload.name if config.workload else None
    count = 0
    for path in sorted(results_dir.rglob(TRIALS_FILE)):
        trials = [t for t in records.read(path) if workload in (None, t.workload)]
        if trials:
            print(f"{len(trials)} trials: {write(trials, logdir, path.parent.name)}")
            count += len(trials)
    if not count:
        wanted = f" of workload={workload}" if workload else ""
        raise cli.UserError(f"results_dir={results_dir}: no trials{wanted}; run python -m tuning.sweep first.")
    print(f"look: {sessions.tensorboard_command(logdir)}\n      http://127.0.0.1:{sessions.PORT}/#hparams")
    return 0


def main() -> int:
    """The command line."""
    quiet_jax_without_accelerator()
    return cli.run("hparams", _command)


if __name__ == "__main__":
    sys.exit(main())
