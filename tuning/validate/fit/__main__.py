"""Fits the constants of the time model on measured rows: all at once, and with each program left out in turn.

For every row of a set whose dump `python -m tuning.validate dumps=DIR` has kept, the predicted time is taken at the
constants in use and with each moved up and down by a tenth. In logarithms the times are then linear in the constants,
and these are fitted to the measured ones: absolute errors count, and those beyond 15 % little; a program on a chip
weighs the root of its number of rows, and a constant stays near what it is unless the rows say otherwise. Beside it is
what comes out where every program on every chip weighs the same. Writes fit.json and fit.md.
"""

import argparse
import dataclasses
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

import offline_tpu
from offline_tpu.machine import devices
from splash_workbench import cli, provenance
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import atomic_path, require_writable, user_path, write_json
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import Outcome
from tuning.validate import sets
from tuning.validate.fit import sensitivity, table
from tuning.validate.fit.fitting import FitRow, Fitted
from tuning.validate.rows import COLLECTIVES, MeasuredRow, read_shipped
from tuning.validate.run import compiler_of, dump_path

_READERS = ("tuning/validate/fit/retiming.py", "tuning/validate/fit/sensitivity.py")
#: How a prediction says that data, which the row does not have, decide how often its code runs.
_DEPENDS_ON_DATA = re.compile(r"branch at|trips of the loop")


class NotFittedError(Exception):
    """A row that constants are not fitted on; the message is the rule that leaves it out."""


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m tuning.validate.fit", description=__doc__)
    parser.add_argument("dumps", type=user_path, help="the folder that `python -m tuning.validate dumps=` filled")
    parser.add_argument("--set", default="wide", choices=sets.SIZES, help="rows to fit on, by default wide")
    parser.add_argument("--output", type=user_path, default="results/validate", help="folder; %(default)s")
    return parser


@cli.flags_command(_parser)
def main(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if not arguments.dumps.is_dir():
        raise UserError(
            f"dumps={arguments.dumps}: expected a folder of dumps; make it with "
            f"`python -m tuning.validate set={arguments.set} dumps={arguments.dumps}`."
        )
    require_writable(f"--output {arguments.output}", arguments.output)
    chosen = from_config(lambda: sets.choose(read_shipped(), arguments.set))
    rows, without = _read(tqdm(chosen, unit="row", leave=False, smoothing=0), arguments.dumps)
    if not rows:
        raise UserError(
            f"{arguments.dumps}: expected dumps of rows to fit on, found none; make them with "
            f"`python -m tuning.validate set={arguments.set} dumps={arguments.dumps}`."
        )
    in_use = {
        name: value
        for device in sorted({row.device for row in rows})
        for name, value in sensitivity.parameters(devices.by_name(device)).items()
    }
    fitted = Fitted.of(arguments.set, rows, without, in_use)
    print("\n".join(table.lines(fitted)))
    write_json(arguments.output / "fit.json", jsonl.encode(fitted))
    with atomic_path(arguments.output / "fit.md") as temporary:
        temporary.write_text("\n".join(table.markdown(fitted)) + "\n")
    print(f"written: {arguments.output}/fit.json and fit.md")
    return 0


def _read(rows: Iterable[MeasuredRow], dumps: Path) -> tuple[list[FitRow], dict[str, int]]:
    """Return the rows to fit on, and by reason how many there are besides. What is read of a dump is cached."""
    sources = provenance.source_hash((*offline_tpu.SOURCES, *_READERS))
    cache = JobCache.of_user(enabled=True)
    assert cache is not None
    found, without = [], Counter[str]()
    for row in rows:
        try:
            found.append(_fit_row(row, dumps, cache, sources))
        except NotFittedError as error:
            without[str(error)] += 1
    return found, dict(without)


def _fit_row(row: MeasuredRow, dumps: Path, cache: JobCache, sources: str) -> FitRow:
    if row.op in COLLECTIVES:
        raise NotFittedError("a collective: what it takes is the links'")
    device = devices.by_name(row.device_kind)
    if row.p_state is not None:  # a published clock, which is not fitted
        try:
            device = device.at_p_state({devices.P_STATE_OPTION: str(row.p_state)})
        except ValueError as error:
            raise NotFittedError(str(error)) from error
        device = dataclasses.replace(device, p_states={})
    path = dump_path(dumps, row, compiler_of(row))
    if not path.exists():
        raise NotFittedError("no dump is kept")

    def read() -> Outcome:
        try:
            return Outcome(Status.OK, sensitivity.of_dump(path, device), None)
        except (ValueError, offline_tpu.UnknownDumpFormatError) as error:
            return Outcome(Status.COMPILE_ERROR, {}, str(error))

    key = JobCache.key(
        "tuning.validate.fit.sensitivity:of_dump",
        {"dump": path.name, "clock_hz": device.clock_hz},
        {"sources": sources},
    )
    outcome, _ = cache.outcome(key, read)
    if outcome.status is not Status.OK:
        raise NotFittedError(f"not predicted: {outcome.error}")
    if any(map(_DEPENDS_ON_DATA.match, outcome.result["unresolved"])):
        raise NotFittedError("data that are not known decide how often its code runs")
    log_ratio = math.log(outcome.result["time_ms"] / row.time_ms)
    slopes = outcome.result["sensitivities"]
    return FitRow(id=row.id, op=row.op, device=device.name, log_ratio=log_ratio, sensitivities=slopes)


if __name__ == "__main__":
    sys.exit(main())
