"""`python -m pipeline.predict_table results/predict.jsonl > results/predict.md`: predictions as one table."""

import json
import sys
from pathlib import Path

from pipeline.predict.report import markdown_table


def main(path: str) -> None:
    """Print the table of a file of records."""
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    print(markdown_table(records), end="")


if __name__ == "__main__":
    main(*sys.argv[1:])
