"""Shared by all tests."""

import os
from pathlib import Path

# Before anything imports JAX: these tests need no accelerator, and libtpu would complain that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from splash_workbench.provenance import CACHE_VARIABLE, REPO_ROOT


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, instead of the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


@pytest.fixture(autouse=True)
def fake_jobs_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find tests/fake_jobs.py as module `fake_jobs`."""
    here = str(REPO_ROOT / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
