"""Show what is on record: `python -m tuning.results workload=cogvideox_720p status=ok top=10 json=table.json`."""

import dataclasses
import sys
from pathlib import Path

from omegaconf import MISSING, DictConfig

from splash_workbench import cli
from splash_workbench.accelerator import quiet_jax_without_accelerator
from splash_workbench.status import Status
from tuning.trials import records, tables
from tuning.trials.records import Trial, objective


@dataclasses.dataclass
class ResultsSchema:
    """Fields of configs/results.yaml."""

    results_dir: str = MISSING
    workload: cli.WorkloadSchema | None = None
    device: cli.DeviceSchema | None = None
    backend: cli.BackendSchema | None = None
    kernel: str | None = None
    status: str | None = None
    top: int | None = None
    json: str | None = None


cli.store_schema("results_schema", ResultsSchema)


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


def _command(config: DictConfig) -> int:
    results_dir = Path(config.results_dir)
    wanted = {name: config[name] for name in ("kernel", "status")}
    wanted |= {name: config[name].name if config[name] else None for name in ("workload", "device", "backend")}
    trials = cli.from_config(lambda: select(records.read_all(results_dir), **wanted))
    if config.top is not None:
        trials = trials[: config.top]
    print(tables.table(trials, limit=None, hide=("record_id", "created_at", "dtype"), one_variant_column=True))
    cli.write_json(config.json, {"trials": tables.rows(trials), "statuses": tables.status_counts(trials)})
    return 0


def main() -> int:
    """The command line."""
    quiet_jax_without_accelerator()
    return cli.run("results", _command)


if __name__ == "__main__":
    sys.exit(main())
