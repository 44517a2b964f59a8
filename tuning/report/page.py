"""Everything on the page, from the records to HTML and Markdown."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from splash_workbench.status import Label
from tuning.report import charts, kernels, parts, pipeline, trials
from tuning.report.inputs import Inputs, TrialFile
from tuning.report.parts import Tile
from tuning.trials.bound import kernel_bound_fraction
from tuning.trials.reported import DEFAULT_PATH, Reported
from tuning.validate.agreement import BAND, Pair, pairs_of, parity
from tuning.validate.record import Comparison, Validation, pair_of

_TEMPLATES = Path(__file__).parent / "templates"
#: Half of the error bars' width is at least this error.
_LEAST_SCALE = 0.05


@dataclasses.dataclass(frozen=True)
class Page:
    """What is shown. validation_rows: (row, error); scale: the error at the end of an error bar; fitted: these are
    the rows that the constants of the time model are fitted on.
    """

    tiles: tuple[Tile, ...]
    winners: tuple[kernels.Winner, ...]
    sweeps: tuple[kernels.Sweep, ...]
    superseded: tuple[TrialFile, ...]
    rooflines: tuple[kernels.Roofline, ...]
    validation: Validation
    validation_rows: tuple[tuple[Comparison, float | None], ...]
    scale: float
    parity: str | None
    fitted: bool
    pairs: tuple[Pair, ...]
    peers: tuple[kernels.Peers, ...]
    cases: tuple[pipeline.Case, ...]
    generated: tuple[pipeline.Generated, ...]
    quality: tuple[pipeline.QualityTable, ...]
    files: tuple[tuple[str, str], ...]
    torn: tuple[str, ...]

    @property
    def pictures(self) -> dict[str, str]:
        """Name -> SVG of the pictures that Markdown shows from files of their own."""
        named = {roofline.name: roofline.svg for roofline in self.rooflines}
        if self.parity is not None:
            named["parity"] = self.parity
        return {name: charts.standalone(svg) for name, svg in named.items()}


def make(inputs: Inputs, results_dir: Path, *, tuned_dir: Path | None = None, top: int = 12) -> Page:
    """The page of what was read. top: rows of each ranking."""
    swept, superseded = kernels.sweeps(inputs.sweeps, results_dir, top)
    compared = kernels.peers(inputs.peers)
    cases = pipeline.cases(inputs.predicted)
    validation = inputs.validation
    fitted = validation.source == Reported.read(DEFAULT_PATH).source
    rows = sorted(validation.rows, key=lambda row: (-row.reported_ms, row.shape, row.config))
    errors = [(row, None if row.ratio is None else row.ratio - 1) for row in rows]
    points = [pair for row in rows if (pair := pair_of(row, "reported")) is not None]
    titles = {
        f"pair-{n}": f"{p.name}: {p.actual_ms:g} ms reported, {p.predicted_ms:.3f} ms predicted"
        for n, p in enumerate(points)
    }
    measured = pairs_of(trial for file in (*inputs.sweeps, *inputs.peers) for trial in file.trials)
    return Page(
        tiles=tuple(_tiles(compared, validation, cases, fitted)),
        winners=tuple(kernels.winners(inputs.entries, tuned_dir)),
        sweeps=tuple(swept),
        superseded=tuple(superseded),
        rooflines=tuple(kernels.rooflines(inputs.sweeps, inputs.peers)),
        validation=validation,
        validation_rows=tuple(errors),
        scale=max([_LEAST_SCALE, *(abs(error) for _, error in errors if error is not None)]),
        parity=charts.to_svg(parity(points), "parity", titles) if points else None,
        fitted=fitted,
        pairs=tuple(sorted(measured, key=lambda pair: pair.name)),
        peers=tuple(compared),
        cases=tuple(cases),
        generated=tuple(pipeline.generated(inputs.generated)),
        quality=tuple(pipeline.quality(inputs.quality)),
        files=inputs.files,
        torn=inputs.torn,
    )


def _tiles(
    compared: Sequence[kernels.Peers], validation: Validation, cases: Sequence[pipeline.Case], fitted: bool
) -> list[Tile]:
    found = []
    ratios: dict[Label, list[tuple[float, str]]] = {}
    for peers in compared:
        labels = {trial.label for trial, _, _ in peers.rows if trial.label is not None}
        if peers.best_ratio is not None and len(labels) == 1:
            ratios.setdefault(labels.pop(), []).append((peers.best_ratio, peers.title))
    for label, pairs in sorted(ratios.items()):
        value = " to ".join(dict.fromkeys(f"{ratio:.2f}" for ratio in (min(pairs)[0], max(pairs)[0])))
        where = pairs[0][1] if len(pairs) == 1 else f"{len(pairs)} workloads and devices"
        found.append(Tile(value, f"times as fast as the best other kernel, kernel alone: {where}", label))
    if validation.median_abs_error is not None:
        text = (
            f"median error of {len(validation.rows)} predictions beside times reported on a real "
            f"{parts.device_title(validation.device_kind)}"
            + (", on which three constants are fitted" if fitted else "")
        )
        found.append(Tile(parts.percent(validation.median_abs_error, 1), text, Label.PREDICTED))
    for case in [case for case in cases if case.reported] or cases[:1]:
        total = min((row.total_s for row in case.plans if row.total_s is not None), default=None)
        if total is not None:
            text = f"for a whole video: {case.title}"
            if case.reported:
                text += f"; reported for the published nodes: {parts.significant(case.reported.total_time_s, 3)} s"
            found.append(Tile(f"{parts.significant(total, 3)} s", text, Label.PREDICTED))
    return found


def render(page: Page, *, results_dir: str, validation_path: str, output: Path) -> tuple[str, str]:
    """(HTML, Markdown). output: the page's folder, from which Markdown finds the pictures of sweeps."""
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
        "series": trials.series,
        "cell": lambda text: str(text).replace("|", "\\|"),
        "psnr": lambda value: "same" if math.isinf(value) else f"{value:.1f}",
        "relative": lambda path: Path(os.path.relpath(path, output)).as_posix(),
        "compiler": parts.compiler,
    }
    context: dict[str, Any] = {
        "page": page,
        "missing": parts.MISSING,
        "band": BAND,
        "results_dir": results_dir,
        "validation_path": validation_path,
        "light": charts.css(0),
        "dark": charts.css(1),
        "kernel_bound_fraction": kernel_bound_fraction,
    }
    html = environment.get_template("report.html").render(context)
    markdown = environment.get_template("report.md").render(context)
    return html, re.sub(r"\n{3,}", "\n\n", markdown).strip() + "\n"
