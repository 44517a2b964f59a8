"""Show what is on record: `python -m tuning.results workload=cogvideox_720p status=ok top=10 json=table.json`."""

import dataclasses
import sys
from pathlib import Path

from omegaconf import MISSING

from splash_workbench import cli
from splash_workbench.errors import from_config
from splash_workbench.status import Status
from tuning.search.schemas import BackendSchema, DeviceSchema, WorkloadSchema
from tuning.trials import records, tables
from tuning.trials.records import Trial, objective


@dataclasses.dataclass
class ResultsSchema:
    """Fields of configs/results.yaml."""

    results_dir: str = MISSING
    workload: WorkloadSchema | None = None
    device: DeviceSchema | None = None
    backend: BackendSchema | None = None
    kernel: str | None = None
    status: str | None = None
    top: int | None = None
    json: str | None = None


def select(trials: list[Trial], **wanted: str | None) -> list[Trial]:
    """The trials whose fields are as wanted, best first within each workload, device and backend.

    Raises:
      ValueError: no trial at all has a wanted value; the message lists those there are.
    """
    for name, value in wanted.items():
        if value is None:
            continue
        there = list(Status) if name == "status" else sorted({getattr(trial, name) for trial in trials})
        if value not in there:
            raise ValueError(f"{name}={value!r}: on record are {', '.join(there) or 'no trials at all'}.")
        trials = [trial for trial in trials if getattr(trial, name) == value]
    return sorted(trials, key=lambda t: (t.workload, t.device, t.backend, t.status is not Status.OK, objective(t)))


@cli.command("results", ResultsSchema)
def main(settings: ResultsSchema) -> int:
    """Run the command; return its exit code."""
    results_dir = Path(settings.results_dir)
    groups = {"workload": settings.workload, "device": settings.device, "backend": settings.backend}
    wanted = {name: group.name if group else None for name, group in groups.items()}
    wanted |= {"kernel": settings.kernel, "status": settings.status}
    trials = from_config(lambda: select(records.read_all(results_dir), **wanted))
    if settings.top is not None:
        trials = trials[: settings.top]
    print(tables.table(trials, limit=None, hide=("record_id", "created_at", "dtype"), one_variant_column=True))
    cli.write_json(settings.json, {"trials": tables.rows(trials), "statuses": tables.status_counts(trials)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
