"""Every key of every command with a wrong value: one line, exit code 2, and no work before it."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from commands import HYDRA_COMMANDS, main_of

#: What a command does once its values are accepted.
WORK = (
    "splash_workbench.workers.pool:Runner.run",
    "pipeline.stages.text:open_module",
    "pipeline.checkpoints.placed:open_module",
    "pipeline.stages.vae:open_module",
    "pipeline.quality.pairs:variant_videos",
    "pipeline.train_tiny.__main__:optimize",
)
PATHS = re.compile(
    r"(results|videos|run|work|tuned|page)_dir|output(_dir)?|results_path|folder|dumps|logdir|json|validation"
)
#: Any text is right for them, or only the Hub can tell, or they are used only together with another key.
FREE = re.compile(r"prompt|negative_prompt|revision|profile_run|(workload|space)\.name|cache_dir")
#: Where the kind of key does not say it: keys that take a negative number, keys that need others beside them.
VALUES = {
    "seed": "many",
    "guidance_scale": "nan",
    "budget.psnr_db": "high",
    "kernel": "nope",
    "logdir": "/dev/null/x profile=true",
    "validation": "/dev/null",
}


def wrong_value(key: str, kind: Any) -> str:
    """Return the value that is the hardest to refuse: of the right type, where that is possible."""
    kinds = get_args(kind) or (kind,)
    if key in VALUES:
        return VALUES[key]
    if bool in kinds:
        return "perhaps"
    if int in kinds or float in kinds:
        return "-1"
    if PATHS.fullmatch(key):
        return "/dev/null/x"
    return "{nope}" if key == "name" else "nope"


def cases() -> Iterator[Any]:
    """Return every command with every key; a key that one before has alike is a slow test."""
    seen = set()
    for module in HYDRA_COMMANDS:
        for key, kind in main_of(module).keys.items():  # type: ignore[attr-defined]
            if not FREE.fullmatch(key):
                marks = [pytest.mark.slow("1 s")] if (key, kind) in seen else []
                seen.add((key, kind))
                yield pytest.param(module, f"{key}={wrong_value(key, kind)}", marks=marks)


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def begin(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.chdir(tmp_path)
    for target in WORK:
        module, _, name = target.partition(":")
        owner: Any = importlib.import_module(module)
        for part in name.split(".")[:-1]:
            owner = getattr(owner, part)
        monkeypatch.setattr(owner, name.split(".")[-1], begin)


def test_a_key_of_a_group_that_is_not_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "workload.num_heads=24"])
    assert main_of("tuning.results")() == 2
    assert capsys.readouterr().err == "error: workload.num_heads=24: expected workload=name beside it\n"


@pytest.mark.parametrize(
    ("module", "argument", "expected"),
    [
        ("tuning.choose", "device=null", "device=null: expected device=name, with a name of configs/device/"),
        ("tuning.choose", "device=[v6e,v5e]", "device=[v6e,v5e]: expected device=name"),
        ("tuning.sweep", "search=null", "search=null: expected search=name"),
        ("tuning.sweep", "search.storage=", "storage='': expected a path, or null"),
    ],
)
def test_a_group_is_a_name_and_a_storage_is_told(
    module: str, argument: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", argument])
    assert main_of(module)() == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1


def test_a_group_that_is_null_by_default_may_be_given_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for arguments in ([], ["workload=null", "device=null"]):
        monkeypatch.setattr(sys, "argv", ["command", "results_dir=none", *arguments])
        said.append((main_of("tuning.results")(), capsys.readouterr()))
    assert said[0] == said[1]


@pytest.mark.compile
@pytest.mark.parametrize(("module", "arguments"), list(cases()))
def test_a_wrong_value_is_one_line(
    module: str, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *arguments.split(" ")])
    assert main_of(module)() == 2
    assert re.fullmatch(r"error: .+\n", capsys.readouterr().err)
