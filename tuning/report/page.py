"""Everything on the page, from the records to HTML and Markdown."""

import math
import os
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from splash_workbench.trial_status import Label
from tuning.report import charts, kernels, parts, pipeline
from tuning.report.inputs import Inputs
from tuning.trials.bound import kernel_bound_fraction
from tuning.trials.reported import DEFAULT_PATH, Reported
from tuning.validate.agreement import BAND, pairs_of, parity
from tuning.validate.record import LISTED_ERROR, Validation

_TEMPLATES = Path(__file__).parent / "templates"
#: Half of the error bars' width is at least this error.
_LEAST_SCALE = 0.05
#: Of more comparisons only those far off are listed.
_MOST_ROWS = 40


def make(inputs: Inputs, output: Path, top: int) -> dict[str, str]:
    """Return the content of each file of the page: index.html, report.md and the pictures that Markdown shows.

    Markdown finds the pictures of sweeps from `output`, the page's folder; top: rows of each ranking.
    """
    swept, superseded = kernels.sweeps(inputs.sweeps, inputs.results_dir, top)
    measured = pairs_of(trial for file in (*inputs.sweeps, *inputs.peers) for trial in file.trials)
    page = {
        **_validated(inputs.validation),
        "winners": kernels.winners(inputs.entries, inputs.tuned_dir),
        "sweeps": swept,
        "superseded": superseded,
        "others": kernels.others(inputs.others, inputs.results_dir),
        "rooflines": kernels.rooflines(inputs.sweeps, inputs.peers),
        "pairs": sorted(measured, key=lambda pair: pair.name),
        "peers": kernels.peers(inputs.peers),
        "cases": pipeline.cases(inputs.predicted),
        "generated": pipeline.generated(inputs.generated),
        "quality": pipeline.quality(inputs.quality),
        "quality_page": inputs.quality_page,
        "files": inputs.files,
        "torn": inputs.torn,
    }
    context = {
        "page": page | {"tiles": _tiles(page)},
        "missing": parts.MISSING,
        "band": BAND,
        "listed_error": LISTED_ERROR,
        "results_dir": inputs.results_dir.as_posix(),
        "validation_path": inputs.validation_path.as_posix(),
        "light": charts.css(0),
        "dark": charts.css(1),
        "kernel_bound_fraction": kernel_bound_fraction,
    }
    html, markdown = (_environment(output).get_template(name).render(context) for name in ("report.html", "report.md"))
    pictures = {f"{roofline['name']}.svg": roofline["svg"] for roofline in page["rooflines"]}
    if page["parity"] is not None:
        pictures["parity.svg"] = page["parity"]
    return {
        **{name: charts.standalone(svg) for name, svg in pictures.items()},
        "index.html": html,
        "report.md": re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n",
    }


def _validated(validation: Validation) -> dict[str, Any]:
    """Return predictions beside reported times.

    validation_rows: all, or of many those that are off by more than LISTED_ERROR; fitted: whether the time model's
    constants are fitted on these.
    """
    many = len(validation.rows) > _MOST_ROWS
    rows = validation.listed if many else sorted(validation.rows, key=lambda row: (-row.reported_ms, row.id))
    errors = [(row, None if row.ratio is None else row.ratio - 1) for row in rows]
    points = [pair for row in validation.rows if (pair := row.pair) is not None]
    titles = {
        f"pair-{n}": f"{p.name}: {p.actual_ms:g} ms reported, {p.predicted_ms:.3f} ms predicted"
        for n, p in enumerate(points)
    }
    return {
        "validation": validation,
        "validation_rows": errors,
        "only_listed": many,
        "scale": max([_LEAST_SCALE, *(abs(error) for _, error in errors if error is not None)]),
        "parity": charts.to_svg(parity(points), "parity", titles) if points else None,
        "fitted": validation.sources == (Reported.read(DEFAULT_PATH).source,),
    }


def _tiles(page: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the findings at the top of the page."""
    found = []
    ratios: dict[Label, list[tuple[float, str]]] = {}
    for peers in page["peers"]:
        labels = {trial.label for trial, _, _ in peers["rows"] if trial.label is not None}
        if peers["best_ratio"] is not None and len(labels) == 1:
            ratios.setdefault(labels.pop(), []).append((peers["best_ratio"], peers["title"]))
    for label, pairs in sorted(ratios.items()):
        value = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(pairs)[0], max(pairs)[0])))
        where = pairs[0][1] if len(pairs) == 1 else f"{len(pairs)} workloads and devices"
        text = f"times as fast as the best other kernel, kernel alone: {where}"
        found.append({"value": value, "text": text, "label": label})
    validation = page["validation"]
    if validation.median_abs_error is not None:
        chips = ", ".join(map(parts.device_title, validation.device_kinds))
        text = f"median error of {validation.row_count} predictions beside times reported on a real {chips}"
        text += ", on which three constants are fitted" if page["fitted"] else ""
        value = parts.percent(validation.median_abs_error, 1)
        found.append({"value": value, "text": text, "label": Label.PREDICTED})
    for case in [case for case in page["cases"] if case["reported"]] or page["cases"][:1]:
        total = min((row["total_s"] for row in case["plans"] if row["total_s"] is not None), default=None)
        if total is not None:
            text = f"for a whole video: {case['title']}"
            if case["reported"]:
                total_s = parts.significant(case["reported"].total_time_s, 3)
                text += f"; reported for the published nodes: {total_s} s"
            found.append({"value": f"{parts.significant(total, 3)} s", "text": text, "label": Label.PREDICTED})
    return found


def _environment(output: Path) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=lambda name: name is not None and name.startswith("report.html"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "sig": parts.significant,
        "pct": parts.percent,
        "signed": parts.signed_percent,
        "device": parts.device_title,
        "commit": parts.commit,
        "series": kernels.series,
        "cell": lambda text: str(text).replace("|", "\\|"),
        "median": lambda values: statistics.median(values) if values else None,
        "least": lambda values: min(values, default=None),
        "most": lambda values: max(values, default=None),
        # No PSNR: the very same video, which is better than any figure.
        "decibels": lambda values: [math.inf if value is None else value for value in values],
        "psnr": lambda value: "same" if math.isinf(value) else f"{value:.1f}",
        "relative": lambda path: Path(os.path.relpath(path, output)).as_posix(),
        "compiler": parts.compiler,
    }
    return environment
