"""Hydra's schemas of the groups in configs/ that several commands take."""

import dataclasses
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING

from offline_tpu.machine import devices
from splash_workbench.cli import given_keys
from splash_workbench.errors import from_config
from tuning.trials.workloads import Workload


@dataclasses.dataclass
class WorkloadSchema:
    """Fields of configs/workload/*.yaml."""

    name: str = MISSING
    batch_size: int = MISSING
    num_heads: int = MISSING
    seq_len: int | None = None
    q_seq_len: int | None = None
    kv_seq_len: int | None = None
    head_dim: int = MISSING
    dtype: str = MISSING

    def frozen(self) -> Workload:
        """Return the checked workload, under a name that is its own. Raises UserError."""
        given = given_keys() if HydraConfig.initialized() else ()
        overridden = {key.removeprefix("workload.") for key in given if key.startswith("workload.")}
        fields = dataclasses.asdict(self)
        return from_config(lambda: Workload.from_dict(fields, overridden).under_its_own_name(overridden))


@dataclasses.dataclass
class DeviceSchema:
    """Fields of configs/device/*.yaml; the figures are in offline_tpu.machine.devices."""

    unsupported = devices.UNSUPPORTED  # not a field: says why there is no such option

    name: str = MISSING


@dataclasses.dataclass
class BackendSchema:
    """Fields of configs/backend/*.yaml; `measure` becomes a tuning.backends.device_times.MeasureSettings."""

    name: str = MISSING
    measure: dict[str, Any] = dataclasses.field(default_factory=dict)
