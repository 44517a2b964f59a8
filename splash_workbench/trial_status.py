"""Defines how a trial ends and how its time was got. Apart from the records, so that a worker starts without JAX."""

import enum
import errno
import json
import os
import re

#: In the text of an error of XLA that is about this machine or this moment, not about the program.
_MACHINE_TROUBLE = (
    *map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE)),
    *("UNAVAILABLE:", "DEADLINE_EXCEEDED:", "CANCELLED:", "ABORTED:", "UNAUTHENTICATED:", "PERMISSION_DENIED:"),
)
#: What does not fit, which libtpu says behind the whole text of the op.
_SCOPED_VMEM = re.compile(
    r"Scoped allocation with size \S+ and limit \S+ exceeded scoped vmem limit by [0-9.]+[A-Za-z]*"
)


class Status(enum.StrEnum):
    """How a trial ended. Only OK may carry a time."""

    OK = "ok"
    WRONG = "wrong"
    OUT_OF_MEMORY = "out_of_memory"
    COMPILE_ERROR = "compile_error"
    TIMEOUT = "timeout"
    CRASHED = "crashed"

    @property
    def conclusive(self) -> bool:
        """Return whether the same candidate would end so again; a crash or a time limit may be the machine's fault."""
        return self not in (Status.TIMEOUT, Status.CRASHED)


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


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out. The one place that reads an error's text: XLA tells no other way."""
    text = str(error)  # which of a full disk has the same status
    return isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in text and os.strerror(errno.ENOSPC) not in text


def compile_error(error: Exception) -> TrialError:
    """Return a compiler's error as the TrialError that a worker's job raises; CRASHED where the machine is to blame."""
    if isinstance(error, UnicodeError | json.JSONDecodeError) or any(text in str(error) for text in _MACHINE_TROUBLE):
        return TrialError(Status.CRASHED, str(error))
    status = Status.OUT_OF_MEMORY if is_out_of_memory(error) else Status.COMPILE_ERROR
    sizes = _SCOPED_VMEM.search(str(error))
    return TrialError(status, f"{sizes[0]}: {error}" if sizes else str(error))
