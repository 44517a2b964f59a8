"""Lets Ctrl-C end a command while it is still importing what it needs, without a traceback."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
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


@contextlib.contextmanager
def sigterm_raises() -> Iterator[None]:
    """Make SIGTERM raise Terminated in the block: workers end, temporary files go, and what is done is kept.

    As Ctrl-C, it waits for a call outside Python, such as a compilation here, to end. A second one does not disturb the
    cleaning up. Where it has another handler, or none can be set outside the main thread, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, _terminate)
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def sigterm_ends() -> Iterator[None]:
    """Let SIGTERM end the process in the block, where `sigterm_raises` had changed that.

    For calls that wait long outside Python, where nothing can be raised, and while there is nothing to clean up.
    """
    if signal.getsignal(signal.SIGTERM) is not _terminate:
        yield
        return
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        yield
    finally:
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _quit(signal_number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(EXIT_INTERRUPTED)
