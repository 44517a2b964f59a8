"""What an interrupt or SIGTERM leaves, and what it is said to leave."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

from splash_workbench import cli
from splash_workbench.startup import sigterm_ends


@dataclasses.dataclass
class Schema:
    """As configs/results.yaml has it, and a key that some commands have."""

    results_dir: str = ""
    top: int | None = None
    workload: Any = None
    shape: str | None = None
    device: Any = None
    backend: Any = None
    kernel: str | None = None
    status: str | None = None
    json: str | None = None
    reuse: bool = True
    page_dir: str | None = None
    work_dir: Any = dataclasses.field(default_factory=dict)  # of that name, and something else


def ending(function: Callable[[Schema], int], monkeypatch, *arguments: str, **options: Any) -> int:
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    return cli.command("results", Schema, **options)(function)()


@pytest.mark.parametrize(
    ("arguments", "options", "said"),
    [
        ((), {}, "the same command goes on from what is finished"),
        (("reuse=false",), {}, "the same command begins anew"),
        ((), {"unused": ("reuse",)}, "the same command begins anew"),
        (("top=3",), {"goes_on": lambda settings: settings.top == 3}, "the same command goes on from what is finished"),
        (("reuse=false", "page_dir=x"), {}, "the same command goes on from what is finished"),
        (("top=4",), {"goes_on": lambda settings: settings.top == 3}, "the same command begins anew"),
        ((), {"unused": ("reuse",), "interrupted": "nothing was written"}, "nothing was written"),
    ],
)
def test_an_interrupt_promises_only_what_is_kept(arguments, options, said, monkeypatch, capsys):
    def function(settings: Schema) -> int:
        raise KeyboardInterrupt

    assert ending(function, monkeypatch, *arguments, **options) == 130
    assert capsys.readouterr().err == f"interrupted; {said}\n"


def test_sigterm_ends_what_waits_outside_python(monkeypatch):
    found = []

    def function(settings: Schema) -> int:
        for block in (contextlib.nullcontext(), sigterm_ends(), contextlib.nullcontext()):
            with block:
                found.append(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
        return 0

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert ending(function, monkeypatch) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found == [False, True, False]


def test_sigterm_lets_a_command_remove_its_temporary_files(monkeypatch, capsys):
    left = [True]

    def function(settings: Schema) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("went on")
        finally:
            left.clear()

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Ray, in another test, sets its own
    try:
        assert ending(function, monkeypatch, unused=("reuse",)) == 143
        assert left == [] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == "interrupted; the same command begins anew\n"
