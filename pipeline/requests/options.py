"""Options of a run that do not change its result."""

import dataclasses
from typing import Literal

from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError, require_choice

Plan = Literal["ulysses", "ulysses_allgather", "megatron", "seed_tp"]
PlanChoice = Literal["auto", "ulysses", "ulysses_allgather", "megatron", "seed_tp"]
WeightsAtRest = Literal["replicated", "sharded"]
MAX_EVERY = 1000  # steps


@dataclasses.dataclass(frozen=True)
class ParallelOptions:
    """Parallelism as the user asks for it; `pipeline.model.sharding` makes it a plan for the devices there are.

    plan: "auto" is ulysses, the fastest as predicted for v6e, and ulysses_allgather for more devices than divide the
    heads. num_devices: None, all there are. dp: 2, 1, or None: 2 with guidance on an even number of devices.
    weights: at rest; "sharded" is for ulysses and ulysses_allgather only. Raises RequestError.
    """

    plan: PlanChoice = "auto"
    num_devices: int | None = None
    dp: int | None = None
    weights: WeightsAtRest = "replicated"

    def __post_init__(self) -> None:
        for name, choices in (("plan", PlanChoice), ("weights", WeightsAtRest)):
            require_choice(f"parallel.{name}", getattr(self, name), choices)
        if self.dp not in (None, 1, 2):
            raise RequestError(f"parallel.dp={self.dp!r}: expected 1, or 2 (one for each prompt of guidance), or null")
        if self.num_devices is not None and self.num_devices < 1:
            raise RequestError(f"parallel.num_devices={self.num_devices!r}: expected 1 or more, or null for all")
        if self.weights == "sharded" and self.plan not in ("auto", "ulysses", "ulysses_allgather"):
            raise RequestError(
                f"parallel.weights='sharded': only with parallel.plan=ulysses; {self.plan} splits them anyway"
            )


def to_parallel(config: GenerateConfig) -> ParallelOptions:
    """Return the checked parallel options of a resolved configuration. Raises RequestError."""
    return ParallelOptions(**dataclasses.asdict(config.parallel))


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """How the hosts that run the same command meet.

    coordinator: "host:port" of process 0, as every process reaches it; process_id: from 0; these and num_processes are
    given together, or found by JAX (a TPU of several hosts, Slurm, Open MPI). timeout_s: how long hosts wait for one
    another at the beginning, and for one that does not go on. Raises RequestError.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        names = ("coordinator", "num_processes", "process_id")
        missing = [name for name in names if getattr(self, name) is None]
        if missing and len(missing) < len(names):
            raise RequestError(
                f"distributed.{missing[0]}=null: expected a value beside those of "
                f"{', '.join(name for name in names if name not in missing)}"
            )
        if not 1 <= self.timeout_s <= 7 * 86400:
            raise RequestError(f"distributed.timeout_s={self.timeout_s:g}: expected seconds from 1 to {7 * 86400}")
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise RequestError(f"distributed.coordinator={self.coordinator!r}: expected HOST:PORT of process 0")
        if self.num_processes < 1:
            raise RequestError(f"distributed.num_processes={self.num_processes}: expected 1 or more")
        if not 0 <= self.process_id < self.num_processes:
            raise RequestError(f"distributed.process_id={self.process_id}: expected 0 to {self.num_processes - 1}")


def to_distributed(config: GenerateConfig) -> DistributedOptions | None:
    """Return the checked options of a resolved configuration, None for one host. Raises RequestError."""
    given = dataclasses.asdict(config.distributed)
    options = DistributedOptions(**{name: value for name, value in given.items() if name != "enabled"})
    return options if config.distributed.enabled or options.coordinator is not None else None


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change its result.

    resume: take saved outputs, and the state of a half-done denoise stage, where they belong to exactly this request.
    parallel: how to lay the work out over the devices. checkpoint_every: denoising steps between two savings of the
    state; None: by time, see `pipeline.stages.resume`; 0: only when interrupted. preview_every: denoising steps between
    two pictures; 0: none. Raises RequestError.
    """

    resume: bool = True
    parallel: ParallelOptions = dataclasses.field(default_factory=ParallelOptions)
    checkpoint_every: int | None = None
    preview_every: int = 0

    def __post_init__(self) -> None:
        for name, none in (("checkpoint_every", "only when interrupted"), ("preview_every", "none")):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_EVERY:
                raise RequestError(f"{name}={value}: expected steps from 1 to {MAX_EVERY}, or 0: {none}")
