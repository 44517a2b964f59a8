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
from splash_workbench.profiles import sessions
from splash_workbench.profiles.reader import SUFFIX
from splash_workbench.status import Label
from tuning.compare import table
from tuning.compare.inputs import HELP, Input, resolve
from tuning.compare.table import Row


def pair_sessions(inputs: Sequence[Input], logdir: Path) -> list[tuple[str, list[str]]]:
    """Write sessions that have each run as a host, so that TensorBoard shows their timelines in one view.

    Returns:
      Names of the sessions, one a part that all runs have a trace of, with their hosts.
    """
    hosts = [_host(given) for given in inputs]
    written = []
    for part in inputs[0].spaces:
        if not all(part in given.spaces for given in inputs):
            continue
        name = "_vs_".join(hosts) + (f"-{part}" if part else "")
        folder = sessions.profile_dir(logdir) / name
        shutil.rmtree(folder, ignore_errors=True)  # with what TensorBoard made of an older pair
        folder.mkdir(parents=True)
        for host, given in zip(hosts, inputs, strict=True):
            space = given.spaces[part]
            del space.hostnames[:]
            space.hostnames.append(host)
            (folder / f"{host}{SUFFIX}").write_bytes(space.SerializeToString())
        written.append((name, hosts))
    return written


def _links(inputs: Sequence[Input], pairs: Sequence[tuple[str, list[str]]], logdir: Path, port: int) -> dict[str, str]:
    """Return title -> address: timelines of a pair; overviews, and ops of a device, of a run against the first.

    The overview of a pair would show the mean of its runs.
    """
    links = {
        f"timelines of {name}, aligned": sessions.link(name, "trace_viewer@", hosts, port=port) for name, hosts in pairs
    }
    first = inputs[0].paths
    for given in inputs[1:]:
        for part, path in given.paths.items():
            folders = [path.parent, first[part].parent] if part in first else []
            if not folders or any(folder.parent != sessions.profile_dir(logdir) for folder in folders):
                continue
            tools = {"overview_page": "overview"}
            if given.on_device and inputs[0].on_device:
                tools["op_profile"] = "ops"
            for tool, what in tools.items():
                host = [path.name.removesuffix(SUFFIX)]
                address = sessions.link(folders[0].name, tool, host, base=folders[1].name, port=port)
                links[f"{what} of {folders[0].name}, against {folders[1].name}"] = address
    return links


def _host(given: Input) -> str:
    """Return the run's name; of a prediction it says so."""
    name = sessions.safe_name(given.column.name)
    if given.column.label is Label.PREDICTED and not name.startswith(PREFIX):
        return f"{PREFIX}{name}"
    return name


def save(
    inputs: Sequence[Input], rows: Sequence[Row], shown: Sequence[Row], folder: Path, more: dict[str, Any]
) -> list[Path]:
    """Write all rows as CSV and JSON, and those that are shown as Markdown. Returns the files."""
    columns = [given.column for given in inputs]
    stem = folder / "_vs_".join(sessions.safe_name(column.name) for column in columns)
    flat = table.records(columns, rows)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + suffix) for suffix in (".csv", ".json", ".md")]
    pd.DataFrame(flat).to_csv(paths[0], index=False)
    described = [
        {
            "name": column.name,
            "label": column.label,
            "device": column.device,
            "made_by": column.made_by,
            "sessions": len(column.sessions),
            "config": given.config,
        }
        for given, column in zip(inputs, columns, strict=True)
    ]
    content = {"runs": described, "rows": flat, "notes": table.notes_of(columns), **more}
    cli.write_json(str(paths[1]), content)
    paths[2].write_text(table.markdown(columns, shown), encoding="utf-8")
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
    parser.add_argument("--logdir", type=cli.path_flag, default=Path("runs"), help="TensorBoard's folder [%(default)s]")
    parser.add_argument(
        "--results-dir", type=cli.path_flag, default=Path("results"), help="records of trials [%(default)s]"
    )
    parser.add_argument("--output", type=cli.path_flag, help="where CSV, JSON and Markdown go [RESULTS_DIR/compare]")
    parser.add_argument("--depth", type=_count, default=3, help="print scopes to so many parts; 0: whole [%(default)s]")
    parser.add_argument("--top", type=_count, default=30, help="rows to print; 0: all [%(default)s]")
    parser.add_argument("--port", type=int, default=sessions.PORT, help="of TensorBoard, for the links [%(default)s]")
    parser.add_argument("--no-session", action="store_true", help="write no session of the runs as hosts into logdir")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: expected 0 or more")
    return int(text)


@cli.flags_command(_parser)
def main(arguments: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if len(arguments.runs) < 2:
        raise UserError(f"{' '.join(arguments.runs)}: expected at least two runs")
    output = arguments.output or arguments.results_dir / "compare"
    inputs = [resolve(argument, arguments.logdir, arguments.results_dir) for argument in arguments.runs]
    columns = [given.column for given in inputs]
    names = [column.name for column in columns]
    if len(names) != len(set(names)):
        raise UserError(f"{', '.join(names)}: expected different names; name one: other={arguments.runs[-1]}")
    rows = table.rows_of(columns)
    shown = table.rows_of(columns, arguments.depth or None)
    for column in columns:
        steps = sum(max((len(steps) for steps in session.values()), default=0) for session in column.sessions)
        print(f"{column.title}; sessions: {len(column.sessions)}, steps: {steps}")
    print()
    print(table.text(columns, shown, arguments.top or None))
    print()
    for note in table.notes_of(columns):
        print(f"note: {note}")
    pairs = [] if arguments.no_session else pair_sessions(inputs, arguments.logdir)
    links = _links(inputs, pairs, arguments.logdir, arguments.port)
    paths = save(inputs, rows, shown, output, {"tensorboard": links})
    print(f"table: {', '.join(map(str, paths))}")
    if pairs:
        print(f"look:  {sessions.tensorboard_command(arguments.logdir, arguments.port)}")
        for what, address in links.items():
            print(f"  {what}: {address}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
