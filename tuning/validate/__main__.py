"""Predicted times against those of real chips, reported or measured: `python -m tuning.validate --help`."""

import concurrent.futures
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING
from tqdm import tqdm

import offline_tpu
from offline_tpu.machine import devices
from splash_workbench import cli, provenance
from splash_workbench.errors import from_config
from splash_workbench.status import Label, Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import JOBS_PER_WORKER, Outcome, Runner, core_count
from tuning.trials import records
from tuning.trials.reported import DEFAULT_PATH, Reported, ReportedRow
from tuning.validate import agreement
from tuning.validate.agreement import Pair, Summary, pairs_of, summarize

_JOB = "tuning.validate.tokamax_op:predict_row"
_SOURCES = (*offline_tpu.SOURCES, "tuning/validate/tokamax_op.py")
_LISTED_OPS = 3


@dataclasses.dataclass
class ValidateSchema:
    """Fields of configs/validate.yaml."""

    measured: str | None = None
    workers: int | None = None
    timeout_s: float = MISSING
    results_dir: str = MISSING
    cache: bool = MISSING
    json: str | None = None
    progress: bool = MISSING


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One reported time and the prediction for the same call.

    Attributes:
      row: the call and its reported time.
      predicted_ms: None where the call could not be predicted; `error` then says why.
      bound: what limits the op that takes longest: compute, hbm or link.
      ops: the parts of the prediction, longest first.
      unresolved: what the prediction had to assume.
    """

    row: ReportedRow
    predicted_ms: float | None
    bound: str | None
    ops: tuple[dict[str, Any], ...]
    unresolved: tuple[str, ...]
    error: str | None

    @property
    def ratio(self) -> float | None:
        """Predicted over reported."""
        return None if self.predicted_ms is None else self.predicted_ms / self.row.median_time_ms

    def pair(self, group: str) -> Pair | None:
        """None where the call could not be predicted."""
        if self.predicted_ms is None:
            return None
        return Pair(
            group=group,
            name=f"{self.row.shape} {self.row.config}",
            label=Label.REPORTED,
            actual_ms=self.row.median_time_ms,
            predicted_ms=self.predicted_ms,
            notes=self.unresolved,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.row.to_dict(),
            "reported_ms": self.row.median_time_ms,
            "predicted_ms": self.predicted_ms,
            "ratio": self.ratio,
            "bound": self.bound,
            "ops": [{name: op[name] for name in ("name", "time_s", "cycles", "bound")} for op in self.ops],
            "unresolved": list(self.unresolved),
            "error": self.error,
        }


def compare(
    reported: Reported,
    *,
    runner: Runner,
    cache: JobCache | None,
    workers: int,
    timeout_s: float,
    progress: bool = False,
) -> list[Comparison]:
    """Predicts every row, in worker processes. A row that cannot be predicted is in the list with its error.

    Raises:
      ValueError: the rows are of a device that is not known.
    """
    device = devices.by_name(reported.device_kind)
    captured = provenance.capture(offline_tpu.SOURCES)
    dependencies = {"versions": captured.versions, "sources": provenance.source_hash(_SOURCES)}

    def compare_one(row: ReportedRow) -> Comparison:
        # The job must not know the time, and a new time is no new compilation.
        payload = {"row": row.to_dict() | {"median_time_ms": 1.0}, "device": device.name}
        key = JobCache.key(_JOB, payload, dependencies)

        def run() -> Outcome:
            return runner.run(
                _JOB,
                payload,
                timeout_s=timeout_s,
                variables=lambda worker_dir: offline_tpu.worker_environment(device, worker_dir / "dump"),
            )

        outcome = cache.outcome(key, run)[0] if cache else run()
        if outcome.status is not Status.OK:
            return Comparison(row, None, None, (), (), f"{outcome.status}: {outcome.error}")
        prediction = outcome.result
        ops = sorted(prediction["ops"], key=lambda op: -op["time_s"])
        unresolved = tuple(f"{op['name']}: {text}" for op in ops for text in op["unresolved"])
        return Comparison(row, prediction["time_s"] * 1e3, ops[0]["bound"], tuple(ops), unresolved, None)

    bar = tqdm(total=len(reported.rows), disable=not progress, unit="row", leave=False)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, bar:
        futures = [pool.submit(compare_one, row) for row in reported.rows]
        try:
            for _ in concurrent.futures.as_completed(futures):
                bar.update()
            return [future.result() for future in futures]
        finally:
            runner.cancel()


def _lines(reported: Reported, comparisons: Sequence[Comparison], summary: Summary) -> list[str]:
    width = max(len(c.row.shape) for c in comparisons)
    config_width = max(len(c.row.config) for c in comparisons)
    lines = [
        f"reported: {reported.source}",
        f"predicted: this machine, libtpu {offline_tpu.SUPPORTED_LIBTPU}, for {reported.device_kind}",
        "",
        f"{'batch x seq x heads x dim':<{max(width, 25)}}  {'configuration':<{config_width}}  {'reported':>9}  "
        f"{'predicted':>9}  {'ratio':>6}  {'bound':<8}longest ops (predicted ms)",
    ]
    for c in comparisons:
        head = f"{c.row.shape:<{max(width, 25)}}  {c.row.config:<{config_width}}  {c.row.median_time_ms:>9.3f}  "
        if c.predicted_ms is None:
            lines.append(f"{head}{'-':>9}  {'-':>6}  {c.error}")
            continue
        ops = ", ".join(f"{op['name']} {op['time_s'] * 1e3:.3f}" for op in c.ops[:_LISTED_OPS])
        lines.append(f"{head}{c.predicted_ms:>9.3f}  {c.ratio:>6.3f}  {c.bound:<8}{ops}")
        lines.extend(f"  not known: {text}" for text in c.unresolved)
    lines += ["", summary.line]
    if summary.failed_count:
        lines.append(f"{summary.failed_count} of {len(comparisons)} rows could not be predicted")
    return lines


def _measured_lines(pairs: Sequence[Pair], results_dir: Path) -> list[str]:
    if not pairs:
        return [f"measured: no candidate in {results_dir} has been both measured and predicted"]
    width = max(len(pair.name) for pair in pairs)
    lines = [f"measured: records in {results_dir}, joined with the predictions of the same candidates"]
    lines.append(f"{'':<{width}}  {'measured':>9}  {'predicted':>9}  {'ratio':>6}")
    for pair in sorted(pairs, key=lambda pair: pair.name):
        lines.append(f"{pair.name:<{width}}  {pair.actual_ms:>9.3f}  {pair.predicted_ms:>9.3f}  {pair.ratio:>6.3f}")
        lines.extend(f"  {note}" for note in pair.notes)
    for group in dict.fromkeys(pair.group for pair in pairs):
        lines.append(f"{group}: {summarize([pair for pair in pairs if pair.group == group]).line}")
    return lines


@cli.command("validate", ValidateSchema)
def main(settings: ValidateSchema) -> int:
    """Run the command; return its exit code."""
    path = Path(settings.measured) if settings.measured else DEFAULT_PATH
    results_dir = Path(settings.results_dir)
    reported = from_config(lambda: Reported.read(path))
    from_config(lambda: devices.by_name(reported.device_kind))
    measured = from_config(lambda: pairs_of(records.read_all(results_dir)))
    with tempfile.TemporaryDirectory() as work_dir:
        comparisons = compare(
            reported,
            runner=Runner(Path(work_dir), jobs_per_worker=JOBS_PER_WORKER),
            cache=JobCache.of_user(settings.cache),
            workers=settings.workers or core_count(),
            timeout_s=settings.timeout_s,
            progress=settings.progress,
        )
    group = f"reported, {path.name}"
    pairs = [pair for comparison in comparisons if (pair := comparison.pair(group))]
    summary = summarize(pairs, len(comparisons) - len(pairs))
    print("\n".join([*_lines(reported, comparisons, summary), "", *_measured_lines(measured, results_dir)]))
    picture = results_dir / "validate" / f"{path.stem}.png"
    if pairs or measured:
        title = f"Predicted by libtpu {offline_tpu.SUPPORTED_LIBTPU} on a machine without the chip, against real chips"
        agreement.draw([*pairs, *measured], picture, title)
        print(f"picture: {picture}")
    cli.write_json(
        settings.json,
        {
            "source": reported.source,
            "device_kind": reported.device_kind,
            "libtpu": offline_tpu.SUPPORTED_LIBTPU,
            **dataclasses.asdict(summary),
            "rows": [c.to_dict() for c in comparisons],
            "measured": {
                **dataclasses.asdict(summarize(measured)),
                "rows": [dataclasses.asdict(pair) | {"ratio": pair.ratio} for pair in measured],
            },
            "picture": str(picture) if pairs or measured else None,
        },
    )
    return 1 if summary.failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
