"""Choose the engine: this machine, or the nodes of a Ray cluster. Imports no Ray."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_MAX_RETRIES = 100
_MAX_SLICES = 10_000


@dataclasses.dataclass
class EngineSchema:
    """Fields of configs/engine/*.yaml; becomes an EngineSettings, or None for this machine."""

    name: str = "local"
    address: str | None = None
    num_cpus: float = 1.0
    resources: dict[str, Any] = dataclasses.field(default_factory=dict)
    retries: int = 3
    slices: int | None = None


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    """A Ray cluster, and what one candidate or one slice takes of a node. Raises ValueError for a value out of range.

    Attributes:
      address: "HOST:PORT" of the head, "auto" or "local"; as ray.init has it.
      num_cpus, resources: see configs/engine/ray.yaml; resources: {"TPU": 8.0}.
      retries: how often what was lost with a node is begun again.
      slices: at most so many; None: as many as there is room for.
    """

    address: str = "auto"
    num_cpus: float = 1.0
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)
    retries: int = 3
    slices: int | None = None

    def __post_init__(self) -> None:
        if not self.address.strip():
            raise ValueError("engine.address='': expected HOST:PORT, auto or local.")
        if not 0 < self.num_cpus <= 4096:
            raise ValueError(f"engine.num_cpus={self.num_cpus:g}: expected more than 0, at most 4096.")
        for name, count in self.resources.items():
            if isinstance(count, bool) or not isinstance(count, int | float) or not count > 0:
                raise ValueError(f"engine.resources.{name}={count!r}: expected a number above 0.")
            if name in ("CPU", "memory"):
                raise ValueError(f"engine.resources.{name}: expected engine.num_cpus; memory is what a worker takes.")
        if not 0 <= self.retries <= _MAX_RETRIES:
            raise ValueError(f"engine.retries={self.retries}: expected 0 to {_MAX_RETRIES}.")
        if self.slices is not None and not 1 <= self.slices <= _MAX_SLICES:
            raise ValueError(f"engine.slices={self.slices}: expected 1 to {_MAX_SLICES}, or null for all that fit.")


def engine_from(config: EngineSchema) -> EngineSettings | None:
    """Return the checked settings of a composed configuration, None for this machine. Raises ValueError."""
    if config.name not in ("local", "ray"):
        raise ValueError(f"engine.name={config.name!r}: expected local or ray.")
    if config.name == "local":
        for field in dataclasses.fields(EngineSchema):
            value = getattr(config, field.name)
            if value != getattr(EngineSchema(), field.name):
                raise ValueError(f"engine.{field.name}={value}: expected engine=ray beside it.")
        return None
    return EngineSettings(
        address="auto" if config.address is None else config.address,
        **{name: getattr(config, name) for name in ("num_cpus", "resources", "retries", "slices")},
    )
