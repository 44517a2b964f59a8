"""Signals while stages run."""

import os
import signal

import pytest

from pipeline.stages.progress import StageEvent
from pipeline.terminal import Interrupted, Terminal


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_step_is_finished_first(number, capsys):
    progress = Terminal()
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as caught, progress.handling_signals():
        progress(StageEvent("denoise", "run", 2, 5, 1.0))
        _send(number)
        assert "stopping after this step; once more to stop at once" in capsys.readouterr().err
        progress(StageEvent("denoise", "run", 3, 5, 1.0))
    assert caught.value.signal_number == number
    assert progress.where == "in denoise after step 3 of 5"
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("event", "where"),
    [
        (None, "before the first stage"),
        (StageEvent("denoise", "compile"), "in denoise"),
        (StageEvent("vae", "load"), "in vae"),
    ],
)
def test_elsewhere_it_ends_at_once(event, where):
    progress = Terminal()
    with progress.handling_signals():
        if event is not None:
            progress(event)
        with pytest.raises(Interrupted):
            _send(signal.SIGTERM)
    assert progress.where == where


def test_the_second_signal_does_not_wait():
    progress = Terminal()
    with progress.handling_signals():
        progress(StageEvent("text", "run", 0, 1))
        _send(signal.SIGINT)
        with pytest.raises(Interrupted):
            _send(signal.SIGINT)
    assert progress.where == "in text"


def test_a_signal_while_the_last_output_is_saved_lets_it_be_saved():
    progress = Terminal()
    with progress.handling_signals():
        progress(StageEvent("vae", "run", 2, 2, 1.0))
        _send(signal.SIGTERM)
    # and in a batch, the next stage does not begin
    with pytest.raises(Interrupted):
        progress(StageEvent("denoise", "load"))
