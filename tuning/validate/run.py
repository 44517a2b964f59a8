"""Predicts measured rows in worker processes, each kept as soon as it is made."""

import concurrent.futures
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import offline_tpu
from offline_tpu.machine import devices
from splash_workbench import provenance
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import Outcome, Runner
from tuning.validate.record import Comparison, RowPrediction
from tuning.validate.rows import MeasuredRow

_JOB = "tuning.validate.job:predict_row"
#: The sources that make the rows' programs.
MAKERS = tuple(f"tuning/validate/{name}.py" for name in ("plain", "programs", "splash"))
#: The sources that make a prediction.
SOURCES = (*offline_tpu.SOURCES, "tuning/validate/job.py", *MAKERS)


def dump_path(dumps: Path, row: MeasuredRow) -> Path:
    """Return where the dump of a row's program is kept. Raises ValueError for a chip that is not known."""
    payload = {"call": row.call, "device": devices.by_name(row.device_kind).name}
    return dumps / f"{JobCache.key(_JOB, payload, _made_by())}.tar.gz"


@functools.cache
def _made_by() -> dict[str, Any]:
    versions = offline_tpu.capture().versions
    return {"versions": versions, "sources": provenance.source_hash(MAKERS)}


def compare(
    rows: Sequence[MeasuredRow],
    *,
    runner: Runner,
    cache: JobCache | None,
    workers: int,
    timeout_s: float,
    progress: bool = False,
    dumps: Path | None = None,
    limit_s: float | None = None,
) -> list[Comparison]:
    """Predict every row. A row without a prediction is in the list too, and says why.

    dumps: folder to keep the compiler's dumps in, and to read them from: a change of the model needs no compiling then.
    limit_s: seconds after which no row is begun any more; those left are listed as not tried. None: all are.
    Outcomes that would be the same again are in the cache as soon as they are there: a run that was killed goes on.
    """
    captured = offline_tpu.capture()
    dependencies = {"versions": captured.versions, "sources": provenance.source_hash(SOURCES)}

    known = {spec.device_kind for spec in devices.DEVICES.values()}
    deadline = math.inf if limit_s is None else time.monotonic() + limit_s

    def has_dump(row: MeasuredRow) -> bool:
        return dumps is not None and row.device_kind in known and dump_path(dumps, row).exists()

    def compare_one(row: MeasuredRow) -> Comparison:
        if time.monotonic() > deadline:
            return Comparison.without(row, "reported", f"not tried within limit_s={limit_s:g}")
        try:
            device = devices.by_name(row.device_kind)
        except ValueError as error:
            return Comparison.without(row, "unmade", str(error))
        payload: dict[str, Any] = {"call": row.call, "device": device.name}  # no time: the job must not know it
        key = JobCache.key(_JOB, payload, dependencies)
        payload["kept"] = str(dump_path(dumps, row)) if dumps else None

        def run_job() -> Outcome:
            return runner.run(
                _JOB,
                payload,
                timeout_s=timeout_s,
                variables=lambda worker_dir: offline_tpu.worker_environment(device, worker_dir / "dump"),
            )

        outcome = cache.outcome(key, run_job)[0] if cache else run_job()
        if outcome.status is not Status.OK:
            return Comparison.without(row, "failed", f"{outcome.status}: {outcome.error}")
        if unmade := outcome.result.get("unmade"):
            return Comparison.without(row, "unmade", unmade)
        return Comparison.predicted(row, jsonl.decode(outcome.result, RowPrediction))

    # Chip by chip, since a worker is started for one; first what needs no compiling.
    ordered = sorted(range(len(rows)), key=lambda number: (not has_dump(rows[number]), rows[number].device_kind))
    bar = tqdm(total=len(rows), disable=not progress, unit="row", leave=False, smoothing=0)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, bar:
        futures = {number: pool.submit(compare_one, rows[number]) for number in ordered}
        try:
            for _ in concurrent.futures.as_completed(futures.values()):
                bar.update()
            return [futures[number].result() for number in range(len(rows))]
        finally:
            runner.cancel()
