"""Predicted times against those of real chips, reported or measured: `python -m tuning.validate --help`."""

import concurrent.futures
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from omegaconf import MISSING
from tqdm import tqdm

import offline_tpu
from offline_tpu.machine import devices
from splash_workbench import cli, provenance
from splash_workbench.errors import from_config
from splash_workbench.files import require_writable
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import JOBS_PER_WORKER, Outcome, Runner
from splash_workbench.workers.room import check_timeout_s, worker_count
from tuning.trials import records
from tuning.trials.figures import save_png
from tuning.trials.reported import DEFAULT_PATH, Reported, ReportedRow
from tuning.validate.agreement import Pair, Summary, pairs_of, parity, summarize
from tuning.validate.record import Comparison, Validation, pair_of

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


def compare(
    reported: Reported,
    *,
    runner: Runner,
    cache: JobCache | None,
    workers: int,
    timeout_s: float,
    progress: bool = False,
) -> list[Comparison]:
    """Predict every row, in worker processes. A row that cannot be predicted is in the list with its error.

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

        def run_job() -> Outcome:
            return runner.run(
                _JOB,
                payload,
                timeout_s=timeout_s,
                variables=lambda worker_dir: offline_tpu.worker_environment(device, worker_dir / "dump"),
            )

        outcome = cache.outcome(key, run_job)[0] if cache else run_job()
        if outcome.status is not Status.OK:
            return Comparison.failed(row, f"{outcome.status}: {outcome.error}")
        return Comparison.predicted(row, jsonl.decode(outcome.result, offline_tpu.Prediction))

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
    width = max(len(c.shape) for c in comparisons)
    config_width = max(len(c.config) for c in comparisons)
    lines = [
        f"reported: {reported.source}",
        f"predicted: this machine, libtpu {offline_tpu.SUPPORTED_LIBTPU}, for {reported.device_kind}",
        "",
        f"{'batch x seq x heads x dim':<{max(width, 25)}}  {'configuration':<{config_width}}  {'reported':>9}  "
        f"{'predicted':>9}  {'ratio':>6}  {'bound':<8}longest ops (predicted ms)",
    ]
    for c in comparisons:
        head = f"{c.shape:<{max(width, 25)}}  {c.config:<{config_width}}  {c.reported_ms:>9.3f}  "
        if c.predicted_ms is None:
            lines.append(f"{head}{'-':>9}  {'-':>6}  {c.error}")
            continue
        ops = ", ".join(f"{op.name} {op.time_s * 1e3:.3f}" for op in c.ops[:_LISTED_OPS])
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
    offline_tpu.check_versions()
    workers = from_config(lambda: worker_count(settings.workers))
    from_config(lambda: check_timeout_s(settings.timeout_s))
    path = Path(settings.measured) if settings.measured else DEFAULT_PATH
    results_dir = Path(settings.results_dir)
    require_writable(f"results_dir={results_dir}", results_dir)
    reported = from_config(lambda: Reported.read(path))
    from_config(lambda: devices.by_name(reported.device_kind))
    measured = from_config(lambda: pairs_of(records.read_all(results_dir)))
    with tempfile.TemporaryDirectory() as work_dir:
        comparisons = compare(
            reported,
            runner=Runner(Path(work_dir), jobs_per_worker=JOBS_PER_WORKER),
            cache=JobCache.of_user(settings.cache),
            workers=workers,
            timeout_s=settings.timeout_s,
            progress=settings.progress,
        )
    group = f"reported, {path.name}"
    pairs = [pair for comparison in comparisons if (pair := pair_of(comparison, group))]
    summary = summarize(pairs, len(comparisons) - len(pairs))
    print("\n".join([*_lines(reported, comparisons, summary), "", *_measured_lines(measured, results_dir)]))
    picture = results_dir / "validate" / f"{path.stem}.png"
    if pairs or measured:
        save_png(parity([*pairs, *measured]), picture)
        print(f"picture: {picture}")
    validation = Validation(
        source=reported.source,
        device_kind=reported.device_kind,
        libtpu=offline_tpu.SUPPORTED_LIBTPU,
        **jsonl.encode(summary),
        rows=tuple(comparisons),
        measured={
            **jsonl.encode(summarize(measured)),
            "rows": [jsonl.encode(pair) | {"ratio": pair.ratio} for pair in measured],
        },
        picture=str(picture) if pairs or measured else None,
    )
    cli.write_json(settings.json, jsonl.encode(validation))
    return 1 if summary.failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
