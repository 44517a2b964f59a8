"""Every reported time against a prediction of the same call: `python -m tuning.validate --help`."""

import concurrent.futures
import dataclasses
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig
from tqdm import tqdm

from splash_attn import device as devices
from splash_attn.platform import quiet_jax_without_accelerator
from tuning import cli, environment, offline
from tuning.job_cache import JobCache
from tuning.reported import DEFAULT_PATH, Reported, ReportedRow
from tuning.runner import JOBS_PER_WORKER, Runner
from tuning.status import Status
from tuning.sweep_config import core_count

_JOB = "tuning.tokamax_op:predict_row"
_SOURCES = (*environment.BACKEND_SOURCES["offline"], "tuning/tokamax_op.py")
_LISTED_OPS = 3


@dataclasses.dataclass
class ValidateSchema:
    """Fields of configs/validate.yaml."""

    measured: str | None = None
    workers: int | None = None
    timeout_s: float = MISSING
    results_dir: str = MISSING
    json: str | None = None
    progress: bool = MISSING


cli.store_schema("validate_schema", ValidateSchema)


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


@dataclasses.dataclass(frozen=True)
class Summary:
    """How good the predictions are.

    Attributes:
      row_count: rows compared; failed_count: rows without a prediction, in none of the figures below.
      median_abs_error, max_abs_error: of |predicted / reported - 1|.
      spearman: rank correlation of predicted and reported times; None where all times of one kind are the same.
    """

    row_count: int
    failed_count: int
    median_abs_error: float | None
    max_abs_error: float | None
    spearman: float | None


def compare(
    reported: Reported, *, runner: Runner, cache: JobCache, workers: int, timeout_s: float, progress: bool = False
) -> list[Comparison]:
    """Predicts every row, in worker processes. A row that cannot be predicted is in the list with its error.

    Raises:
      ValueError: the rows are of a device that is not known.
    """
    device = devices.by_name(reported.device_kind)
    captured = environment.capture("offline")
    dependencies = {"versions": captured.versions, "sources": environment.source_hash(_SOURCES)}

    def compare_one(row: ReportedRow) -> Comparison:
        fields = row.to_dict() | {
            "median_time_ms": 1.0
        }  # the job must not know, and a new figure is no new compilation
        payload = {"row": fields, "device": device.name}
        key = cache.key(_JOB, payload, dependencies)
        prediction = cache.get(key)
        if prediction is None:
            outcome = runner.run(
                _JOB,
                payload,
                timeout_s=timeout_s,
                variables=lambda job_dir: offline.worker_environment(device, job_dir / "dump"),
            )
            if outcome.status is not Status.OK:
                return Comparison(row, None, None, (), (), f"{outcome.status}: {outcome.error}")
            prediction = outcome.result
            cache.put(key, prediction)
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


def summarize(comparisons: Sequence[Comparison]) -> Summary:
    """The figures of the rows that have a prediction."""
    ratios = [c.ratio for c in comparisons if c.ratio is not None]
    errors = [abs(ratio - 1) for ratio in ratios]
    compared = [(c.predicted_ms, c.row.median_time_ms) for c in comparisons if c.predicted_ms is not None]
    return Summary(
        row_count=len(ratios),
        failed_count=len(comparisons) - len(ratios),
        median_abs_error=statistics.median(errors) if errors else None,
        max_abs_error=max(errors, default=None),
        spearman=spearman([p for p, _ in compared], [r for _, r in compared]),
    )


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Rank correlation: Pearson's, of the ranks, ties sharing their mean rank. None where one side does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(_ranks(x), _ranks(y))


def _ranks(values: Sequence[float]) -> list[float]:
    return [(sum(v < x for v in values) + sum(v <= x for v in values) + 1) / 2 for x in values]


def _lines(reported: Reported, comparisons: Sequence[Comparison], summary: Summary) -> list[str]:
    width = max(len(c.row.shape) for c in comparisons)
    config_width = max(len(c.row.config) for c in comparisons)
    lines = [
        f"reported: {reported.source}",
        f"predicted: this machine, libtpu {offline.SUPPORTED_LIBTPU}, for {reported.device_kind}",
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
    lines.append("")
    if summary.median_abs_error is not None and summary.max_abs_error is not None:
        correlation = "-" if summary.spearman is None else f"{summary.spearman:.3f}"
        lines.append(
            f"{summary.row_count} rows: median error {summary.median_abs_error:.1%}, "
            f"worst {summary.max_abs_error:.1%}, Spearman {correlation}"
        )
    if summary.failed_count:
        lines.append(f"{summary.failed_count} of {len(comparisons)} rows could not be predicted")
    return lines


def _command(config: DictConfig) -> int:
    path = Path(config.measured) if config.measured else DEFAULT_PATH
    reported = cli.from_config(lambda: Reported.read(path))
    cli.from_config(lambda: devices.by_name(reported.device_kind))
    with tempfile.TemporaryDirectory() as work_dir:
        comparisons = compare(
            reported,
            runner=Runner(Path(work_dir), jobs_per_worker=JOBS_PER_WORKER),
            cache=JobCache(Path(config.results_dir) / ".cache"),
            workers=config.workers or core_count(),
            timeout_s=config.timeout_s,
            progress=config.progress,
        )
    summary = summarize(comparisons)
    print("\n".join(_lines(reported, comparisons, summary)))
    cli.write_json(
        config.json,
        {
            "source": reported.source,
            "device_kind": reported.device_kind,
            "libtpu": offline.SUPPORTED_LIBTPU,
            **dataclasses.asdict(summary),
            "rows": [c.to_dict() for c in comparisons],
        },
    )
    return 1 if summary.failed_count else 0


def main() -> int:
    """The command line."""
    quiet_jax_without_accelerator()
    return cli.run("validate", _command)


if __name__ == "__main__":
    sys.exit(main())
