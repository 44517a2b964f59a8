"""Writes offline_tpu/machine/residuals.json from what `python -m tuning.validate set=wide` keeps."""

import argparse
import sys
from pathlib import Path

import msgspec
import numpy as np

from offline_tpu.machine import devices, residuals
from splash_workbench import cli
from splash_workbench.errors import UserError
from splash_workbench.files import user_path
from tuning.validate.record import Comparison, Validation

_PATH = Path(residuals.__file__).with_name("residuals.json")


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m tuning.validate.residuals", description=__doc__)
    parser.add_argument("record", nargs="?", type=user_path, default="results/validate/wide.json", help="%(default)s")
    parser.add_argument("--output", type=user_path, default=_PATH, help="by default the file that the package reads")
    return parser


@cli.flags_command(_parser)
def main(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        rows = msgspec.json.decode(arguments.record.read_bytes(), type=Validation).rows
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(f"{arguments.record}: {error}; write it with `python -m tuning.validate set=wide`.") from error
    found = residuals_of(rows)
    arguments.output.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    for kind, by_device in found.items():
        for device, residual in by_device.items():
            print(f"{kind:12}{device:5}{residual.rows:4} rows  {residual.low:.3f} to {residual.high:.3f}")
    return 0


def residuals_of(rows: tuple[Comparison, ...]) -> dict[str, dict[str, residuals.Residual]]:
    """Return the percentiles of measured over predicted times, by kind and device ("all": of all of them).

    A row is of the kind that takes most of its predicted time. Every program weighs the same, however many rows it has.
    """
    ratios: dict[str, dict[str, dict[str, list[float]]]] = {}
    for row in rows:
        if row.predicted_ms is None or not row.shares:
            continue
        kind = residuals.kind_of(next(iter(row.shares)))
        for device in (devices.by_name(row.device_kind).name, "all"):
            programs = ratios.setdefault(kind, {}).setdefault(device, {})
            programs.setdefault(f"{row.op} {row.device_kind}", []).append(row.reported_ms / row.predicted_ms)
    return {
        kind: {device: _residual(programs) for device, programs in sorted(by_device.items())}
        for kind, by_device in sorted(ratios.items())
    }


def _residual(programs: dict[str, list[float]]) -> residuals.Residual:
    values = np.concatenate([sorted(values) for values in programs.values()])
    weights = np.concatenate([np.full(len(values), 1 / len(values)) for values in programs.values()])
    low, high = np.quantile(values, [0.1, 0.9], weights=weights, method="inverted_cdf")
    return residuals.Residual(round(float(low), 4), round(float(high), 4), len(values))


if __name__ == "__main__":
    sys.exit(main())
