"""The record of a self-check: the file that is sent, and that `python -m tuning.validate measured=` reads."""

import getpass
import os
import re
import socket
import statistics
from collections.abc import Mapping
from typing import Any

import msgspec

from splash_workbench.files import user_path
from splash_workbench.trial_status import Status

#: An absolute path of two parts or more; an address on the Internet begins otherwise.
_PATH = re.compile(r"(?<![\w/:.])/[\w.+@~-]+(?:/[\w.+@~-]+)+/?")
_IP_ADDRESS = re.compile(r"\b\d{1,3}(?:\.\d{1,3}){3}\b")
_MAX_ERROR_CHARACTERS = 400


class Predicted(msgspec.Struct, frozen=True, kw_only=True):
    """A prediction, or why there is none.

    Attributes:
      time_ms: None where there is none.
      interval_ms: low and high; None where the prediction states none.
      says: where it is from, or why there is none.
    """

    time_ms: float | None = None
    interval_ms: tuple[float, float] | None = None
    says: str = ""


class TimedRow(msgspec.Struct, frozen=True, kw_only=True):
    """One call that was timed. The fields up to `notes` are those of a measured row of `tuning.validate`.

    Attributes:
      part, name: of the self-check.
      kernel_time_ms: of the Pallas kernel in it.
      reported_ms: what others measured of the same call on such a chip.
      predicted: beside it.
    """

    id: str
    source: str
    device_kind: str
    op: str
    arguments: dict[str, Any]
    config: dict[str, Any]
    times_ms: tuple[float, ...]
    notes: tuple[str, ...] = ()
    part: str = ""
    name: str = ""
    kernel_time_ms: float | None = None
    reported_ms: float | None = None
    predicted: Predicted = Predicted()

    @property
    def task(self) -> str:
        """Id of the task that it came of; its own is unique among the files of other days and chips."""
        return f"{self.part}: {self.name}"

    @property
    def time_ms(self) -> float:
        """Median of the times."""
        return statistics.median(self.times_ms)

    @property
    def on_the_device(self) -> bool:
        """Whether the times are the device's own, by the profiler."""
        return not any(note.startswith("wall time") for note in self.notes)

    @property
    def verdict(self) -> str:
        """What the time says of the prediction."""
        predicted = self.predicted
        if predicted.time_ms is None:
            return f"no prediction ({predicted.says})"
        if not self.on_the_device:
            return "not judged: wall time, dispatch included"
        if predicted.interval_ms is None:
            return f"predicted {predicted.time_ms / self.time_ms - 1:+.1%}; no interval is stated"
        if self.inside:
            return "within the interval"
        low, high = predicted.interval_ms
        end, side = (low, "under") if self.time_ms < low else (high, "over")
        return f"outside by {abs(self.time_ms / end - 1):.1%}, {side} it"

    @property
    def inside(self) -> bool | None:
        """Whether the time lies within the interval; None where that cannot be judged."""
        if self.predicted.interval_ms is None or not self.on_the_device:
            return None
        return self.predicted.interval_ms[0] <= self.time_ms <= self.predicted.interval_ms[1]


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """A result that was right, and by how much."""

    id: str
    name: str
    says: str


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What was tried and did not end well."""

    id: str
    part: str
    name: str
    status: Status
    error: str


class SelfCheck(msgspec.Struct, frozen=True, kw_only=True):
    """All that a self-check has found. `rows` is what `tuning.validate` reads.

    Attributes:
      environment: see `tuning.selfcheck.jobs.environment`; empty where that failed.
      left_out: part -> why it does not apply here.
    """

    schema_version: int = 1
    source: str = "tuning.selfcheck"
    created_at: str = ""
    device_kind: str = "unknown"
    environment: dict[str, Any] = {}
    checks: tuple[Check, ...] = ()
    rows: tuple[TimedRow, ...] = ()
    failures: tuple[Failure, ...] = ()
    left_out: dict[str, str] = {}

    @property
    def done(self) -> set[str]:
        """Ids of what need not be done again."""
        return {check.id for check in self.checks} | {row.task for row in self.rows}

    def same_place(self, environment: Mapping[str, Any]) -> bool:
        """Return whether its times are of these chips, compilers, flags and kernel."""
        names = ("device_kind", "num_devices", "versions", "flags", "kernel_hash", "backend_hash")
        return all(self.environment.get(name) == environment.get(name) for name in names)


def file_name(device_kind: str, date: str) -> str:
    """Return e.g. "selfcheck-tpu-v6-lite-2026-11-26.json"."""
    return f"selfcheck-{re.sub(r'[^a-z0-9]+', '-', device_kind.lower()).strip('-')}-{date}.json"


def anonymous(text: str) -> str:
    """Return a text of a program or compiler without paths, addresses, and the names of machine and user."""
    text = _IP_ADDRESS.sub("ADDRESS", _PATH.sub("PATH", text.replace(str(user_path("~")), "HOME")))
    for name in {_user(), socket.gethostname(), socket.getfqdn(), socket.gethostname().partition(".")[0]}:
        if len(name) > 1:
            text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "NAME", text)
    return text


def anonymous_tree(tree: Any) -> Any:
    """Return JSON with `anonymous` applied to every text in it but the keys."""
    if isinstance(tree, str):
        return anonymous(tree)
    if isinstance(tree, Mapping):
        return {name: anonymous_tree(value) for name, value in tree.items()}
    return [anonymous_tree(value) for value in tree] if isinstance(tree, list | tuple) else tree


def failure_text(error: str | None) -> str:
    """Return an error as it may be sent."""
    return anonymous(error or "no reason given")[:_MAX_ERROR_CHARACTERS]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in some containers
        return os.environ.get("USER", "")
