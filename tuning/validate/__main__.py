"""Predicted times against those of real chips, reported or measured: `python -m tuning.validate --help`."""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path

from omegaconf import MISSING

import offline_tpu
from offline_tpu import libtpu
from splash_workbench import cli
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import require_writable, write_json
from splash_workbench.records import jsonl
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import JOBS_PER_WORKER, Runner
from splash_workbench.workers.room import check_timeout_s, worker_count
from tuning.trials import records
from tuning.trials.figures import save_png
from tuning.validate import sets, table
from tuning.validate.agreement import pairs_of, parity, summarize
from tuning.validate.record import Validation
from tuning.validate.rows import MeasuredRow, read, read_shipped
from tuning.validate.run import compare, compiler_of, fetch_compiler, fetch_compilers

#: So many rows, and sources, are all printed.
_FEW_ROWS, _FEW_SOURCES = 20, 3


@dataclasses.dataclass
class ValidateSchema:
    """Fields of configs/validate.yaml."""

    set: str | None = None
    measured: str | None = None
    workers: int | None = None
    timeout_s: float = MISSING
    results_dir: str = MISSING
    reuse: bool = MISSING
    dumps: str | None = None
    limit_s: float | None = None
    libtpu: str | None = None
    json: str | None = None
    progress: bool = MISSING


def _chosen(settings: ValidateSchema) -> tuple[str, list[MeasuredRow]]:
    """Return the rows to predict, and the name of what they are from. Raises ValueError."""
    if settings.measured is None:
        name = settings.set or "quick"
        return name, sets.choose(read_shipped(), name)
    path = Path(settings.measured)
    rows = read(path)
    name = path.resolve().stem
    return (name, rows) if settings.set is None else (f"{name}-{settings.set}", sets.choose(rows, settings.set))


def _lines(validation: Validation) -> list[str]:
    lines = [f"reported: {source}" for source in validation.sources[:_FEW_SOURCES]]
    if (more := len(validation.sources) - _FEW_SOURCES) > 0:
        lines.append(f"... and {more} more sources, in the record")
    chips = ", ".join(validation.device_kinds)
    compilers = ", ".join(f"libtpu {name} ({count} rows)" for name, count in validation.compilers.items())
    lines += [f"predicted: this machine, {compilers or 'nothing'}, for {chips}", ""]
    if len(validation.rows) <= _FEW_ROWS:
        lines += [*table.row_lines(validation.rows), ""]
    for part in (table.listed_lines, table.missing_lines, table.group_lines):
        if found := part(validation):
            lines += [*found, ""]
    return lines


def _checked_compiler(chosen: str | None) -> str | None:
    """Return the libtpu that compiles all rows, fetched if need be; None: each row's own. Raises UserError."""
    if chosen is None:
        return None
    known = (libtpu.SUPPORTED_LIBTPU, *libtpu.EARLIER_LIBTPUS)
    if chosen not in known:
        raise UserError(f"libtpu={chosen}: expected one of {', '.join(known)}, whose dumps are known, or null.")
    fetch_compiler(chosen, _say)
    return chosen


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _kept_count(record: Path) -> int:
    """Return how many rows are predicted in a record; none where there is no record that can be read."""
    with contextlib.suppress(OSError, ValueError):
        return Validation.read(record).row_count
    return 0


@cli.command("validate", ValidateSchema)
def main(settings: ValidateSchema) -> int:
    """Run the command; return its exit code."""
    offline_tpu.check_setup()
    chosen_compiler = _checked_compiler(settings.libtpu)
    workers = from_config(lambda: worker_count(settings.workers))
    from_config(lambda: check_timeout_s(settings.timeout_s))
    if settings.limit_s is not None and not settings.limit_s >= 0:
        raise UserError(f"limit_s={settings.limit_s}: expected a number of seconds from 0, or null for no limit.")
    results_dir = Path(settings.results_dir)
    directory = results_dir / "validate"
    require_writable(f"results_dir={results_dir}", directory)
    name, rows = from_config(lambda: _chosen(settings))
    dumps = Path(settings.dumps) if settings.dumps else None
    if dumps:
        require_writable(f"dumps={dumps}", dumps)
    if chosen_compiler is None:
        fetch_compilers(rows, _say)
    measured = from_config(lambda: pairs_of(records.read_all(results_dir)))
    with tempfile.TemporaryDirectory() as work_dir:
        cache = JobCache.of_user(settings.reuse)
        comparisons = compare(
            rows,
            runner=Runner(Path(work_dir), jobs_per_worker=JOBS_PER_WORKER),
            cache=cache,
            workers=workers,
            timeout_s=settings.timeout_s,
            progress=settings.progress,
            dumps=dumps,
            limit_s=settings.limit_s,
            compiler_of=compiler_of if chosen_compiler is None else lambda row: chosen_compiler,
        )
    pairs = [*(pair for row in comparisons if (pair := row.pair)), *measured]
    record = directory / f"{name}.json"
    kept_count = _kept_count(record) if any(row.status == "reported" for row in comparisons) else 0
    is_kept = kept_count <= sum(row.status == "predicted" for row in comparisons)
    drawn = [pair for pair in pairs if pair.predicted_ms > 0]  # on axes of logarithms
    picture = directory / f"{name}.png" if drawn and is_kept else None
    validation = Validation.of(
        name,
        comparisons,
        sources=tuple(dict.fromkeys(row.source for row in rows)),
        versions=offline_tpu.capture().versions,
        measured={
            **jsonl.encode(summarize(measured)),
            "rows": [jsonl.encode(pair) | {"ratio": pair.ratio} for pair in measured],
        },
        picture=picture.name if picture else None,
    )
    print("\n".join([*_lines(validation), *table.measured_lines(measured, results_dir)]))
    if cache and cache.trouble:
        print(cache.trouble)
    if is_kept:
        write_json(record, jsonl.encode(validation))
        print(f"record: {record}")
    else:
        print(f"record: {record} has {kept_count} predicted rows, more than these, and stays as it is")
    cli.write_json(settings.json, jsonl.encode(validation))
    if picture:
        save_png(parity(drawn), picture)
        print(f"picture: {picture}")
    return 1 if validation.failed_count else 0


if __name__ == "__main__":
    sys.exit(main())
