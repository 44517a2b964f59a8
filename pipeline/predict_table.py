"""`python -m pipeline.predict_table results/predict.jsonl > results/predict.md`: predictions as one table."""

import argparse
import sys

from pipeline.predict.report import markdown_table
from splash_workbench import cli
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import user_path
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import PredictionRecord


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m pipeline.predict_table", description="Print predictions as one Markdown table.")
    parser.add_argument("records", type=user_path, help="what python -m pipeline.predict appended to results_path")
    return parser


@cli.flags_command(_parser)
def main(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    arguments.records.stat()  # an absent file is no empty table
    found = from_config(lambda: jsonl.read(arguments.records, PredictionRecord))
    if not found:
        raise UserError(f"{arguments.records}: no predictions; run python -m pipeline.predict first.")
    print(markdown_table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
