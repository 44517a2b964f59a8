"""Define the configuration of a sweep: Hydra's mutable schemas, and the frozen settings made from them once."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from offline_tpu.options import checked_options
from splash_attn import tuned
from splash_workbench.engines.settings import EngineSchema, EngineSettings, engine_from
from splash_workbench.records.jsonl import decode
from splash_workbench.workers.room import check_timeout_s, worker_count
from tuning.backends.base import Backend
from tuning.backends.device_times import MeasureSettings
from tuning.backends.registry import BACKENDS
from tuning.search.schemas import BackendSchema, DeviceSchema, WorkloadSchema
from tuning.search.space import Space
from tuning.search.study import SearchSettings
from tuning.search.tunables import TunableSpace
from tuning.trials.records import OUR_KERNEL, VARIANT_PREFIX
from tuning.trials.workloads import KernelCall, Workload


@dataclasses.dataclass
class SpaceSchema:
    """Fields of configs/space/*.yaml; becomes a tuning.search.space.Space."""

    name: str = MISSING
    block_q: list[int] = MISSING
    block_kv: list[int] = MISSING
    block_kv_compute: list[int] = MISSING
    variant: dict[str, Any] = dataclasses.field(default_factory=dict)
    first: list[Any] = dataclasses.field(default_factory=list)
    max_block_scores: int | None = None


@dataclasses.dataclass
class AnySweepSchema:
    """What configs/sweep.yaml and configs/sweep_kernel.yaml have in common."""

    device: DeviceSchema = dataclasses.field(default_factory=DeviceSchema)
    backend: BackendSchema = dataclasses.field(default_factory=BackendSchema)
    search: SearchSettings = MISSING
    engine: EngineSchema = dataclasses.field(default_factory=EngineSchema)
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    workers: int | None = None
    timeout_s: float = MISSING
    results_dir: str = MISSING
    reuse: bool = MISSING
    quick: bool = MISSING
    heatmap: list[str] | None = None
    json: str | None = None
    progress: bool = MISSING
    profile: bool = MISSING
    profile_top: int = MISSING
    logdir: str = MISSING


@dataclasses.dataclass
class SweepSchema(AnySweepSchema):
    """Fields of configs/sweep.yaml; becomes a SweepSettings."""

    workload: WorkloadSchema = dataclasses.field(default_factory=WorkloadSchema)
    space: SpaceSchema = dataclasses.field(default_factory=SpaceSchema)
    vmem_pruning: bool = MISSING
    promote: Any = MISSING


@dataclasses.dataclass(frozen=True)
class SweepSettings:
    """One sweep; see configs/sweep.yaml for what each field means. Raises ValueError for a value out of range.

    workers: processes at once; 0: as many as the engine's cluster has room for. source: where a user's kernel is, see
    `tuning.kernels.loading.find`; None: it is ours. tuned_path: where its winner goes. engine: None for this machine.
    """

    workload: Workload | KernelCall
    device: str
    backend: Backend
    measure: Mapping[str, Any]
    search: SearchSettings
    space: Space | TunableSpace
    workers: int
    timeout_s: float
    vmem_pruning: bool
    results_dir: Path
    reuse: bool
    promote: bool | str
    progress: bool
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quick: bool = True
    heatmap: tuple[str, str] = ("block_q", "block_kv")
    source: str | None = None
    tuned_path: Path | None = None
    engine: EngineSettings | None = None

    def __post_init__(self) -> None:
        if self.promote not in (True, False, "shipped"):
            raise ValueError(f"promote={self.promote!r}: expected true, false or shipped.")
        if self.engine is not None:
            if self.backend.exclusive:
                raise ValueError(
                    f"engine=ray: expected backend=offline or interpret, got {self.backend.name}: times of several "
                    "chips are of no one chip."
                )
            if self.search.storage is not None:
                raise ValueError("engine=ray and search.storage: expected one of them; see docs/clusters.md.")
            if self.engine.slices is not None:
                raise ValueError(f"engine.slices={self.engine.slices}: it is of pipeline.generate; expected workers=.")
        if self.backend.exclusive and self.workers != 1:
            raise ValueError(
                f"workers={self.workers}: expected 1 with backend={self.backend.name}: trials cannot share the device."
            )
        if self.search.storage is not None:
            if self.quick and self.backend.quick:
                raise ValueError("search.storage: expected quick=false beside it: a first pass is of one sweep alone.")
            if self.promote:
                raise ValueError(
                    "search.storage: expected promote=false beside it; the same command without search.storage then "
                    "promotes from the merged records."
                )
        if self.compiler_options and not self.backend.timed:
            raise ValueError(f"compiler_options: expected none with backend={self.backend.name}: it times nothing.")
        for name in self.heatmap:
            if name not in (names := [name.removeprefix(VARIANT_PREFIX) for name in self.space.choices]):
                raise ValueError(f"heatmap={list(self.heatmap)}: expected two of {', '.join(names)}.")
        check_timeout_s(self.timeout_s)
        if unknown := set(self.measure) - {field.name for field in dataclasses.fields(MeasureSettings)}:
            raise ValueError(f"backend.measure.{min(unknown)}: no such setting.")
        decode(self.measure, MeasureSettings)

    @property
    def kernel_name(self) -> str:
        """The name that records have."""
        return self.workload.kernel if isinstance(self.workload, KernelCall) else OUR_KERNEL

    @property
    def default_options(self) -> dict[str, Any]:
        """The tunables of a user's kernel that its winner must beat."""
        return self.space.defaults if isinstance(self.space, TunableSpace) else {}

    @property
    def promotion_dir(self) -> Path | None:
        """The folder of the tuned entries that a winner must beat and goes to; None: the user's, before the shipped."""
        return tuned.TUNED_DIR if self.promote == "shipped" else None


def settings_from(config: SweepSchema) -> SweepSettings:
    """Return the frozen settings of a composed configuration. Raises ValueError for values out of range."""
    fields, workload = common_fields(config), config.workload.frozen()
    return SweepSettings(
        **fields,
        workload=workload,
        space=_space(config.space).fitted_to(workload.shape),
        vmem_pruning=config.vmem_pruning,
        heatmap=heatmap_names(config.heatmap, ("block_q", "block_kv")),
    )


def common_fields(config: AnySweepSchema) -> dict[str, Any]:
    """Return the fields of SweepSettings that a sweep has whatever its kernel. Raises ValueError as SweepSettings."""
    backend = BACKENDS.get(config.backend.name)
    if backend is None:
        raise ValueError(f"backend.name={config.backend.name!r}: expected one of {', '.join(BACKENDS)}.")
    engine = engine_from(config.engine)
    if config.workers is None and engine is not None:
        workers = 0
    else:
        workers = worker_count(1 if config.workers is None and backend.exclusive else config.workers)
    as_they_are = ("search", "timeout_s", "reuse", "promote", "quick", "progress")
    return {name: getattr(config, name) for name in as_they_are} | {
        "device": config.device.name,
        "backend": backend,
        "measure": config.backend.measure,
        "compiler_options": checked_options(config.compiler_options),
        "engine": engine,
        "workers": workers,
        "results_dir": Path(config.results_dir),
    }


def heatmap_names(given: list[str] | None, default: tuple[str, ...]) -> tuple[str, str]:
    """Return the two tunables of a heat map, the rows first. Raises ValueError for more or fewer."""
    names = tuple(given) if given is not None else default
    if len(names) != 2:
        raise ValueError(f"heatmap={list(names)}: expected two tunables.")
    return names[0], names[1]


def _space(config: SpaceSchema) -> Space:
    choices: dict[str, Any] = {name: getattr(config, name) for name in ("block_q", "block_kv", "block_kv_compute")}
    choices |= {VARIANT_PREFIX + name: values for name, values in config.variant.items()}
    for name, values in choices.items():
        if not isinstance(values, list):
            raise ValueError(f"space.{name}={values!r}: expected a list.")
    choices = {name: tuple(values) for name, values in choices.items()}
    return Space(config.name, choices, tuple(map(_flat, config.first)), config.max_block_scores)


def _flat(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return `{block_q: 128, variant: {softmax: online}}` with the variant's fields as parameters of their own."""
    if not isinstance(parameters, dict) or not isinstance(variant := parameters.get("variant", {}), dict):
        raise ValueError(f"space.first={parameters!r}: expected a mapping, as {{block_q: 1024, variant: {{...}}}}.")
    rest = {name: value for name, value in parameters.items() if name != "variant"}
    return rest | {VARIANT_PREFIX + name: value for name, value in variant.items()}
