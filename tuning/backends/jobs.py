"""The parts that the jobs of all backends share.

A job runs in `splash_workbench.workers.worker`, takes the payload that `evaluate` made, and returns fields of a Trial.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from splash_attn.api import Implementation
from splash_attn.types import AttentionShape, BlockSizes
from splash_workbench.errors import OF_USERS_CODE, line_of
from splash_workbench.trial_status import Status, TrialError
from tuning.backends import device_times
from tuning.kernels import Kernel, loading
from tuning.kernels.attention import AttentionKernel, from_projections
from tuning.trials.records import Compiled, Trial
from tuning.trials.workloads import Workload


@dataclasses.dataclass(frozen=True)
class Request:
    """One candidate as a job sees it.

    Attributes:
      kernel: see `loading.find`; shape, dtype, block_sizes: of an attention; sizes: of another kernel's workload.
      compiled: how much to compile, and so how much to check; see Trial.
    """

    kernel: str
    kernel_hash: str
    shape: AttentionShape | None
    dtype: str
    block_sizes: BlockSizes | None
    options: dict[str, Any]
    device: str
    cache_dir: str
    measure: device_times.MeasureSettings
    compiler_options: dict[str, str] = dataclasses.field(default_factory=dict)
    sizes: dict[str, Any] = dataclasses.field(default_factory=dict)
    compiled: Compiled = "whole"

    @functools.cached_property
    def found(self) -> Kernel[Any, Any]:
        """Return the kernel."""
        return loading.find(self.kernel)

    @functools.cached_property
    def config(self) -> Any:
        """Return the kernel's configuration."""
        return self.found.config_of(self.block_sizes, self.options)

    @functools.cached_property
    def workload(self) -> Any:
        """Return the kernel's workload."""
        if self.shape is not None:
            return Workload("call", self.shape, self.dtype)
        return self.found.Workload(**self.sizes)

    @functools.cached_property
    def options_of_compiler(self) -> dict[str, str]:
        """Return the flags of all candidates and of this one."""
        return self.compiler_options | self.found.compiler_options(self.config)

    def checked(self) -> tuple[Any, Any]:
        """Return the configuration and the workload that are compared with the reference."""
        config = self.config if self.compiled == "whole" else self.found.check_config(self.config, self.workload)
        return config, self.found.check_workload(config, self.workload)

    def function(self, implementation: Implementation, config: Any = None) -> Callable[..., Any]:
        """Return the function of a configuration, by default its own, for a chip, or interpreted."""
        config = config or self.config
        if isinstance(self.found, AttentionKernel):
            return self.found.attention(config.block_sizes, dict(config.options), implementation)
        make = self.found.interpreted if implementation == "pallas_interpret" else self.found.build
        built = self._of_user(make)(config)
        return self._of_user(built) if isinstance(built, types.FunctionType) else built

    def _of_user(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a user's function whose errors are its own, not the machine's: such a trial is not made again.

        Those that a compiler raises, too, are told apart where they are caught.
        """

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except (ValueError, NotImplementedError, OSError, MemoryError, jax.errors.JaxRuntimeError, TrialError):
                raise
            except OF_USERS_CODE as error:
                path = loading.file_of(self.kernel)
                at = f"{line_of(error, path)}: " if path is not None else ""
                raise TrialError(Status.COMPILE_ERROR, f"{at}{type(error).__name__}: {error}") from error

        return call

    def timed(self, implementation: Implementation, config: Any = None) -> Callable[..., Any]:
        """Return the op of which the time is taken, of `arguments`."""
        function = self.function(implementation, config)
        return from_projections(function, self.shape.num_heads) if self.shape is not None else function

    def arguments(self) -> Sequence[Any]:
        """Return the arguments of `timed`: shapes and dtypes, and arrays where the values count."""
        return self.found.arguments(self.workload)


def request_of(trial: Trial, kernel: str | None = None, cache_dir: str = "") -> dict[str, Any]:
    """Return the Request of a trial's candidate, as JSON. kernel: where it is, see `loading.find`; None: its name."""
    return {
        "kernel": kernel or trial.kernel,
        "kernel_hash": trial.environment.kernel_hash,
        "shape": dataclasses.asdict(trial.shape) if trial.shape else None,
        "dtype": trial.dtype,
        "block_sizes": dataclasses.asdict(trial.block_sizes) if trial.block_sizes else None,
        "options": dict(trial.variant),
        "device": trial.device,
        "cache_dir": cache_dir,
        "measure": {},
        "compiler_options": dict(trial.compiler_options),
        "sizes": dict(trial.sizes),
    }


def normal_arguments(specs: Sequence[Any]) -> list[jax.Array]:
    """Return arrays of these shapes and dtypes, of the standard normal distribution, always the same; arrays as is."""
    keys = jax.random.split(jax.random.key(0), len(specs))
    return [
        jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
        if isinstance(x, jax.ShapeDtypeStruct)
        else jnp.asarray(x)
        for key, x in zip(keys, specs, strict=True)
    ]


def probe(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the device that JAX finds here. In a process of its own, so that the parent does not hold the chip."""
    del payload
    device = jax.devices()[0]
    return {"platform": device.platform, "device_kind": device.device_kind}
