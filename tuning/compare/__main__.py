"""Runs side by side, scope by scope: `python -m tuning.compare RUN_A RUN_B`, see --help."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from offline_tpu.timeline import PREFIX
from splash_workbench import cli
from splash_workbench.errors import UserError
from splash_workbench.files import user_path
from splash_workbench.profiles import sessions
from splash_workbench.profiles.reader import SUFFIX
from splash_workbench.trial_status import Label
from tuning.compare import table
from tuning.compare.inputs import HELP, resolve
from tuning.compare.table import Row, Run


def pair_sessions(runs: Sequence[Run], logdir: Path) -> list[tuple[str, list[str]]]:
    """Write sessions that have each run as a host, so that TensorBoard shows their timelines in one view.

    Returns their names, one a part that all runs have a trace of, with their hosts.
    """
    hosts = []
    for run in runs:
        name = sessions.safe_name(run.name)
        hosts.append(name if run.label is not Label.PREDICTED or name.startswith(PREFIX) else f"{PREFIX}{name}")
    written = []
    for part in runs[0].spaces:
        if not all(part in run.spaces for run in runs):
            continue
        name = "_vs_".join(hosts) + (f"-{part}" if part else "")
        folder = sessions.profile_dir(logdir) / name
        shutil.rmtree(folder, ignore_errors=True)  # with what TensorBoard made of an older pair
        folder.mkdir(parents=True)
        for host, run in zip(hosts, runs, strict=True):
            space = run.spaces[part]
            space.hostnames[:] = [host]
            (folder / f"{host}{SUFFIX}").write_bytes(space.SerializeToString())
        written.append((name, hosts))
    return written


def _links(runs: Sequence[Run], pairs: Sequence[tuple[str, list[str]]], logdir: Path, port: int) -> dict[str, str]:
    """Return title -> address: timelines of a pair; overviews, and ops of a device, of a run against the first.

    The overview of a pair would show the mean of its runs.
    """
    links = {
        f"timelines of {name}, aligned": sessions.link(name, "trace_viewer@", hosts, port=port) for name, hosts in pairs
    }
    for run in runs[1:]:
        tools = {"overview_page": "overview"}
        if _has_device(run) and _has_device(runs[0]):
            tools["op_profile"] = "ops"
        for part, path in run.paths.items():
            base = runs[0].paths.get(part)
            if base is None or {base.parent.parent, path.parent.parent} != {sessions.profile_dir(logdir)}:
                continue
            host, base_name = [path.name.removesuffix(SUFFIX)], base.parent.name
            for tool, what in tools.items():
                address = sessions.link(path.parent.name, tool, host, base=base_name, port=port)
                links[f"{what} of {path.parent.name}, against {base_name}"] = address
    return links


def _has_device(run: Run) -> bool:
    """Return whether TensorBoard's pages about a device's ops have something to show."""
    return any(plane.name.startswith("/device:TPU") for space in run.spaces.values() for plane in space.planes)


def save(runs: Sequence[Run], rows: Sequence[Row], shown: Sequence[Row], folder: Path, links: Any) -> list[Path]:
    """Write all rows as CSV and JSON, and those that are shown as Markdown. Returns the files."""
    stem = "_vs_".join(sessions.safe_name(run.name) for run in runs)
    paths = [folder / f"{stem}{suffix}" for suffix in (".csv", ".json", ".md")]
    flat = table.records(runs, rows)
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(flat).to_csv(paths[0], index=False)
    described = [
        {name: getattr(run, name) for name in ("name", "label", "device", "made_by")}
        | {"sessions": len(run.sessions), "config": run.config}
        for run in runs
    ]
    content = {"runs": described, "rows": flat, "notes": table.notes_of(runs), "tensorboard": links}
    cli.write_json(str(paths[1]), content)
    paths[2].write_text(table.markdown(runs, shown), encoding="utf-8")
    return paths


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m tuning.compare",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Runs side by side, joined by named scope: medians over steps and repeats, their noise, ratios.",
        epilog=f"""\
A RUN is one of:
{HELP}

In the table: the median of all steps, +- half of the range in which a repeat may well fall (from the least 10th
percentile of a session to the greatest 90th); the ratio to the first run; and whether the two ranges lie apart (slower,
faster) or not (noise). "?": fewer than {table.MIN_STEPS} steps. For repeats give the same command again.

  python -m pipeline.generate prompt="a cat" profile=true profile_run=a
  python -m pipeline.generate prompt="a cat" profile=true profile_run=b attention.block_sizes={{...}}
  python -m tuning.compare a b
""",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--logdir", type=_folder, default=Path("runs"), help="TensorBoard's folder [%(default)s]")
    parser.add_argument("--results-dir", type=_folder, default=Path("results"), help="records of trials [%(default)s]")
    parser.add_argument("--output", type=_folder, help="where CSV, JSON and Markdown go [RESULTS_DIR/compare]")
    parser.add_argument("--depth", type=_count, default=3, help="print scopes to so many parts; 0: whole [%(default)s]")
    parser.add_argument("--top", type=_count, default=30, help="rows to print; 0: all [%(default)s]")
    parser.add_argument("--port", type=int, default=sessions.PORT, help="of TensorBoard, for the links [%(default)s]")
    parser.add_argument("--no-session", action="store_true", help="write no session of the runs as hosts into logdir")
    return parser


def _folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a folder")
    return user_path(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return int(text)


@cli.flags_command(_parser)
def main(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    for run in arguments.runs:
        label, equals, source = run.partition("=")
        if equals and label.replace("-", "_") in vars(arguments) and label != "runs":  # as other commands take them
            raise UserError(f"{run}: expected --{label.replace('_', '-')}={source or 'VALUE'}; see --help")
    if len(arguments.runs) < 2:
        raise UserError(f"{' '.join(arguments.runs)}: expected at least two runs")
    output = arguments.output or arguments.results_dir / "compare"
    runs = [resolve(argument, arguments.logdir, arguments.results_dir) for argument in arguments.runs]
    names = [run.name for run in runs]
    if len(names) != len(set(names)):
        raise UserError(f"{', '.join(names)}: expected different names; name one: other={arguments.runs[-1]}")
    rows = table.rows_of(runs)
    shown = table.rows_of(runs, arguments.depth or None)
    for run in runs:
        steps = sum(max((len(steps) for steps in session.values()), default=0) for session in run.sessions)
        print(f"{run.title}; sessions: {len(run.sessions)}, steps: {steps}")
    print(f"\n{table.text(runs, shown, arguments.top or None)}\n")
    for note in table.notes_of(runs):
        print(f"note: {note}")
    pairs = [] if arguments.no_session else pair_sessions(runs, arguments.logdir)
    links = _links(runs, pairs, arguments.logdir, arguments.port)
    paths = save(runs, rows, shown, output, links)
    print(f"table: {', '.join(map(str, paths))}")
    if pairs:
        print(f"look:  {sessions.tensorboard_command(arguments.logdir, arguments.port)}")
        for what, address in links.items():
            print(f"  {what}: {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
