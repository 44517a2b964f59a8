"""Waiting for other processes, with a deadline that no healthy machine reaches, and what makes tests cheaper."""

import contextlib
import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import jax
import jaxlib

from splash_workbench.provenance import REPO_ROOT

#: XLA:CPU compiles for most of the tests' time. Its older emitters, fewer optimisations and shorter vectors save a
#: third of a test's CPU time (measured), and compute the same but for rounding. Another release may not have these
#: flags, and ends a process for an unknown one.
XLA_FLAGS = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=1 --xla_cpu_prefer_vector_width=128"
    if jaxlib.__version__ == "0.10.2"
    else ""
)
#: Seconds that anything may take which does end. It bounds a hang: no test is about how fast something is.
PLENTY_S = 1800.0

T = TypeVar("T")


def wait_until(condition: Callable[[], T], what: str | Callable[[], str], timeout_s: float = PLENTY_S) -> T:
    """Return the first true value of `condition`, asked every 20 ms.

    Args:
      condition: called until what it returns is true; an exception ends the wait.
      what: says what was waited for, in the failure's message; called then if it is callable.
      timeout_s: seconds after which the test fails.

    Raises:
      AssertionError: `timeout_s` is over.
    """
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for {what() if callable(what) else what}")
        time.sleep(0.02)
    return value


def virtual_devices(count: int) -> str:
    """Return the XLA_FLAGS of a process of the tests with `count` CPU devices."""
    return f"{XLA_FLAGS} --xla_force_host_platform_device_count={count}"


def set_aside() -> None:
    """Leave out of later collections what is there by now: with torch imported, each takes a tenth of a second."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def compiling_in_haste() -> Iterator[None]:
    """Let XLA leave out its optimizations where tests compile much and run little: they change no result here."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; one that is dead but not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_dead(pid: int) -> None:
    """Wait for the end of a process that was killed; the kernel takes its time on a busy machine."""
    wait_until(lambda: not is_alive(pid), f"the end of process {pid}")


def environment_with_repo() -> dict[str, str]:
    """Return this process's environment, in which Python finds this repository's packages and tests/fake_jobs.py."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO_ROOT), os.environ["PYTHONPATH"]])}
