"""Hooks of mkdocs.yml: pages that stand outside of docs/, and mathematics that needs no script.

A page's place on the site is its place in the repository, without "docs/". Links are written for the repository, where
people follow them too, and are moved here.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "results/predict.md",
    "results/report/*.md",
    "results/report/*.svg",
    "results/sweeps/*/heatmap*.png",
    "comfyui/ComfyUI-CogVideoX-TPU/README*.md",
    "comfyui/ComfyUI-CogVideoX-TPU/example_workflows/*.png",
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE_OR_MATH = re.compile(r"```.*?```|`[^`\n]+`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$]+?)\$", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the files of ELSEWHERE."""
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Move a page's links to the site's places and turn its TeX into MathML."""
    folder = os.path.relpath(Path(page.file.abs_src_path).parent, ROOT)

    def moved(match: re.Match[str]) -> str:
        target, hash_sign, anchor = match[1].partition("#")
        if not target or "://" in target:
            return match[0]
        place = posixpath.normpath(posixpath.join(folder, target)).removeprefix("docs/")
        return f"]({posixpath.relpath(place, posixpath.dirname(page.file.src_uri) or '.')}{hash_sign}{anchor})"

    def math(match: re.Match[str]) -> str:
        if match["block"]:
            return convert(match["block"], display="block")
        return convert(match["inline"]) if match["inline"] else match[0]

    return _CODE_OR_MATH.sub(math, _LINK.sub(moved, markdown))
