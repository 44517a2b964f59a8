"""Lets Ctrl-C end a command while it is still importing what it needs, without a traceback."""

import os
import signal
import sys
from types import FrameType

from splash_workbench.errors import EXIT_INTERRUPTED


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it, where it does what Ctrl-C does; only the exit code tells them apart."""

    signal_number = signal.SIGTERM


def quit_on_interrupt() -> None:
    """Make Ctrl-C end the process at once, where a package is imported for `python -m`, until `interrupts_raise`."""
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def interrupts_raise() -> None:
    """Make Ctrl-C raise KeyboardInterrupt, where `quit_on_interrupt` had changed that."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def sigterm_raises() -> None:
    """Make SIGTERM raise Terminated, so that workers end and what is done is kept."""
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    raise Terminated


def _quit(signal_number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
