"""Says how the predicted time of a row moves with each constant of the time model."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from offline_tpu.machine.constants import FittedConstants
from offline_tpu.machine.devices import DeviceSpec
from tuning.validate.fit.retiming import KeptProgram

#: Factor by which each constant is moved, up and down.
STEP = 1.1

Model = tuple[DeviceSpec, FittedConstants]


def parameters(device: DeviceSpec) -> dict[str, float]:
    """Return by name the constants in use on a device that are fitted. A name with a device is of that alone."""
    constants = FittedConstants.of(device)
    found = {
        f"hbm_efficiency {device.name}": constants.hbm_efficiency,
        "cycle_efficiency": constants.cycle_efficiency,
        "vmem_bytes_per_stolen_cycle": constants.vmem_bytes_per_stolen_cycle,
        "dma_latency_s": constants.dma_latency_s,
        "op_overhead_s": constants.op_overhead_s,
    }
    if constants.hbm_sustained_share < 1:
        found[f"hbm_sustained_share {device.name}"] = constants.hbm_sustained_share
        found[f"hbm_burst_s {device.name}"] = constants.hbm_burst_s
    if device.p_states:  # the clock of the others follows from published figures
        found[f"clock_hz {device.name}"] = device.clock_hz
    return found


def changed(device: DeviceSpec, name: str, factor: float) -> Model:
    """Return a device and its constants with one of `parameters` multiplied."""
    field = name.partition(" ")[0]
    constants = FittedConstants.of(device)
    value = parameters(device)[name] * factor
    if field == "clock_hz":
        return dataclasses.replace(device, clock_hz=value), constants
    return device, dataclasses.replace(constants, **{field: value})


def sensitivities(time_s: Callable[..., float], device: DeviceSpec) -> dict[str, float]:
    """Return by constant d(log time) / d(log constant), as a difference between STEP up and STEP down.

    Args:
      time_s: device, constants -> the program's time.
    """
    return {
        name: math.log(time_s(*changed(device, name, STEP)) / time_s(*changed(device, name, 1 / STEP)))
        / (2 * math.log(STEP))
        for name in parameters(device)
    }


def of_dump(path: Path, device: DeviceSpec) -> dict[str, Any]:
    """Return `time_ms`, `sensitivities` and what is `unresolved` of a kept program."""
    program = KeptProgram(path, device)
    return {
        "time_ms": program.time_s(device, FittedConstants.of(device)) * 1e3,
        "sensitivities": sensitivities(program.time_s, device),
        "unresolved": list(program.unresolved),
    }
