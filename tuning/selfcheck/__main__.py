"""The self-check of a machine: `python -m tuning.selfcheck --help`."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from splash_workbench import cli
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import require_writable
from splash_workbench.workers.room import check_timeout_s
from tuning.selfcheck.session import Session
from tuning.selfcheck.table import lines
from tuning.selfcheck.tasks import PARTS

#: What finds the chip in each worker.
CHIP = "tuning.selfcheck.chip:find_chip"


@dataclasses.dataclass
class SelfcheckSchema:
    """Fields of configs/selfcheck.yaml."""

    parts: Any = MISSING
    timeout_s: float = MISSING
    output_dir: str = MISSING
    resume: bool = MISSING


def parse_parts(parts: Any) -> list[str]:
    """Return the names of parts, given as a list or as a text with commas. Raises UserError."""
    names = [name.strip() for name in parts.split(",")] if isinstance(parts, str) else list(parts or ())
    known = [part.name for part in PARTS]
    if not names or not set(names) <= set(known):
        raise UserError(f"parts={parts}: expected some of {','.join(known)}.")
    return names


@cli.command("selfcheck", SelfcheckSchema, text_or_list=("parts",))
def main(settings: SelfcheckSchema) -> int:
    """Run the command; return its exit code: 1 where something failed."""
    from_config(lambda: check_timeout_s(settings.timeout_s))
    output_dir = Path(settings.output_dir)
    require_writable(f"output_dir={output_dir}", output_dir)
    session = Session(
        parts=parse_parts(settings.parts),
        timeout_s=settings.timeout_s,
        output_dir=output_dir,
        resume=settings.resume,
        chip=CHIP,
        say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
    )
    found = session.run()
    print("\n".join(lines(found)))
    print(f"file: {session.path}; it names no path, machine or user")
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
