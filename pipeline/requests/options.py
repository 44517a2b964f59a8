"""Options of a run that do not change its result."""

import dataclasses
from typing import Literal

from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.request import require_choice

Plan = Literal["ulysses", "megatron", "seed_tp"]
PlanChoice = Literal["auto", "ulysses", "megatron", "seed_tp"]
WeightsAtRest = Literal["replicated", "sharded"]
MAX_EVERY = 1000  # steps


@dataclasses.dataclass(frozen=True)
class ParallelOptions:
    """Parallelism as the user asks for it; `pipeline.model.sharding` makes it a plan for the devices there are.

    plan: "auto" is ulysses, the fastest as predicted for v6e. num_devices: None, all
    there are. dp: 2, 1, or None: 2 with guidance on an even number of devices. weights: at rest; "sharded" is for
    ulysses only. Raises RequestError.
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
        if self.weights == "sharded" and self.plan not in ("auto", "ulysses"):
            raise RequestError(
                f"parallel.weights='sharded': only with parallel.plan=ulysses; {self.plan} splits them anyway"
            )


def to_parallel(config: GenerateConfig) -> ParallelOptions:
    """Return the checked parallel options of a resolved configuration. Raises RequestError."""
    return ParallelOptions(**dataclasses.asdict(config.parallel))


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
