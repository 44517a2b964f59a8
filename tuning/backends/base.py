"""Define a backend, and the device that a trial is about."""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from offline_tpu.machine import devices
from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.options import options_text
from splash_workbench import provenance
from splash_workbench.errors import UserError, from_config
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Runner
from tuning.trials.workloads import KernelCall, Workload

_PROBE_TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a trial is about, by its name on the command line; spec: None where it is only measured."""

    name: str
    device_kind: str
    spec: DeviceSpec | None


def named_device(device: str) -> Target:
    """Return the known device of that name. Raises UserError for an unknown one, or flags that end every worker."""
    spec = from_config(lambda: devices.by_name(device))
    if flags := os.environ.get("XLA_FLAGS"):
        probe(f"XLA_FLAGS={flags!r}: no worker starts with it; put it right or unset it", JAX_PLATFORMS="cpu")
    return Target(spec.name, spec.device_kind, spec)


def no_variables(*_: object) -> dict[str, str]:
    """Add nothing to a worker's environment."""
    return {}


def any_options(*_: object) -> None:
    """Leave it to the candidates what becomes of compiler options."""


def probe(trouble: str, **variables: str) -> dict[str, Any]:
    """Return the platform and device_kind that JAX finds in a worker with these environment variables.

    Raises UserError, which begins with `trouble`, where it does not start, so that no candidate can run.
    """
    with tempfile.TemporaryDirectory() as work_dir:
        job = "tuning.backends.jobs:probe"
        outcome = Runner(Path(work_dir)).run(job, {}, timeout_s=_PROBE_TIMEOUT_S, variables=lambda _: variables)
    if outcome.status is not Status.OK:
        raise UserError(f"{trouble} ({outcome.error}).")
    return outcome.result


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to get the figures of a candidate.

    Attributes:
      job: what a worker runs for one candidate, "package.module:function".
      side_by_side: what a worker runs for the winner, see `tuning.backends.side_by_side`; None where nothing is timed.
      sources: patterns of the files that make the figure; see `provenance.source_hash`.
      find_target: the name of a device on the command line -> the device. Raises UserError where they do not fit.
      worker_env: (device, folder of the worker) -> environment variables that the worker starts with.
      check_options: (device, compiler options) -> None. Raises UserError where the compiler refuses them.
      capture: sources -> the environment in which their figures are made.
      cacheable: whether an outcome depends neither on when nor on where it was made. A measured time does.
      exclusive: whether trials must not share the device.
      timed: whether an ok trial has a time.
      scratch_bytes: more than the files of one candidate take.
      quick: whether a first pass can tell the time of a candidate with less; see `tuning.backends.quick`.
    """

    name: str
    job: str
    sources: tuple[str, ...]
    find_target: Callable[[str], Target] = named_device
    worker_env: Callable[[Target, Path], Mapping[str, str]] = no_variables
    check_options: Callable[[Target, Mapping[str, str]], None] = any_options
    capture: Callable[[tuple[str, ...]], provenance.Environment] = provenance.capture
    cacheable: bool = True
    exclusive: bool = False
    timed: bool = True
    quick: bool = False
    side_by_side: str | None = None
    scratch_bytes: int = 2**20


def context_of(
    workload: Workload | KernelCall,
    target: Target,
    backend: Backend,
    captured: provenance.Environment,
    compiler_options: Mapping[str, str] | None = None,
) -> str:
    """Return a hash of everything that makes the times of two trials comparable, the candidate apart."""
    flags = {name: value for name, value in captured.flags.items() if name != "JAX_PLATFORMS"}
    options = [options_text(compiler_options)] if compiler_options else []
    parts = [*options, workload.call, workload.dtype, target.device_kind, backend.name]
    parts += [captured.kernel_hash, captured.backend_hash]
    return provenance.stable_hash(json.dumps([*parts, captured.compiler_versions, flags], sort_keys=True))
