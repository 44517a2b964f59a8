"""How a trial ends and how its time was got. Apart from the records, so that a worker starts without JAX."""

import enum


class Status(enum.StrEnum):
    """How a trial ended. Only OK may carry a time."""

    OK = "ok"
    WRONG = "wrong"
    OUT_OF_MEMORY = "out_of_memory"
    COMPILE_ERROR = "compile_error"
    TIMEOUT = "timeout"
    CRASHED = "crashed"


class Label(enum.StrEnum):
    """How a time was got. Times of different labels are never put in one column."""

    MEASURED = "measured"
    PREDICTED = "predicted"
    REPORTED = "reported"


class TrialError(Exception):
    """Raised by a worker's job for a candidate that fails in a known way."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def compile_error(error: Exception) -> TrialError:
    """What a compiler's refusal is to a trial. The one place that reads an error's text: XLA tells no other way."""
    text = str(error)
    out_of_memory = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text
    return TrialError(Status.OUT_OF_MEMORY if out_of_memory else Status.COMPILE_ERROR, text)
