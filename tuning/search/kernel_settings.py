"""Define the configuration of a sweep of a user's kernel: `python -m tuning.sweep kernel=FILE.py:CLASS`."""

import dataclasses
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from tuning.kernels import Kernel, KernelError, loading
from tuning.kernels.promoted import default_path
from tuning.kernels.protocol import tunables
from tuning.search.settings import AnySweepSchema, SweepSettings, common_fields, heatmap_names
from tuning.search.tunables import TunableSpace, call_of


@dataclasses.dataclass
class KernelSweepSchema(AnySweepSchema):
    """Fields of configs/sweep_kernel.yaml; becomes a SweepSettings."""

    kernel: str = MISSING
    workload: dict[str, Any] = dataclasses.field(default_factory=dict)
    space: dict[str, Any] = dataclasses.field(default_factory=dict)
    promote: bool = MISSING
    tuned: str | None = None


def settings_from(config: KernelSweepSchema) -> SweepSettings:
    """Return the frozen settings of a composed configuration. Raises ValueError for values out of range."""
    kernel = loading.find(config.kernel)
    if config.kernel in loading.KERNELS:
        raise ValueError(f"kernel={config.kernel}: leave it out to tune splash_attn; peers are for tuning.peers.")
    for name, values in config.space.items():
        if not isinstance(values, list):
            raise ValueError(f"space.{name}={values!r}: expected a list.")
    return kernel_settings(kernel, config)


def kernel_settings(kernel: Kernel[Any, Any], config: KernelSweepSchema) -> SweepSettings:
    """Return the settings of a sweep of a kernel, whatever `config.kernel` says. Raises ValueError as SweepSettings."""
    source, fields = loading.spec_of(kernel), common_fields(config)
    if kernel.platform == "gpu" and fields["backend"].quick:
        raise KernelError(
            f"{kernel.name} is for a GPU: backend={config.backend.name} predicts TPUs; expected backend=measure "
            f"device=local where a GPU is, or backend=interpret (got device={config.device.name})."
        )
    own = tunables(kernel)
    given = {
        name: loading.of_own_types(f"space.{name}", values, own[name]) if name in own else tuple(values)
        for name, values in config.space.items()
    }
    choices = own | given
    names = tuple(sorted(choices, key=lambda name: len(choices[name]) < 2)[:2])
    return SweepSettings(
        **fields,
        workload=call_of(kernel, config.workload),
        space=TunableSpace(kernel, choices),
        vmem_pruning=False,
        heatmap=heatmap_names(config.heatmap, names if len(names) == 2 else names * 2),
        source=source,
        tuned_path=Path(config.tuned) if config.tuned else default_path(kernel),
    )
