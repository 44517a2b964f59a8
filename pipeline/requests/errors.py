"""Errors of the pipeline that the user can put right."""

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
