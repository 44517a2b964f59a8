"""Show what is on record: `python -m tuning.results workload=cogvideox_720p status=ok top=10 json=table.json`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import MISSING

from splash_workbench import cli
from splash_workbench.errors import UserError, from_config
from splash_workbench.trial_status import Status
from tuning.search.schemas import BackendSchema, DeviceSchema, WorkloadSchema
from tuning.trials import records, tables, workloads
from tuning.trials.records import Trial
from tuning.trials.workloads import Workload


@dataclasses.dataclass
class ResultsSchema:
    """Fields of configs/results.yaml."""

    results_dir: str = MISSING
    workload: WorkloadSchema | None = None
    device: DeviceSchema | None = None
    backend: BackendSchema | None = None
    shape: str | None = None
    kernel: str | None = None
    status: str | None = None
    top: int | None = None
    json: str | None = None


def select(trials: Sequence[Trial], workload: Workload | None = None, **wanted: str | None) -> list[Trial]:
    """Return the trials with the workload's shape and dtype and the wanted values, best first.

    Trials of one shape, dtype, device and backend stand together, whatever names their workloads have. Raises
    ValueError where no trial at all has a wanted value, with those there are.
    """
    every = trials
    if workload is not None:
        there = sorted({f"{trial.workload} ({trial.call} {trial.dtype})" for trial in trials})
        trials = [trial for trial in trials if (trial.shape, trial.dtype) == workload.identity]
        if not trials:
            name = f"workload={workload.name} ({workload.shape} {workload.dtype})"
            raise ValueError(f"{name}: on record are {', '.join(there)}.")
    for name, value in wanted.items():
        name = "call" if name == "shape" else name
        if value is None:
            continue
        there = list(Status) if name == "status" else sorted({str(getattr(trial, name)) for trial in every})
        if value not in there:
            raise ValueError(f"{'shape' if name == 'call' else name}={value!r}: on record are {', '.join(there)}.")
        trials = [trial for trial in trials if str(getattr(trial, name)) == value]
    by_name = sorted(trials, key=lambda trial: trial.workload, reverse=True)
    names = {(trial.call, trial.dtype): trial.workload for trial in by_name}  # of several the first
    groups: dict[tuple[str, ...], list[Trial]] = {}
    for trial in trials:
        group = (names[trial.call, trial.dtype], trial.call, trial.dtype, trial.device, trial.backend)
        groups.setdefault(group, []).append(trial)
    return [trial for _, members in sorted(groups.items()) for trial in records.ranked(members)]


@cli.command("results", ResultsSchema, unused=("device.*", "backend.*"))
def main(settings: ResultsSchema) -> int:
    """Run the command; return its exit code."""
    if settings.top is not None and settings.top < 1:
        raise UserError(f"top={settings.top}: expected at least 1, or null for all.")
    results_dir = Path(settings.results_dir)
    workload = settings.workload.frozen() if settings.workload else None
    wanted = {name: getattr(settings, name) for name in ("shape", "kernel", "status")}
    wanted |= {name: getattr(getattr(settings, name), "name", None) for name in ("device", "backend")}
    on_record = workloads.named_apart(from_config(lambda: records.read_all(results_dir)))
    if not on_record:
        raise UserError(
            f"results_dir={results_dir}: no trials there; expected the results_dir of a `python -m tuning.sweep`."
        )
    trials = from_config(lambda: select(on_record, workload, **wanted))
    trials = trials[: settings.top]
    print(tables.table(trials, limit=None, hide=("created_at", "dtype"), one_variant_column=True))
    cli.write_json(settings.json, {"trials": tables.rows(trials), "statuses": tables.status_counts(trials)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
