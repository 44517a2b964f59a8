"""The folders of the packages, which may import which, and what they do import."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

#: A folder imports only from folders above its own line, and a package only from the packages named in PACKAGES.
FOLDERS = (
    "splash_attn",
    "splash_workbench",
    "splash_workbench.records",
    "splash_workbench.workers",
    "splash_workbench.engines",
    "splash_workbench.profiles",
    "offline_tpu.machine",
    "offline_tpu.hlo",
    "offline_tpu.schedule",
    "offline_tpu",
    "tuning.trials",
    "tuning.kernels",
    "tuning.backends",
    "tuning.search",
    "tuning.traces",
    "tuning.validate",
    "tuning.validate.fit",
    "tuning.compare",
    "tuning.report",
    "tuning.selfcheck",
    "tuning",
    "pipeline.requests",
    "pipeline.model.layers",
    "pipeline.model",
    "pipeline.model.vae",
    "pipeline.checkpoints",
    "pipeline.stages",
    "pipeline.runs",
    "pipeline.quality",
    "pipeline.calibrate",
    "pipeline.train_tiny",
    "pipeline.predict",
    "pipeline.tune",
    "pipeline",
)

PACKAGES: dict[str, set[str]] = {
    "splash_attn": set(),
    "splash_workbench": set(),
    "offline_tpu": {"splash_workbench"},
    "tuning": {"splash_attn", "splash_workbench", "offline_tpu"},
    "pipeline": {"splash_attn", "splash_workbench", "offline_tpu"},
}


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, those of functions and classes included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folder_of(module: str) -> str:
    """Return the folder of ours that a dotted name is in: the longest one that it starts with."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(name for name in names if name in FOLDERS)


def folder_files(folder: str) -> list[Path]:
    """Return the Python files of a folder, those of folders inside it not included."""
    return sorted((ROOT / folder.replace(".", "/")).glob("*.py"))


def imported_folders(folder: str) -> set[str]:
    """Return the other folders of ours that the files of a folder import from."""
    modules = {module for path in folder_files(folder) for module in imported_modules(path)}
    return {folder_of(module) for module in modules if module.partition(".")[0] in PACKAGES} - {folder}
