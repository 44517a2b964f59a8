"""Errors of the pipeline that the user can put right, and checks of values that raise them. Imports no JAX."""

from typing import Any, get_args

from splash_workbench.errors import UserError


class PipelineError(UserError):
    """Base of the pipeline's errors: the message says what was given, what was expected, and what to do."""


class RequestError(PipelineError, ValueError):
    """The request itself is not valid."""


class CheckpointError(PipelineError, ValueError):
    """The checkpoint is missing, incomplete, unreadable, or not of a kind that is loaded here."""


class StageOutputError(PipelineError, ValueError):
    """A stage's saved output is missing, unreadable, or was made for another request."""


class NonFiniteError(PipelineError, ArithmeticError):
    """A stage produced NaN or infinity."""


class DeviceMemoryError(PipelineError, MemoryError):
    """A stage did not fit into the devices' memory."""


def require(condition: bool, message: str) -> None:
    """Raise RequestError with the message unless the condition holds."""
    if not condition:
        raise RequestError(message)


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raise RequestError unless the value is one of a Literal's."""
    allowed = get_args(choices)
    require(value in allowed, f"{name}={value!r}: expected one of {', '.join(map(str, allowed))}")


def require_number(name: str, value: Any, low: int, high: int, kind: Any = int, optional: bool = False) -> None:
    """Raise RequestError unless the value is a number of this kind from low to high; optional: or None."""
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    expected = f"a {'whole ' if kind is int else ''}number from {low} to {high}{', or null' if optional else ''}"
    is_right = (optional and value is None) or (is_number and low <= value <= high)
    require(is_right, f"{name}={value!r}: expected {expected}")
