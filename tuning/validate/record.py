"""The record of `python -m tuning.validate`, which the report reads."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from offline_tpu import Prediction
from offline_tpu.machine import devices, residuals
from splash_workbench.trial_status import Label
from tuning.trials.reported import DEFAULT_PATH
from tuning.validate.agreement import Pair, Summary, summarize
from tuning.validate.rows import SPLASH, MeasuredRow, read
from tuning.validate.sets import SIZES

#: A row's error beyond which it is listed with what bounds it.
LISTED_ERROR = 0.15
#: By how much the memory of a program may differ from the reported, and be the program that was timed. Where they are
#: the same, nearly all agree to a thousandth.
_SAME_MEMORY = 0.002
#: Bytes of a megabyte, in later rows of tokamax's and in earlier ones, which do not say so.
_MEGABYTES = (10**6, 2**20)
_OPS_KEPT = 5
_UNRESOLVED_KEPT = 5


class OpTime(msgspec.Struct, frozen=True):
    """One op of a prediction; the fields are those of offline_tpu's OpCost."""

    name: str
    time_s: float
    cycles: int
    bound: str


def has_memory(reported_mb: float | None, compiled_mb: float) -> bool:
    """Return whether a program holds as much memory as was reported; where nothing was, it may."""
    return memory_difference(reported_mb, compiled_mb) <= _SAME_MEMORY


def memory_difference(reported_mb: float | None, compiled_mb: float) -> float:
    """Return |compiled / reported - 1| of the memory, in the unit that brings them nearest; 0 where none is told."""
    if reported_mb is None:
        return 0.0
    return min(abs(compiled_mb * 10**6 / (reported_mb * unit) - 1) for unit in _MEGABYTES)


class RowPrediction(msgspec.Struct, frozen=True, kw_only=True):
    """The predicted time of a row's program.

    Attributes:
      predicted_ms: of the whole program.
      bound: what limits the op that takes longest: compute, hbm or link; bottleneck: the unit that does.
      shares: of the time, by the ops' categories, the largest first.
      ops: the longest, the longest first.
      unresolved: what the prediction had to assume, the first few; unresolved_count: all.
      compiled_memory_mb: the most HBM that the program holds, 10^6 bytes.
      form: in words, how an earlier compiler made the program; empty: as this one does.
    """

    predicted_ms: float
    bound: str
    bottleneck: str
    shares: dict[str, float]
    ops: tuple[OpTime, ...]
    unresolved: tuple[str, ...] = ()
    unresolved_count: int = 0
    compiled_memory_mb: float
    form: str = ""

    @classmethod
    def of(cls, prediction: Prediction, form: str = "") -> Self:
        """Return what a record keeps of a prediction of a program in that form."""
        ops = sorted(prediction.ops, key=lambda op: -op.time_s)
        sums: dict[str, float] = {}
        for op in ops:
            sums[op.category] = sums.get(op.category, 0.0) + op.time_s
        longest_first = sorted(sums.items(), key=lambda item: -item[1])
        return cls(
            predicted_ms=prediction.time_s * 1e3,
            bound=ops[0].bound if ops else "compute",
            bottleneck=ops[0].bottleneck if ops else "scalar unit",
            shares={name: time_s / prediction.time_s for name, time_s in longest_first if time_s},
            ops=tuple(OpTime(op.name, op.time_s, op.cycles, op.bound) for op in ops[:_OPS_KEPT]),
            unresolved=tuple(text[:200] for text in prediction.unresolved[:_UNRESOLVED_KEPT]),
            unresolved_count=len(prediction.unresolved),
            compiled_memory_mb=prediction.peak_live_bytes / 1e6,
            form=form,
        )


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """One row beside the prediction for the same call.

    Attributes:
      id, device_kind, op, compiler_options, p_state: of the row; shape, config: in words.
      reported_ms: median of its times.
      status: predicted; failed: its program does not compile, or cannot be read; unmade: it cannot be made again;
        reported: it was not tried.
      ratio: predicted over reported; abs_error: |ratio - 1|.
      error: why there is no prediction.
      interval_ms: between which four fifths of the measured times of such work lie; None without a prediction.
      reported_memory_mb: of the row; same_memory: whether the program holds as much. One that does not is not the one
        that was timed, but what this compiler makes of the same op. None: not known.
      libtpu: version of the compiler that made the program here; timed_with: of the one that made what was timed, as
        far as it is known.
      The others: see RowPrediction.
    """

    id: str
    device_kind: str
    op: str
    shape: str
    config: str
    reported_ms: float
    status: Literal["predicted", "failed", "unmade", "reported"]
    predicted_ms: float | None = None
    ratio: float | None = None
    abs_error: float | None = None
    error: str | None = None
    interval_ms: tuple[float, float] | None = None
    bound: str | None = None
    bottleneck: str | None = None
    shares: dict[str, float] = {}
    ops: tuple[OpTime, ...] = ()
    unresolved: tuple[str, ...] = ()
    unresolved_count: int = 0
    compiler_options: dict[str, str] = {}
    p_state: int | None = None
    reported_memory_mb: float | None = None
    compiled_memory_mb: float | None = None
    same_memory: bool | None = None
    form: str = ""
    libtpu: str | None = None
    timed_with: str | None = None

    @classmethod
    def predicted(cls, row: MeasuredRow, prediction: RowPrediction, compiler: str) -> Self:
        """Return the comparison of a row with its prediction, which that version of libtpu made."""
        ratio = prediction.predicted_ms / row.time_ms
        low, high = residuals.factors(devices.by_name(row.device_kind).name, prediction.shares)
        return cls(
            **_fields(row),
            **msgspec.structs.asdict(prediction),
            status="predicted",
            libtpu=compiler,
            ratio=ratio,
            abs_error=abs(ratio - 1),
            interval_ms=(low * prediction.predicted_ms, high * prediction.predicted_ms),
            same_memory=has_memory(row.peak_memory_mb, prediction.compiled_memory_mb) if row.peak_memory_mb else None,
        )

    @classmethod
    def without(
        cls, row: MeasuredRow, status: Literal["failed", "unmade", "reported"], error: str | None = None
    ) -> Self:
        """Return the comparison of a row that is not predicted."""
        return cls(**_fields(row), status=status, error=error)

    @property
    def pair(self) -> Pair | None:
        """Return both times; None where the row could not be predicted."""
        if self.predicted_ms is None:
            return None
        return Pair(
            group=self.op,
            name=f"{self.shape} {self.config}" if self.op == SPLASH else self.id,
            label=Label.REPORTED,
            actual_ms=self.reported_ms,
            predicted_ms=self.predicted_ms,
            notes=self.unresolved,
            device_kind=self.device_kind,
            interval_ms=self.interval_ms,
        )


def _fields(row: MeasuredRow) -> dict[str, Any]:
    names = ("id", "device_kind", "op", "compiler_options", "p_state", "shape", "timed_with")
    reported = {"config": row.settings, "reported_ms": row.time_ms, "reported_memory_mb": row.peak_memory_mb}
    return {name: getattr(row, name) for name in names} | reported


class Group(Summary, frozen=True, kw_only=True):
    """How good the predictions of one program on one chip are.

    Attributes:
      other_memory_count: predicted rows whose program does not hold the memory that was reported: another compiler made
        what was timed.
    """

    op: str
    device_kind: str
    other_memory_count: int = 0


class Validation(Summary, frozen=True, kw_only=True):
    """All comparisons of a set and what they come to.

    Attributes:
      name: of the set, or of the file or folder of rows.
      sources: of the reported times.
      versions: of Python and of the packages that predicted; empty where only the reported times are known.
      groups: by program and chip.
      measured: the same of trials that were both measured and predicted: a summary, and its pairs.
      picture: file name of the parity plot, which lies beside the record.
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[Comparison, ...]
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    groups: tuple[Group, ...] = ()
    measured: dict[str, Any] | None = None
    picture: str | None = None

    @property
    def device_kinds(self) -> tuple[str, ...]:
        """Return the chips of the rows, in their order."""
        return tuple(dict.fromkeys(row.device_kind for row in self.rows))

    @property
    def compilers(self) -> dict[str, int]:
        """Return how many rows each libtpu compiled."""
        return dict(collections.Counter(row.libtpu for row in self.rows if row.libtpu))

    @property
    def chips(self) -> tuple[Group, ...]:
        """Return the same by chip, all programs together."""
        kinds = sorted({row.device_kind for row in self.rows})
        return tuple(_group("all", kind, (row for row in self.rows if row.device_kind == kind)) for kind in kinds)

    @property
    def listed(self) -> tuple[Comparison, ...]:
        """Return the rows that are off by more than LISTED_ERROR, the worst first."""
        off = [row for row in self.rows if row.abs_error is not None and row.abs_error > LISTED_ERROR]
        return tuple(sorted(off, key=lambda row: -(row.abs_error or 0.0)))

    @classmethod
    def of(cls, name: str, rows: Sequence[Comparison], **fields: Any) -> Self:
        """Return the comparisons with their figures."""
        pairs = dict.fromkeys((row.op, row.device_kind) for row in rows)
        groups = [
            _group(op, kind, (row for row in rows if (row.op, row.device_kind) == (op, kind)))
            for op, kind in sorted(pairs)
        ]
        return cls(name=name, rows=tuple(rows), groups=tuple(groups), **_summary(rows), **fields)

    @classmethod
    def reported_alone(cls) -> Self:
        """Return the rows of the set "splash" without predictions."""
        rows = read(DEFAULT_PATH)
        return cls.of("splash", [Comparison.without(row, "reported") for row in rows], sources=(rows[0].source,))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `python -m tuning.validate` wrote.

        Raises:
          ValueError: the file is not of that form; the message gives the path of the field.
        """
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: {error}; write it again with `python -m tuning.validate`.") from error


def on_record(path: Path) -> Path | None:
    """Return the file of the widest set in a folder, or the path itself if it is a file; None where there is none."""
    if not path.is_dir():
        return path if path.exists() else None
    return next((file for name in reversed(SIZES) if (file := path / f"{name}.json").exists()), None)


def _group(op: str, kind: str, rows: Iterable[Comparison]) -> Group:
    rows = list(rows)
    others = sum(row.same_memory is False for row in rows)
    return Group(op=op, device_kind=kind, other_memory_count=others, **_summary(rows))


def _summary(rows: Iterable[Comparison]) -> dict[str, Any]:
    rows = list(rows)
    statuses = [row.status for row in rows]
    summary = summarize(
        [pair for row in rows if (pair := row.pair)], statuses.count("failed"), statuses.count("unmade")
    )
    return msgspec.structs.asdict(summary)
