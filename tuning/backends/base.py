"""What a backend is, and the device that a trial is about."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from offline_tpu.machine import devices
from offline_tpu.machine.devices import DeviceSpec
from splash_workbench import provenance
from splash_workbench.errors import from_config
from tuning.trials.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Target:
    """The device that a trial is about.

    Attributes:
      name: as on the command line, e.g. "v6e" or "local".
      device_kind: as JAX says it.
      spec: its figures; None for a device that is only measured.
    """

    name: str
    device_kind: str
    spec: DeviceSpec | None


def named_device(device: str) -> Target:
    """Return the known device of that name. Raises UserError for an unknown one."""
    spec = from_config(lambda: devices.by_name(device))
    return Target(spec.name, spec.device_kind, spec)


def no_variables(target: Target, worker_dir: Path) -> Mapping[str, str]:
    """Add nothing to a worker's environment."""
    del target, worker_dir
    return {}


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to get the figures of a candidate.

    Attributes:
      name: as on the command line.
      job: what a worker runs for one candidate, "package.module:function".
      sources: patterns of the files that make the figure; see `provenance.source_hash`.
      find_target: the name of a device on the command line -> the device. Raises UserError where they do not fit.
      worker_env: (device, folder of the worker) -> environment variables that the worker starts with.
      cacheable: whether an outcome depends neither on when nor on where it was made. A measured time does.
      exclusive: whether trials must not share the device.
    """

    name: str
    job: str
    sources: tuple[str, ...]
    find_target: Callable[[str], Target] = named_device
    worker_env: Callable[[Target, Path], Mapping[str, str]] = no_variables
    cacheable: bool = True
    exclusive: bool = False


def context_of(workload: Workload, target: Target, backend: Backend, captured: provenance.Environment) -> str:
    """Hash everything that makes the times of two trials comparable, the candidate apart."""
    flags = {name: value for name, value in captured.flags.items() if name != "JAX_PLATFORMS"}
    parts = [
        str(workload.shape),
        workload.dtype,
        target.device_kind,
        backend.name,
        captured.kernel_hash,
        captured.backend_hash,
    ]
    return provenance.stable_hash(json.dumps([*parts, captured.compiler_versions, flags], sort_keys=True))
