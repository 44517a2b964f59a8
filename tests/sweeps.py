"""Sweeps whose candidates are functions of fake_jobs.py."""

import dataclasses
from pathlib import Path

from tuning.search.settings import SweepSettings


def with_job(name: str, settings: SweepSettings) -> SweepSettings:
    """Return the settings with a backend whose workers run that function of fake_jobs.py."""
    return dataclasses.replace(settings, backend=dataclasses.replace(settings.backend, job=f"fake_jobs:{name}"))


def quiet(line: str) -> None:
    """Say nothing: a sweep's `report`."""
    del line


def job_count(log: Path) -> int:
    """Return how many jobs are in FAKE_JOBS_LOG."""
    return len(log.read_text().splitlines()) if log.exists() else 0
