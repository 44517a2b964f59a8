"""Defines errors that the user can put right."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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
