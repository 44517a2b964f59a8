import errno
import json
import os

import pytest

from splash_workbench.trial_status import Status, compile_error


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem."), Status.OUT_OF_MEMORY),
        (RuntimeError("INTERNAL: Mosaic failed to compile TPU kernel: Bad lhs type"), Status.COMPILE_ERROR),
        (ValueError("block_q=128: expected more"), Status.COMPILE_ERROR),
        (RuntimeError("RESOURCE_EXHAUSTED: /tmp/dump: No space left on device"), Status.CRASHED),
        (RuntimeError("INTERNAL: mmap: Cannot allocate memory"), Status.CRASHED),
        (RuntimeError("UNAVAILABLE: the TPU is in use by another process"), Status.CRASHED),
        (RuntimeError("DEADLINE_EXCEEDED: no answer"), Status.CRASHED),
        (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), Status.CRASHED),
        (json.JSONDecodeError("Expecting value", "", 0), Status.CRASHED),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), Status.CRASHED),
    ],
)
def test_only_what_the_program_is_to_blame_for_is_conclusive(error: Exception, status: Status) -> None:
    assert compile_error(error).status is status
    assert status.conclusive == (status is not Status.CRASHED)
