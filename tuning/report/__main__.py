"""The command line of the report: `python -m tuning.report --help`."""

import dataclasses
import sys
from pathlib import Path

from omegaconf import MISSING

from splash_workbench import cli
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import atomic_path, require_writable


@dataclasses.dataclass
class ReportSchema:
    """Fields of configs/report.yaml."""

    results_dir: str = MISSING
    output: str = MISSING
    validation: str = MISSING
    tuned_dir: str | None = None
    top: int = MISSING


@cli.command("report", ReportSchema)
def main(settings: ReportSchema) -> int:
    """Run the command; return its exit code."""
    output, validation, results_dir = Path(settings.output), Path(settings.validation), Path(settings.results_dir)
    tuned_dir = Path(settings.tuned_dir) if settings.tuned_dir is not None else None
    given = cli.given_keys()  # that the default is not there is no error: nothing is on record yet
    if not results_dir.is_dir() and ("results_dir" in given or results_dir.exists()):
        raise UserError(f"results_dir={results_dir}: expected a folder of records, as tuning.sweep writes them.")
    if not validation.exists() and "validation" in given:
        raise UserError(f"validation={validation}: expected what tuning.validate wrote, a file or a folder.")
    if tuned_dir is not None and not tuned_dir.is_dir():
        raise UserError(f"tuned_dir={tuned_dir}: expected a folder of tuned entries, or null for those of attention().")
    if settings.top < 1:
        raise UserError(f"top={settings.top}: expected at least 1.")
    require_writable(f"output={output}", output)
    from tuning.report import inputs, page  # which take seconds
    from tuning.validate.record import on_record

    read = from_config(lambda: inputs.Inputs(results_dir, validation, tuned_dir))
    files = page.make(read, output, settings.top)
    for path in (*output.glob("roofline-*.svg"), *output.glob("parity.svg")):
        if path.name not in files:  # of a workload that is no longer on record
            path.unlink()
    for name, content in files.items():
        with atomic_path(output / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    for line in read.torn:
        print(f"warning: {line}", file=sys.stderr)
    if on_record(validation) is None:
        print("no predictions beside the reported times: python -m tuning.validate")
    print(f"{output / 'index.html'} ({len(files['index.html'].encode()) / 1000:.0f} kB), {output / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
