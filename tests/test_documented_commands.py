"""Every command line that a page or a help text shows is one that its command takes."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import HYDRA_COMMANDS, main_of
from splash_workbench.provenance import REPO_ROOT
from tuning import sweep

_PAGES = ("*.md", "docs/*.md", "configs/*.yaml", "deploy/*", "comfyui/*/*.md")
#: A quoted text, a list, a dict, or what has neither space nor quote.
_VALUE = r"""(?:"[^"\n]*"|'[^'\n]*'|\[[^\]\n]*\]|\{[^}\n]*\}|[^\s`"'\[{])*"""
_COMMAND = re.compile(rf"python3? -m ((?:tuning|pipeline)[\w.]*)((?: +[\w./+-]+={_VALUE})+)")
_SENTENCE_END = ".,;:)"


def _shown() -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (module, arguments) of every command that is shown with arguments."""
    for path in (path for pattern in _PAGES for path in sorted(REPO_ROOT.glob(pattern)) if path.is_file()):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ").replace("$$", "$")
        for module, arguments in _COMMAND.findall(text):
            if module in HYDRA_COMMANDS:
                yield module, tuple(argument.rstrip(_SENTENCE_END) for argument in shlex.split(arguments))


def _together() -> list[tuple[str, dict[str, str]]]:
    """Return as few sets of arguments as hold all commands, none with a key twice: Hydra takes its time for each."""
    packs: list[tuple[str, dict[str, str]]] = []
    for module, arguments in sorted(set(_shown())):
        keys = {argument.partition("=")[0]: argument for argument in arguments}
        entry = f"{module}:kernel_main" if "kernel" in keys else module
        for other, pack in packs:
            if other == entry and all(pack.get(key, argument) == argument for key, argument in keys.items()):
                pack |= keys
                break
        else:
            packs.append((entry, keys))
    return packs


def test_commands_are_found() -> None:
    assert len(set(_shown())) > 80
    assert {module for module, _ in _shown()} >= {"tuning.sweep", "pipeline.generate", "pipeline.predict"}


@pytest.mark.compile
@pytest.mark.parametrize(("entry", "pack"), _together())
def test_they_are_taken(
    entry: str,
    pack: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    main = sweep.kernel_main if entry.endswith(":kernel_main") else main_of(entry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [entry, *pack.values(), "--cfg", "job"])
    assert (main(), capsys.readouterr().err) == (0, ""), list(pack.values())
