"""Predicts measured rows in worker processes, each kept as soon as it is made."""

import concurrent.futures
import functools
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import offline_tpu
from offline_tpu import libtpu
from offline_tpu.machine import devices
from offline_tpu.machine.errors import UnsupportedVersionError
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


#: By an earlier libtpu, what it takes minutes for: the chip and the ops. For v7x 0.0.45 looks for the store before each
#: load of VMEM bundle by bundle, which takes long where kernels are unrolled.
_SLOW = {"0.0.45": ("TPU7x", re.compile(r"pallas_mosaic_tpu_flash_attention(_vjp)?"))}


def compiler_of(row: MeasuredRow) -> str:
    """Return the libtpu that a row was timed with, where it is here and takes no minutes; else that of predictions.

    See `fetch_compilers`.
    """
    compiler = _earlier(row)
    return compiler if compiler and _is_here(compiler) else libtpu.SUPPORTED_LIBTPU


def _earlier(row: MeasuredRow) -> str | None:
    """Return the earlier libtpu that is to compile a row, if any."""
    compiler = row.timed_with
    if compiler not in libtpu.EARLIER_LIBTPUS:
        return None
    device_kind, ops = _SLOW.get(compiler, ("", re.compile("")))
    return None if row.device_kind == device_kind and ops.fullmatch(row.op) else compiler


def fetch_compilers(rows: Iterable[MeasuredRow], say: Callable[[str], None]) -> None:
    """Fetch what rows were timed with and is not here. Where that fails, say so: `compiler_of` takes another then."""
    rows = list(rows)
    known = (libtpu.SUPPORTED_LIBTPU, *libtpu.EARLIER_LIBTPUS)
    for told, count in Counter(row.libtpu for row in rows if row.libtpu not in (None, *known)).items():
        say(f"libtpu {told} of {count} rows: libtpu {known[0]} compiles them, for known are {', '.join(known)}")
    wanted = {_earlier(row) for row in rows}
    for compiler in libtpu.EARLIER_LIBTPUS:
        if compiler not in wanted:
            continue
        try:
            fetch_compiler(compiler, say)
        except UnsupportedVersionError as error:
            say(f"{error}; until then libtpu {libtpu.SUPPORTED_LIBTPU} compiles these rows")


def fetch_compiler(compiler: str, say: Callable[[str], None]) -> None:
    """Fetch a libtpu that is not here, and say so. Raises UnsupportedVersionError where that fails."""
    if _is_here(compiler):
        return
    folder = libtpu.folder_beside(compiler)
    say(f"fetching libtpu {compiler}, which rows are compiled with, into {folder} (760 MB)")
    libtpu.fetch_beside(compiler)
    if not _is_here(compiler):
        raise UnsupportedVersionError(f"{folder}: expected libtpu {compiler}, found something else; delete the folder")


def _is_here(compiler: str) -> bool:
    return libtpu.compiler_version(compiler) == compiler


def dump_path(dumps: Path, row: MeasuredRow, compiler: str) -> Path:
    """Return where the dump of a row's program is kept. Raises ValueError for a chip that is not known."""
    payload = {"call": row.call, "device": devices.by_name(row.device_kind).name}
    return dumps / f"{JobCache.key(_JOB, payload, _made_by(compiler))}.tar.gz"


@functools.cache
def _made_by(compiler: str) -> dict[str, Any]:
    versions = offline_tpu.capture(compiler=compiler).versions
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
    compiler_of: Callable[[MeasuredRow], str] = compiler_of,
) -> list[Comparison]:
    """Predict every row. A row without a prediction is in the list too, and says why.

    dumps: folder to keep the compiler's dumps in, and to read them from: a change of the model needs no compiling then.
    compiler_of: row -> the version of libtpu that compiles it.
    limit_s: seconds after which no row is begun any more; those left are listed as not tried. None: all are.
    Outcomes that would be the same again are in the cache as soon as they are there: a run that was killed goes on.
    """
    sources = provenance.source_hash(SOURCES)
    compilers = [compiler_of(row) for row in rows]
    versions = {compiler: offline_tpu.capture(compiler=compiler).versions for compiler in set(compilers)}
    known = {spec.device_kind for spec in devices.DEVICES.values()}
    deadline = math.inf if limit_s is None else time.monotonic() + limit_s

    def has_dump(row: MeasuredRow, compiler: str) -> bool:
        return dumps is not None and row.device_kind in known and dump_path(dumps, row, compiler).exists()

    def compare_one(row: MeasuredRow, compiler: str) -> Comparison:
        if time.monotonic() > deadline:
            return Comparison.without(row, "reported", f"not tried within limit_s={limit_s:g}")
        try:
            device = devices.by_name(row.device_kind)
        except ValueError as error:
            return Comparison.without(row, "unmade", str(error))
        payload: dict[str, Any] = {"call": row.call, "device": device.name}  # no time: the job must not know it
        key = JobCache.key(_JOB, payload, {"versions": versions[compiler], "sources": sources})
        payload["kept"] = str(dump_path(dumps, row, compiler)) if dumps else None

        def run_job() -> Outcome:
            return runner.run(
                _JOB,
                payload,
                timeout_s=timeout_s,
                variables=lambda worker_dir: offline_tpu.worker_environment(device, worker_dir / "dump", compiler),
            )

        outcome = cache.outcome(key, run_job)[0] if cache else run_job()
        if outcome.status is not Status.OK:
            return Comparison.without(row, "failed", f"{outcome.status}: {outcome.error}")
        if unmade := outcome.result.get("unmade"):
            return Comparison.without(row, "unmade", unmade)
        return Comparison.predicted(row, jsonl.decode(outcome.result, RowPrediction), compiler)

    def place(number: int) -> tuple[bool, str, str]:
        """Chip by chip, since a worker is started for one and its compiler; first what needs no compiling."""
        row, compiler = rows[number], compilers[number]
        return not has_dump(row, compiler), row.device_kind, compiler

    ordered = sorted(range(len(rows)), key=place)
    bar = tqdm(total=len(rows), disable=not progress, unit="row", leave=False, smoothing=0)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool, bar:
        futures = {number: pool.submit(compare_one, rows[number], compilers[number]) for number in ordered}
        try:
            for _ in concurrent.futures.as_completed(futures.values()):
                bar.update()
            return [futures[number].result() for number in range(len(rows))]
        finally:
            runner.cancel()
