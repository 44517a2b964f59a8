"""Tune a kernel from Python: `best = autotune(MyKernel(), workload, device="v6e")`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic

from splash_workbench.errors import UserError, from_config
from splash_workbench.files import user_path
from splash_workbench.trial_status import Status
from tuning import kernel_sweeps
from tuning.kernels import KernelError, loading
from tuning.kernels.protocol import C, Kernel, W
from tuning.search.kernel_settings import KernelSweepSchema, kernel_settings
from tuning.search.schemas import BackendSchema, DeviceSchema
from tuning.search.settings import SweepSettings
from tuning.search.study import SearchSettings
from tuning.sweep import sweep
from tuning.trials import records
from tuning.trials.records import Trial


@dataclasses.dataclass(frozen=True)
class Best(Generic[C]):
    """The winner of a sweep.

    Attributes:
      config: of the kernel.
      time_ms: of a call; label: how it was got, "predicted" or "measured". None where the backend gives no time.
      call: the function of the winner, for arrays on the device.
      trial: its record; trials: all of the sweep, best first.
      promoted: whether it was written to the file of tuned entries, and why or why not.
    """

    config: C
    time_ms: float | None
    label: str | None
    call: Callable[..., Any] = dataclasses.field(repr=False)
    trial: Trial = dataclasses.field(repr=False)
    trials: tuple[Trial, ...] = dataclasses.field(repr=False)
    promoted: str


def autotune(
    kernel: Kernel[C, W],
    workload: W | None = None,
    *,
    device: str = "v6e",
    backend: str = "offline",
    space: Mapping[str, Sequence[Any]] | None = None,
    sampler: str = "tpe",
    max_trials: int | None = 20,
    seed: int = 0,
    workers: int | None = None,
    timeout_s: float = 900.0,
    quick: bool = True,
    promote: bool = False,
    tuned_path: Path | str | None = None,
    results_dir: Path | str = "results",
    compiler_options: Mapping[str, Any] | None = None,
    reuse: bool = True,
    progress: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> Best[C]:
    """Find the fastest configuration of a kernel; what `python -m tuning.sweep kernel=FILE.py:CLASS` does.

    The same call again resumes. Workers start Python anew and load the kernel's file: call this under
    `if __name__ == "__main__":`.

    Args:
      workload: an instance of the kernel's Workload; None: its defaults.
      device: "v6e", "v5e", "v5p" or "v7x" with backend="offline" or "interpret"; "local" with "measure".
      space: values of tunables instead of the kernel's own.
      sampler, max_trials, seed: see configs/search; max_trials=None: every configuration.
      quick: see configs/sweep_kernel.yaml.
      promote: write the winner to `tuned_path` (None: beside the kernel's file) if it beats the default configuration.
      report: called with the lines that the command prints first.

    Raises:
      UserError: the kernel, or something else that was given, is wrong; the message is one line.
    """

    def settings() -> SweepSettings:
        loading.refuse_while_loading()
        loading.refuse_class(kernel)
        loading.checked(type(kernel))
        _check_types({"device": device, "backend": backend, "sampler": sampler}, str, "text")
        _check_types({"results_dir": results_dir}, str | Path, "a folder")
        _check_types({"tuned_path": tuned_path}, str | Path | None, "a file")
        _check_types({"seed": seed}, int, "a whole number")
        _check_types({"max_trials": max_trials, "workers": workers}, int | None, "a whole number, or None")
        _check_types({"timeout_s": timeout_s}, int | float, "a number of seconds")
        flags = {"quick": quick, "promote": promote, "reuse": reuse, "progress": progress}
        _check_types(flags, bool, "True or False")
        _check_types({"space": space, "compiler_options": compiler_options}, Mapping | None, "a dict")
        for name, values in (space or {}).items():
            _check_types({f"space[{name!r}]": values}, list | tuple | range, "a list of values")
        if workload is not None and not isinstance(workload, kernel.Workload):
            raise KernelError(f"{workload=}: expected a {kernel.name}.Workload.")
        config = KernelSweepSchema(
            device=DeviceSchema(device),
            backend=BackendSchema(backend),
            search=SearchSettings(sampler=sampler, max_trials=max_trials, seed=seed),
            workload={} if workload is None else loading.sizes_of(kernel, workload),
            space=dict(space or {}),
            compiler_options=dict(compiler_options or {}),
            workers=workers,
            timeout_s=timeout_s,
            results_dir=str(user_path(results_dir)),
            tuned=None if tuned_path is None else str(user_path(tuned_path)),
            reuse=reuse,
            promote=promote,
            quick=quick,
            progress=progress,
        )
        return kernel_settings(kernel, config)

    made = from_config(settings)
    result = sweep(made, report=report)
    # A backend that times nothing has no winner: the first that is right stands for it.
    winner = result.winner or next((trial for trial in result.trials if trial.status is Status.OK), None)
    if winner is None:
        first = result.trials[0]
        raise UserError(f"no candidate was ok; the first is {first.status}: {first.error}")
    config = kernel.config_of(None, winner.variant)
    promoted = "not asked for"
    if promote and result.winner is not None:
        on_record = records.read(result.directory / records.TRIALS_FILE)
        promoted = kernel_sweeps.promote(winner, on_record, made).reason
    label = winner.label.value if winner.label else None
    return Best(config, winner.time_ms, label, kernel.build(config), winner, result.trials, promoted)


def _check_types(given: Mapping[str, Any], kinds: Any, expected: str) -> None:
    """Raise KernelError for the first that is of another type; a bool is no number."""
    for name, value in given.items():
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise KernelError(f"{name}={value!r}: expected {expected}.")
