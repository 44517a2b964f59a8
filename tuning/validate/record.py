"""The record of `python -m tuning.validate`, which the report reads."""

from pathlib import Path
from typing import Any, Self

import msgspec

from offline_tpu import Prediction
from splash_workbench.trial_status import Label
from tuning.trials.reported import DEFAULT_PATH, Reported, ReportedRow
from tuning.validate.agreement import Pair, Summary


class OpTime(msgspec.Struct, frozen=True):
    """One op of a prediction; the fields are those of offline_tpu's OpCost."""

    name: str
    time_s: float
    cycles: int
    bound: str


class Comparison(ReportedRow, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """One reported time and the prediction for the same call.

    Attributes:
      reported_ms: the row's median_time_ms.
      predicted_ms: None where the call could not be predicted; `error` then says why.
      ratio: predicted over reported.
      bound: what limits the op that takes longest: compute, hbm or link.
      ops: the parts of the prediction, longest first.
      unresolved: what the prediction had to assume.
    """

    reported_ms: float
    predicted_ms: float | None = None
    ratio: float | None = None
    bound: str | None = None
    ops: tuple[OpTime, ...] = ()
    unresolved: tuple[str, ...] = ()
    error: str | None = None

    @classmethod
    def failed(cls, row: ReportedRow, error: str | None) -> Self:
        """Return the comparison of a row that could not be predicted; without an error, of one that was not."""
        return cls(**row.to_dict(), reported_ms=row.median_time_ms, error=error)

    @classmethod
    def predicted(cls, row: ReportedRow, prediction: Prediction) -> Self:
        """Return the comparison of a row with its prediction."""
        ops = sorted(prediction.ops, key=lambda op: -op.time_s)
        predicted_ms = prediction.time_s * 1e3
        return cls(
            **row.to_dict(),
            reported_ms=row.median_time_ms,
            predicted_ms=predicted_ms,
            ratio=predicted_ms / row.median_time_ms,
            bound=ops[0].bound,
            ops=tuple(OpTime(op.name, op.time_s, op.cycles, op.bound) for op in ops),
            unresolved=tuple(f"{op.name}: {text}" for op in ops for text in op.unresolved),
        )


def pair_of(comparison: Comparison, group: str) -> Pair | None:
    """Return both times of a comparison; None where the call could not be predicted."""
    if comparison.predicted_ms is None:
        return None
    name, times = f"{comparison.shape} {comparison.config}", (comparison.reported_ms, comparison.predicted_ms)
    return Pair(group, name, Label.REPORTED, *times, comparison.unresolved)


class Validation(Summary, frozen=True, kw_only=True):
    """All comparisons and what they come to.

    Attributes:
      source, device_kind: of the reported times.
      libtpu: what predicted; None where only the reported times are known.
      measured: the same of trials that were both measured and predicted: a summary, and its pairs.
      picture: path of the parity plot.
    """

    source: str
    device_kind: str
    libtpu: str | None
    rows: tuple[Comparison, ...]
    measured: dict[str, Any] | None = None
    picture: str | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `python -m tuning.validate` wrote; where there is no file, return the reported times alone.

        Raises:
          ValueError: the file is not of that form; the message gives the path of the field.
        """
        if not path.exists():
            reported = Reported.read(DEFAULT_PATH)
            rows = tuple(Comparison.failed(row, None) for row in reported.rows)
            return cls(source=reported.source, device_kind=reported.device_kind, libtpu=None, rows=rows)
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except msgspec.DecodeError as error:
            raise ValueError(f"{path}: {error}; write it with `python -m tuning.validate json={path}`.") from error
