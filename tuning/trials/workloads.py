"""Named attention shapes, each a file in configs/workload/."""

import dataclasses
from typing import Any, Self

from omegaconf import OmegaConf

from splash_attn.types import AttentionShape
from splash_workbench.provenance import CONFIG_DIR

_WORKLOAD_DIR = CONFIG_DIR / "workload"
_ITEMSIZES = {"bfloat16": 2, "float32": 4}
DTYPES = tuple(_ITEMSIZES)


@dataclasses.dataclass(frozen=True)
class Workload:
    """One attention call of a model on one chip.

    Raises:
      ValueError: a size is out of range or the dtype is not one of DTYPES.
    """

    name: str
    shape: AttentionShape
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {DTYPES}.")

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return _ITEMSIZES[self.dtype]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        sizes = {field.name: fields[field.name] for field in dataclasses.fields(AttentionShape)}
        return cls(name=fields["name"], shape=AttentionShape(**sizes), dtype=fields["dtype"])


def names() -> tuple[str, ...]:
    """Every workload that `load` knows."""
    return tuple(sorted(path.stem for path in _WORKLOAD_DIR.glob("*.yaml")))


def load(name: str) -> Workload:
    """The workload of that name.

    Raises:
      ValueError: there is none; the message lists those there are.
    """
    if name not in names():
        raise ValueError(f"workload={name!r}: expected one of {', '.join(names())}.")
    return Workload.from_dict(dict(OmegaConf.to_container(OmegaConf.load(_WORKLOAD_DIR / f"{name}.yaml"))))  # type: ignore[arg-type]
