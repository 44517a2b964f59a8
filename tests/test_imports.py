"""The direction of imports, between packages and between the folders inside them."""

import subprocess
import sys
from pathlib import Path

import pytest

import architecture
from folders import FOLDERS, PACKAGES, ROOT, folder_files, folder_of, imported_modules

_TORCH = {"torch", "torchax", "diffusers", "transformers"}
FOREIGN = {
    "splash_attn": _TORCH | {"hydra", "omegaconf", "optuna", "pandas"},
    "splash_workbench": _TORCH | {"optuna", "pandas"},
    "offline_tpu": _TORCH | {"hydra", "omegaconf", "optuna", "pandas"},
    "tuning": _TORCH,
}

#: More files than this in one folder, and nobody finds anything.
MAX_FILES = 13


def test_every_folder_has_its_line() -> None:
    found = {
        path.parent.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert {name.replace("/", ".") for name in found} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    package, rank = folder.partition(".")[0], FOLDERS.index(folder)
    files = folder_files(folder)
    assert files
    for path in files:
        for module in imported_modules(path):
            top = module.partition(".")[0]
            assert top not in FOREIGN.get(package, set()) | {"comfyui", "tests"}, (path, module)
            if top in PACKAGES:
                assert top == package or top in PACKAGES[package], (path, module)
                assert FOLDERS.index(folder_of(module)) <= rank, (path, module)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_can_be_looked_over(folder: str) -> None:
    assert len(folder_files(folder)) <= MAX_FILES


def test_pytest_alone_finds_the_packages() -> None:
    """Not only `python -m pytest`, which puts the current folder first."""
    command = [
        Path(sys.executable).with_name("pytest"),
        "--collect-only",
        "-q",
        "-n",
        "0",
        "tests/splash_attn/test_types.py",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_picture_is_of_these_imports() -> None:
    assert architecture.PICTURE.read_text() == architecture.svg(), (
        "run `make pictures`, or python tests/architecture.py"
    )
