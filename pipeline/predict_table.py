"""`python -m pipeline.predict_table results/predict.jsonl > results/predict.md`: predictions as one table."""

import sys
from pathlib import Path

from pipeline.predict.report import markdown_table
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import PredictionRecord


def main(path: str) -> None:
    """Print the table of a file of records."""
    print(markdown_table(jsonl.read(Path(path), PredictionRecord)), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
