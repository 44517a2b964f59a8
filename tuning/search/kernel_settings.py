"""Define the configuration of a sweep of a user's kernel: `python -m tuning.sweep kernel=FILE.py:CLASS`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from offline_tpu.options import checked_options
from splash_workbench.engines.settings import EngineSettings, engine_from
from tuning.backends.base import Backend
from tuning.backends.registry import BACKENDS
from tuning.kernels import Kernel, KernelError, loading
from tuning.kernels.protocol import tunables
from tuning.search.settings import AnySweepSchema, SweepSettings, heatmap_names, workers_of
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
    return kernel_settings(
        kernel,
        call_of(kernel, config.workload).sizes,
        space={name: tuple(values) for name, values in config.space.items()},
        device=config.device.name,
        backend=config.backend.name,
        measure=config.backend.measure,
        search=config.search,
        compiler_options=config.compiler_options,
        engine=engine_from(config.engine),
        workers=config.workers,
        results_dir=Path(config.results_dir),
        tuned_path=Path(config.tuned) if config.tuned else None,
        heatmap=config.heatmap,
        **{name: getattr(config, name) for name in ("timeout_s", "reuse", "promote", "quick", "progress")},
    )


def kernel_settings(
    kernel: Kernel[Any, Any],
    sizes: Mapping[str, Any],
    *,
    space: Mapping[str, tuple[Any, ...]],
    device: str,
    backend: str,
    compiler_options: Mapping[str, Any],
    workers: int | None,
    engine: EngineSettings | None,
    heatmap: list[str] | None,
    tuned_path: Path | None,
    **rest: Any,
) -> SweepSettings:
    """Return the settings of a sweep of a kernel; see SweepSettings. Raises ValueError for values out of range."""
    source = loading.spec_of(kernel)
    if (chosen := BACKENDS.get(backend)) is None:
        raise ValueError(f"backend.name={backend!r}: expected one of {', '.join(BACKENDS)}.")
    _check_platform(kernel, chosen, device)
    tuned_for = {name: space.get(name, values) for name, values in tunables(kernel).items()}
    unknown = {name: values for name, values in space.items() if name not in tuned_for}
    listed = TunableSpace(kernel, tuned_for | unknown)
    names = tuple(sorted(tuned_for, key=lambda name: len(tuned_for[name]) < 2)[:2])
    path = loading.file_of(source)
    assert path is not None, "a user's kernel has a file"
    return SweepSettings(
        workload=call_of(kernel, sizes),
        space=listed,
        device=device,
        backend=chosen,
        compiler_options=checked_options(compiler_options),
        engine=engine,
        workers=workers_of(workers, chosen, engine),
        vmem_pruning=False,
        heatmap=heatmap_names(heatmap, names if len(names) == 2 else names * 2),
        source=source,
        tuned_path=tuned_path or path.with_name(f"{path.stem}_tuned.json"),
        **rest,
    )


def _check_platform(kernel: Kernel[Any, Any], backend: Backend, device: str) -> None:
    if kernel.platform == "gpu" and backend.quick:
        raise KernelError(
            f"{kernel.name} is for a GPU: backend={backend.name} predicts TPUs; expected backend=measure device=local "
            f"where a GPU is, or backend=interpret (got device={device})."
        )
