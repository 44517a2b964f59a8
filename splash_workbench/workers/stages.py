"""Let a job say which stage it is in: `enter("compile")`. Outside of a worker nobody listens."""

from collections.abc import Callable

_listeners: list[Callable[[str], None]] = []


def enter(stage: str) -> None:
    """Say that the job that runs here begins a stage, in a word or two."""
    for listener in _listeners:
        listener(stage)


def listen(listener: Callable[[str], None]) -> None:
    """Hand every later stage of this process to a function."""
    _listeners.append(listener)
