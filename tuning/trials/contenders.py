"""Record what a sweep's winner was timed beside: the default configuration, and what else computes the same."""

import dataclasses
import statistics
from collections.abc import Iterator

from splash_workbench.provenance import Environment
from splash_workbench.records.base import new_id, utc_now
from splash_workbench.trial_status import Label

FILE_NAME = "side_by_side.jsonl"


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to compute the op.

    Attributes:
      name: "winner", "default", or that of one of the kernel's baselines.
      config: its tunables; empty for a baseline.
      time_samples_ms: of the whole op, in the order in which they were taken; empty where it could not run.
      notes: what the samples are worth; error: one line, why there are none.
    """

    name: str
    config: str
    label: Label
    time_samples_ms: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()
    error: str | None = None

    @property
    def time_ms(self) -> float | None:
        """Median of the samples."""
        return statistics.median(self.time_samples_ms) if self.time_samples_ms else None


@dataclasses.dataclass(frozen=True)
class SideBySide:
    """The winner and what it was timed beside in one process, or predicted beside.

    Attributes:
      context: of the trials, see Trial; winner: the record of the winner's trial.
    """

    context: str
    winner: str
    kernel: str
    device_kind: str
    contenders: tuple[Contender, ...]
    environment: Environment
    record_id: str = dataclasses.field(default_factory=new_id)
    created_at: str = dataclasses.field(default_factory=utc_now)

    def lines(self) -> Iterator[str]:
        """Yield what is printed of it: a line for each, beside the winner's time."""
        measured = any(contender.label is Label.MEASURED for contender in self.contenders)
        how = "measured in turn, in one process, on" if measured else "predicted for"
        yield f"side by side, {how} {self.device_kind}:"
        first = self.contenders[0].time_ms
        for contender in self.contenders:
            shown = f"  {contender.name}: "
            if contender.time_ms is None:
                yield f"{shown}no time ({contender.error})"
                continue
            times = ""
            if first and contender.name != "winner":
                ratio = contender.time_ms / first
                times = f", {ratio:.2f} times the winner's" + (": it is faster" if ratio < 1 else "")
            notes = "".join(f"; {note}" for note in contender.notes)
            config = f" ({contender.config})" if contender.config else ""
            yield f"{shown}{contender.time_ms:.4g} ms{times}{config}{notes}"
