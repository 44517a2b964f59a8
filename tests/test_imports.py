"""The direction of imports: splash_attn <- tuning <- pipeline <- comfyui."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "splash_attn": {"tuning", "pipeline", "comfyui", "torch", "torchax", "hydra", "omegaconf", "optuna", "pandas"},
    "tuning": {"pipeline", "comfyui", "torch", "torchax", "diffusers", "transformers"},
    "pipeline": {"comfyui"},
}


def imported_packages(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & FORBIDDEN[package], path
