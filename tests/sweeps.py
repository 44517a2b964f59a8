"""Sweeps whose candidates are functions of fake_jobs.py."""

import dataclasses
from pathlib import Path
from typing import Any

from tuning.search.kernel_settings import KernelSweepSchema
from tuning.search.schemas import BackendSchema, DeviceSchema
from tuning.search.settings import SweepSettings
from tuning.search.study import SearchSettings


def with_job(name: str, settings: SweepSettings) -> SweepSettings:
    """Return the settings with a backend whose workers run that function of fake_jobs.py."""
    return dataclasses.replace(settings, backend=dataclasses.replace(settings.backend, job=f"fake_jobs:{name}"))


def quiet(line: str) -> None:
    """Say nothing: a sweep's `report`."""
    del line


def job_count(log: Path) -> int:
    """Return how many jobs are in FAKE_JOBS_LOG."""
    return len(log.read_text().splitlines()) if log.exists() else 0


def user_config(
    device: str = "v6e",
    backend: str = "interpret",
    measure: dict[str, Any] | None = None,
    max_trials: int | None = None,
    **changes: Any,
) -> KernelSweepSchema:
    """Return a configuration of `kernel_settings`: a grid in interpret mode, unless told otherwise."""
    settings: dict[str, Any] = {
        "device": DeviceSchema(device),
        "backend": BackendSchema(backend, measure or {}),
        "search": SearchSettings("grid", max_trials, 0),
        "workers": 1,
        "timeout_s": 1800.0,
        "results_dir": "results",
        "reuse": False,
        "promote": False,
        "quick": True,
        "progress": False,
    }
    return KernelSweepSchema(**settings | changes)
