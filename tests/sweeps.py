"""Sweeps whose candidates are functions of fake_jobs.py."""

import dataclasses
from pathlib import Path
from typing import Any

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


def user_defaults(**changes: Any) -> dict[str, Any]:
    """Return arguments of `kernel_settings`: a grid in interpret mode, unless told otherwise."""
    settings: dict[str, Any] = {
        "space": {},
        "device": "v6e",
        "backend": "interpret",
        "measure": {},
        "search": SearchSettings("grid", changes.pop("max_trials", None), 0),
        "compiler_options": {},
        "workers": 1,
        "engine": None,
        "timeout_s": 1800.0,
        "results_dir": Path("results"),
        "tuned_path": None,
        "heatmap": None,
        "reuse": False,
        "promote": False,
        "quick": True,
        "progress": False,
    }
    return settings | changes
