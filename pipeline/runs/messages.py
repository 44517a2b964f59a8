"""What a batch over many slices and a slice tell one another. Imports no JAX."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.requests.batch_file import Entry
from pipeline.requests.options import RunOptions
from pipeline.requests.request import Stage

if TYPE_CHECKING:
    from pipeline.runs.request_run import GenerateResult


@dataclasses.dataclass(frozen=True)
class Job:
    """A batch as every slice gets it.

    Attributes:
      folder: from which the command was started, for the relative paths in it.
      output_dir, marker: absolute; marker: a file there that the command has just written.
      omp_threads: OMP_NUM_THREADS of the command. Ray sets it to the CPUs that a slice asks for.
    """

    entries: tuple[Entry, ...]
    path: Path | None
    stages: tuple[Stage, ...]
    folder: Path
    output_dir: Path
    marker: str
    run_options: RunOptions
    cache_dir: Path | None
    compilation_cache: bool
    omp_threads: str | None


@dataclasses.dataclass(frozen=True)
class Ready:
    """A slice that has looked at all lines.

    Attributes:
      errors: what is wrong with them, or with the slice; then the rest says nothing.
      finished: the result of each line that is there already.
      groups: of each line, equal where lines share what is loaded.
      digest: of the lines, weights, devices, versions and tuned entries; slices with equal ones make the same bits.
    """

    where: str
    errors: tuple[str, ...] = ()
    finished: tuple["GenerateResult | None", ...] = ()
    groups: tuple[int, ...] = ()
    devices: str = ""
    digest: str = ""


@dataclasses.dataclass(frozen=True)
class Done:
    """What a slice made of stages of a line; status: "waiting" where others are to be run."""

    status: Literal["waiting", "done", "finished before", "failed", "interrupted"]
    error: str | None
    result: "GenerateResult | None"
    time_s: float
