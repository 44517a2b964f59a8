"""Links, paths, modules and commands that the documentation names are there, and the site builds."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from commands import HYDRA_COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "comfyui/*/README*.md", "results/report/*.md", "results/*.md")
    for path in ROOT.glob(pattern)
)
TEXTS = [*PAGES, *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("configs/**/*.yaml"))]
#: Made by commands, or written down as examples.
NOT_HERE = ("demo/", "videos/", "shapes/", "build/", "results/generate.jsonl", "tokamax/", "ironwood/")

_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"(?<![\w/.$<>{-])((?:[\w.-]+/)+[\w.-]+\.(?:py|ya?ml|md|jsonl?|svg|png|webp|safetensors))\b")
_MODULE = re.compile(r"python -m ([a-z_]+(?:\.[a-z_0-9]+)*)")


def _text(page: str) -> str:
    return (ROOT / page).read_text()


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub and the site give to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in _LINK.findall(_FENCE.sub("", _text(page))):
        if "://" in link or link.startswith("mailto:"):
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        if not path.exists() or (anchor and anchor not in _anchors(path)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", TEXTS)
def test_paths_that_are_named_exist(page: str) -> None:
    named = {path for path in _PATH.findall(_LINK.sub("", _text(page))) if not path.startswith(NOT_HERE)}
    missing = [path for path in named if not any((folder / path).exists() for folder in (ROOT, (ROOT / page).parent))]
    assert not missing


@pytest.mark.parametrize("page", TEXTS)
def test_modules_that_are_run_exist(page: str) -> None:
    for module in set(_MODULE.findall(_text(page))) - {"pip", "venv"}:
        path = ROOT / module.replace(".", "/")
        is_ours = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert is_ours or importlib.util.find_spec(module.split(".")[0]) is not None, module


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", _text(page), re.MULTILINE)) <= targets


def test_files_of_the_folder_map_are_in_their_folders() -> None:
    for folder, about in re.findall(r"^\| `([\w/]+/)` \| (.*) \|$", _text("CONTRIBUTING.md"), re.MULTILINE):
        missing = [name for name in re.findall(r"`(\w+\.py)`", about) if not (ROOT / folder / name).exists()]
        assert (ROOT / folder).is_dir() and not missing, f"{folder}: {missing}"


def test_pictures_are_drawn_from_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make_pictures", ROOT / "docs/pictures/make.py")
    assert spec is not None and spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    monkeypatch.setattr(make, "PICTURES", tmp_path)
    for draw in (make.heat_map, make.plans, make.layer):
        draw()
    assert {path.name for path in tmp_path.iterdir()} == {"heatmap.png", "plans.png", "layer.png"}


def test_pictures_are_small() -> None:
    for path in (ROOT / "docs/pictures").iterdir():
        assert path.stat().st_size < 300_000, path.name


def test_the_site_builds_and_needs_no_network(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    html = "".join(path.read_text() for path in tmp_path.rglob("*.html"))
    assert "<math" in html
    assert not re.findall(r"<(?:script|img|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^>]*", html)


def test_the_page_of_commands_is_of_these_commands() -> None:
    spec = importlib.util.spec_from_file_location("make_commands", ROOT / "docs" / "make_commands.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {command.partition(":")[0] for command in module.COMMANDS} == set(HYDRA_COMMANDS)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "run make docs"
