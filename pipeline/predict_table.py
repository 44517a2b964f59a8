"""`python -m pipeline.predict_table results/predict.jsonl > results/predict.md`: predictions as one table."""

import argparse
import json
import sys
from pathlib import Path

from pipeline.predict.report import markdown_table
from splash_workbench import cli
from splash_workbench.errors import UserError


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m pipeline.predict_table", description="Print predictions as one Markdown table.")
    parser.add_argument("records", type=Path, help="what python -m pipeline.predict appended to results_path")
    return parser


@cli.flags_command(_parser)
def main(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    try:
        lines = arguments.records.read_text(encoding="utf-8").splitlines()
        table = markdown_table([json.loads(line) for line in lines if line.strip()])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{arguments.records}: not records of python -m pipeline.predict ({error!r})") from error
    print(table, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
