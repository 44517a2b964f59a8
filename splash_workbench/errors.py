"""Defines errors that the user can put right."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
#: Exit codes of commands. Those of a signal are as a shell has them: 128 + its number.
EXIT_USER_ERROR, EXIT_SIGNAL, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 2, 128, 130, 141


class UserError(Exception):
    """Something that the user can put right: a command shows each of its messages as one line, without a traceback."""

    def __init__(self, *messages: str) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages


def from_config(make: Callable[[], T]) -> T:
    """Build a frozen type from configuration. What the type refuses is raised as UserError."""
    try:
        return make()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(str(error)) from error


class TornLineWarning(UserWarning):
    """A line of a file of records that a crash tore was skipped."""


#: What the code of a user may raise that ends only what called it: `sys.exit`, too.
OF_USERS_CODE = (Exception, SystemExit)


def innermost_line(error: BaseException, is_wanted: Callable[[str], bool]) -> str | None:
    """Return "NAME:LINE" of the innermost line that an error passed through in a file whose path is wanted."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if is_wanted(frame.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else None


def line_of(error: BaseException, path: Path) -> str:
    """Return "NAME:LINE" of the innermost line of a file that an error passed through; without one, its name."""
    return innermost_line(error, lambda filename: filename == str(path)) or path.name
