"""An installed wheel does what a checkout does, from any folder."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import offline_tpu
from offline_tpu import libtpu
from splash_workbench.provenance import KERNEL_SOURCES, REPO_ROOT, source_hash

PACKAGES = ("splash_attn", "splash_workbench", "offline_tpu", "tuning", "pipeline")
WORKLOAD = "name: mine\nbatch_size: 1\nnum_heads: 1\nq_seq_len: 509\nkv_seq_len: 509\nhead_dim: 64\ndtype: float32\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build it from a copy: setuptools leaves files of its own."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "configs"):
        shutil.copytree(REPO_ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO_ROOT / name, folder)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=folder, capture_output=True, text=True, check=True)
    return folder / done.stdout.splitlines()[-1]


def test_it_holds_every_file_that_is_read(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name.removeprefix("splash_workbench/configs/") for name in archive.namelist()}
    configs = REPO_ROOT / "configs"
    assert {path.relative_to(configs).as_posix() for path in configs.rglob("*.yaml")} <= names
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=REPO_ROOT, capture_output=True, text=True, check=True)
    assert set(tracked.stdout.split()) - {"splash_workbench/configs"} <= names


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install it where the packages that it needs are found, and no checkout is."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(command, check=True)
    # As a mere folder of sys.path: the .pth files in it, an editable install's among them, are not read.
    (site_packages(python) / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def site_packages(python: Path) -> Path:
    (found,) = python.parents[1].glob("lib/python*/site-packages")
    return found


def digests(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow("3 min")
def test_its_commands_run_in_an_empty_folder_of_another_repository(python: Path, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-C", str(python.parents[1])]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "theirs"], check=True)
    (tmp_path / "shapes" / "workload").mkdir(parents=True)
    (tmp_path / "shapes" / "workload" / "mine.yaml").write_text(WORKLOAD)
    before = digests(site_packages(python))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "COGVIDEOX_SPLASH_CACHE": str(tmp_path / "cache")}

    def run(*arguments: str) -> str:
        command = [str(python), "-m", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    own = ("--config-dir", "shapes", "workload=mine")
    run("tuning.sweep", *own, "backend=interpret", "space=tiny", "search.max_trials=1", "workers=1")
    (path,) = tmp_path.glob("results/sweeps/mine-*/trials.jsonl")
    trial = json.loads(path.read_text())
    assert (trial["status"], trial["environment"]["git_commit"]) == ("ok", None)
    assert trial["environment"]["kernel_hash"] == source_hash(KERNEL_SOURCES)
    assert "509" in run("tuning.choose", *own)
    both = run("tuning.choose", "--multirun", "workload=tiny,wan_720p")
    assert sum(line.startswith("shape:") for line in both.splitlines()) == 2
    assert "mine" in run("tuning.results")
    run("tuning.report")
    steps = ("num_inference_steps=2", "num_frames=9")
    assert "video:" in run("pipeline.generate", "prompt=a red circle moves right", *steps)
    (path,) = tmp_path.glob("results/generate.jsonl")
    assert json.loads(path.read_text())["environment"]["git_commit"] is None
    for command in ("pipeline.predict", "tuning.compare", "tuning.validate", "offline_tpu"):
        assert f"python -m {command}" in run(command, "--help")
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", "results", "videos", "cache"}
    assert digests(site_packages(python)) == before


def test_the_versions_that_make_installs_are_accepted_and_known() -> None:
    """constraints.txt within the ranges of pyproject.toml, and those of the offline model."""
    pinned = [Requirement(line) for line in (REPO_ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    versions = {requirement.name: str(requirement.specifier).removeprefix("==") for requirement in pinned}
    project = tomllib.loads((REPO_ROOT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["offline"]]
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(versions[requirement.name]), requirement
    assert versions["libtpu"] == offline_tpu.SUPPORTED_LIBTPU
    assert versions["jaxlib"] == libtpu.SUPPORTED_JAXLIB
