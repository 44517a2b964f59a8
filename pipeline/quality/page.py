"""The page of a comparison: a table of the modes, the nearest to the reference first, and their videos beside it."""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import jinja2

from pipeline.checkpoints.loading import Checkpoint
from pipeline.quality.gate import Comparison, QualityVariant
from pipeline.quality.pairs import GAIN, Pairs, video_path
from pipeline.requests.models import current_id
from pipeline.requests.request import GenerateRequest
from pipeline.stages.presets import base_checkpoint
from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import PredictionRecord

PAGE_FILE = "index.html"
_TEMPLATES = Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant on the page. outcome, request: None where it failed; request: with what its quality chooses in it.

    failures: why it is over its budget, or was not made. predicted: what is predicted of a whole video, where known.
    """

    variant: QualityVariant
    outcome: Comparison | None
    request: GenerateRequest | None
    failures: list[str]
    predicted: str | None

    @property
    def price(self) -> tuple[float, float]:
        """Return what rows are sorted by: the worst LPIPS, or without it the worst SSIM; then the worst PSNR."""
        if self.outcome is None:
            return math.inf, math.inf
        worst = max(self.outcome.lpips) if self.outcome.lpips else 1 - min(self.outcome.ssim)
        return worst, -min(self.outcome.psnr_db)

    @property
    def verdict(self) -> str:
        """Say whether it passed its gate, or that it has none."""
        budget = self.variant.budget
        free = budget.psnr_db == 0 and budget.ssim == 0 and budget.lpips == 1
        nothing_read = self.outcome is not None and not self.outcome.is_read_back
        return "; ".join(self.failures) or ("no limits set" if free and nothing_read else "within budget")


def predicted_times(path: str | None, request: GenerateRequest, checkpoint: Checkpoint) -> dict[str, str]:
    """Return what the newest prediction of such a video says, by quality, slice after slice: "9.1 s on v6e-8".

    Nothing without a path. Raises UserError for a file without predictions.
    """
    if path is None:
        return {}
    records = jsonl.read(Path(path), PredictionRecord) if Path(path).is_file() else []
    if not records:
        raise UserError(
            f"predictions={path!r}: expected a file of python -m pipeline.predict results_path=..., or null"
        )
    name = base_checkpoint(current_id(request.checkpoint), checkpoint.config("transformer"))
    size = request.width, request.height, request.num_frames, request.num_inference_steps
    found: dict[str, dict[str, str]] = {}
    for record in records:
        video = record.video
        of = video.width, video.height, video.num_frames, video.num_inference_steps
        if of != size or current_id(video.checkpoint) != name:
            continue
        for quality, preset in record.presets.items():
            if preset.total_time_s is not None:
                slices = found.setdefault(quality, {})
                slices[record.topology] = f"{preset.total_time_s:.1f} s on {record.topology}"
    return {quality: ", ".join(slices.values()) for quality, slices in found.items()}


def write_page(pairs: Pairs, rows: list[Row]) -> None:
    """Write the page of these rows, the reference's first among them, into the folder of the pairs."""
    assert pairs.folder is not None
    reference, *others = rows
    others.sort(key=lambda row: row.price)
    made_by = pairs.environment
    context = {
        "request": reference.variant.request,
        "device": pairs.devices,
        "versions": made_by.versions,
        "commit": (made_by.git_commit or "")[:9] + (" with changes" if made_by.git_dirty else ""),
        "rows": [_cells(row, reference) for row in others],
        "reference": _cells(reference, reference),
        "with_lpips": pairs.with_lpips,
        "with_readings": pairs.with_readings,
        "predicted": any(row.predicted for row in rows),
        "gain": GAIN,
        "prompts": [_prompt(pairs, index, [reference, *others]) for index in range(len(pairs.wanted))],
    }
    loader = jinja2.FileSystemLoader(_TEMPLATES)
    made = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    with atomic_path(pairs.folder / PAGE_FILE) as temporary:
        temporary.write_text(made.get_template("pairs.html").render(context), encoding="utf-8")


def _cells(row: Row, reference: Row) -> dict[str, Any]:
    """Return what the table says of a row."""
    outcome, base = row.outcome, reference.outcome
    found = {
        "name": row.variant.name,
        "verdict": row.verdict,
        "failed": bool(row.failures),
        "made": outcome is not None,
    }
    if outcome is None or base is None or row.request is None:
        return found
    computed = statistics.median([pair.steps_computed for pair in outcome.pairs])
    return {
        **found,
        "differs": _differs(row.request, reference),
        "steps": f"{computed:g} of {row.request.num_inference_steps}",
        "time_s": f"{outcome.denoise_time_s:.3g}",
        "speed": f"{base.denoise_time_s / outcome.denoise_time_s:.2f}" if outcome.denoise_time_s else "",
        "predicted": row.predicted or "",
        "psnr": _psnr(min(outcome.psnr_db)),
        "ssim": f"{min(outcome.ssim):.4f}",
        "lpips": f"{max(outcome.lpips):.4f}" if outcome.lpips else "",
        "read": f"{outcome.read_back['all']:.0%}" if outcome.is_read_back else "",
    }


def _differs(request: GenerateRequest, reference: Row) -> str:
    """Say in which keys a request is not the reference's."""
    assert reference.request is not None
    found = []
    for name, here in vars(request).items():
        there = getattr(reference.request, name)
        if dataclasses.is_dataclass(here):
            parts = [(part, value) for part, value in vars(here).items() if value != getattr(there, part)]
            found += [f"{name}.{part}={value}" for part, value in parts if part != "ratios"]
        elif here != there and name != "quality":
            found.append(f"{name}={here}")
    return ", ".join(found)


def _prompt(pairs: Pairs, index: int, rows: list[Row]) -> dict[str, Any]:
    """Return a prompt and seed with each variant's video."""
    prompt, seed = pairs.wanted[index]
    shown = []
    for row in rows:
        if row.outcome is None:
            continue
        pair = row.outcome.pairs[index]
        figures = [f"PSNR {_psnr(math.inf if pair.psnr_db is None else pair.psnr_db)}", f"SSIM {pair.ssim:.4f}"]
        figures += [f"LPIPS {pair.lpips:.4f}"] if pair.lpips is not None else []
        if pair.reading is not None:
            figures.append(
                "read: " + " ".join(str(pair.reading[name] or "?") for name in ("colour", "shape", "motion"))
            )
        shown.append({"name": row.variant.name, "video": video_path(pair.key), "figures": ", ".join(figures)})
    return {"prompt": prompt, "seed": seed, "reference": shown[0], "pairs": shown[1:]}


def _psnr(value: float) -> str:
    return "same" if math.isinf(value) else f"{value:.1f} dB"
