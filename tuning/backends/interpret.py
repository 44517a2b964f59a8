"""Check numerics in interpret mode on the CPU. Gives no time."""

from typing import Any

from splash_workbench.records.jsonl import decode
from splash_workbench.workers import stages
from tuning.backends.base import Backend, Target, named_device
from tuning.backends.jobs import Request
from tuning.backends.numerics import check_numerics


def _find_target(device: str) -> Target:
    return Target("cpu", "cpu", None) if device == "local" else named_device(device)


def _worker_env(*_: object) -> dict[str, str]:
    return {"JAX_PLATFORMS": "cpu"}


INTERPRET = Backend(
    name="interpret",
    job="tuning.backends.interpret:check_candidate",
    sources=("tuning/backends/numerics.py",),
    find_target=_find_target,
    worker_env=_worker_env,
    timed=False,
)


def check_candidate(payload: dict[str, Any]) -> dict[str, Any]:
    """Check the numerics in interpret mode."""
    stages.enter("check")
    return check_numerics(decode(payload, Request), "pallas_interpret")
