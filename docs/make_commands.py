"""Writes docs/commands.md, every command with its keys and their defaults: `python docs/make_commands.py`."""

import contextlib
import dataclasses
import importlib
import io
import json
import sys
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

PAGE = Path(__file__).with_name("commands.md")
COMMANDS = (
    *(
        "tuning.sweep",
        "tuning.sweep:kernel_main",
        "tuning.choose",
        "tuning.results",
        "tuning.report",
        "tuning.peers",
        "tuning.validate",
    ),
    *(
        "tuning.hparams",
        "tuning.selfcheck",
        "pipeline.generate",
        "pipeline.predict",
        "pipeline.tune",
        "pipeline.quality",
        "pipeline.calibrate",
        "pipeline.quantize",
        "pipeline.train_tiny",
    ),
)
#: Of entry points that one command has beside `main`.
_TITLES = {"tuning.sweep:kernel_main": "tuning.sweep kernel=FILE.py:CLASS"}
_LONGEST = 80  # characters of a default that are shown
_INTRODUCTION = """# Commands

Each is `python -m NAME key=value ...`, and `--help` says what the keys mean. A key that there is not, or a value that
cannot be, ends in one line and exit code 2 before any work; `+key=`, `++key=` and `~key` are refused. A group is chosen
as `group=name`, from `configs/` or a folder of your own given with `--config-dir`; `--multirun` runs once for each
value of `key=a,b`. This page is made by `python docs/make_commands.py`.
"""


def main_of(module: str) -> Any:
    """Return the entry point of a command."""
    name, _, entry = module.partition(":")
    found = importlib.import_module(name)
    return getattr(found if hasattr(found, "main") else importlib.import_module(f"{name}.__main__"), entry or "main")


def defaults_of(module: str) -> DictConfig:
    """Return the configuration of a command without arguments."""
    argv, sys.argv = sys.argv, [module, "--cfg", "job", "--resolve"]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main_of(module)() == 0
    finally:
        sys.argv = argv
    return OmegaConf.create(out.getvalue())  # type: ignore[return-value]


def page() -> str:
    """Return the page."""
    return _INTRODUCTION + "".join(map(_section, COMMANDS))


def _section(module: str) -> str:
    keys, defaults = main_of(module).keys, defaults_of(module)
    title = _TITLES.get(module, module)
    lines = [f"\n## {title}\n", "| key | type | default |", "|---|---|---|"]
    for key, kind in keys.items():
        if not dataclasses.is_dataclass(kind) or OmegaConf.select(defaults, key) is None:
            default = json.dumps(OmegaConf.to_container(OmegaConf.create([OmegaConf.select(defaults, key)]))[0])
            shown = default if len(default) <= _LONGEST else f"{default[:_LONGEST]} ..."
            lines.append(f"| `{key}` | {_type_name(kind)} | `{shown}` |")
    return "\n".join(lines) + "\n"


def _type_name(kind: Any) -> str:
    if dataclasses.is_dataclass(kind):
        return "group"
    kinds = [kind] if get_origin(kind) in (None, list, dict) else get_args(kind)
    return " or ".join((get_origin(part) or part).__name__ for part in kinds if part is not NoneType)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
