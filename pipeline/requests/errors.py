"""Errors that the user can put right. The command line shows them as one line; anything else is a bug."""


class PipelineError(Exception):
    """Base of the errors whose message is enough for the user: what was given, what was expected, what to do."""


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
