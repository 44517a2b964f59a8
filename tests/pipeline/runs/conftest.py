"""Runs of one small request, in one process."""

import shutil
from pathlib import Path

import pytest

from pipeline.runs.request_run import RequestRun, generate


@pytest.fixture(scope="package")
def finished(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """Return the folder and the results of one complete run."""
    from pipeline.requests.request import GenerateRequest

    folder = tmp_path_factory.mktemp("runs")
    request = GenerateRequest(
        "a cat", str(tiny_folder), height=48, width=80, num_frames=9, num_inference_steps=2, seed=7
    )
    generate(request, run_dir=folder / "run", results_path=folder / "results.jsonl")
    return folder / "run", folder / "results.jsonl"


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """Return a copy of that folder, to change."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def same(request_of):
    """Make the request of `finished`, with changes."""
    return lambda **changes: request_of(**{"prompt": "a cat", "num_inference_steps": 2, **changes})


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Collect the names of the stages that are really run."""
    names: list[str] = []
    original = RequestRun._compute

    def compute(self, stage, *args):
        names.append(stage)
        return original(self, stage, *args)

    monkeypatch.setattr(RequestRun, "_compute", compute)
    return names
