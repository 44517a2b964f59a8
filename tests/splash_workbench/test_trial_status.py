import errno
import json
import os

import pytest

from splash_workbench.trial_status import Status, compile_error, is_out_of_memory


def test_what_does_not_fit_vmem_is_said_first() -> None:
    sizes = "Scoped allocation with size 80.00M and limit 32.00M exceeded scoped vmem limit by 48.00M"
    text = (
        "RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:\nRan out of memory in memory space vmem while allocating "
        "on stack for %f.1 = bf16[8192,8192]{1,0:T(8,128)(2,1)} custom-call(%x.1, %y.1). "
        f"{sizes}. It should not be possible to run out of scoped vmem"
    )
    error = compile_error(RuntimeError(text))
    assert error.status is Status.OUT_OF_MEMORY
    assert str(error) == f"{sizes}: {text}"


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


def test_a_full_disk_is_not_a_lack_of_memory() -> None:
    assert is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: out of memory while allocating 3 GiB"))
    assert not is_out_of_memory(RuntimeError("RESOURCE_EXHAUSTED: vm.xplane.pb; No space left on device"))
