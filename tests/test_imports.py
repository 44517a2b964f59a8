"""The direction of imports, between packages and between the folders inside them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: A folder imports only from folders above its own line, and a package only from the packages named in PACKAGES.
FOLDERS = [
    "splash_attn",
    "splash_workbench",
    "splash_workbench.records",
    "splash_workbench.workers",
    "splash_workbench.profiles",
    "offline_tpu.machine",
    "offline_tpu.hlo",
    "offline_tpu.schedule",
    "offline_tpu",
    "tuning.trials",
    "tuning.backends",
    "tuning.search",
    "tuning.traces",
    "tuning.validate",
    "tuning.compare",
    "tuning.report",
    "tuning",
    "pipeline.requests",
    "pipeline.model",
    "pipeline.checkpoints",
    "pipeline.stages",
    "pipeline.runs",
    "pipeline.quality",
    "pipeline.train_tiny",
    "pipeline.predict",
    "pipeline",
]

PACKAGES: dict[str, set[str]] = {
    "splash_attn": set(),
    "splash_workbench": set(),
    "offline_tpu": {"splash_workbench"},
    "tuning": {"splash_attn", "splash_workbench", "offline_tpu"},
    "pipeline": {"splash_attn", "splash_workbench", "offline_tpu"},
}

_TORCH = {"torch", "torchax", "diffusers", "transformers"}
FOREIGN = {
    "splash_attn": _TORCH | {"hydra", "omegaconf", "optuna", "pandas"},
    "splash_workbench": _TORCH | {"optuna", "pandas"},
    "offline_tpu": _TORCH | {"hydra", "omegaconf", "optuna", "pandas"},
    "tuning": _TORCH,
}

#: More files than this in one folder, and nobody finds anything.
MAX_FILES = 13


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(module: str) -> str:
    """The folder of ours that a dotted name is in: the longest one that it starts with."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(name for name in names if name in FOLDERS)


def folder_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder.replace(".", "/")).glob("*.py"))


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
