"""Judges the reference and the candidates: makes their videos, compares and reads them, keeps records and a page."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from pipeline.checkpoints.checks import checkpoint_of
from pipeline.checkpoints.shapes import parse_caption
from pipeline.model.attention import check_runs_here
from pipeline.quality.config import Budget, QualityConfig
from pipeline.quality.gate import Comparison, QualityVariant, to_uint8
from pipeline.quality.learned import require_weights
from pipeline.quality.page import Row, predicted_times, write_page
from pipeline.quality.pairs import Pairs
from pipeline.requests.config import GenerateConfig
from pipeline.requests.media import open_image
from pipeline.requests.options import to_parallel
from pipeline.requests.request import GenerateRequest, to_request
from pipeline.runs.video import write_mp4
from splash_workbench.compile_cache import use_compilation_cache
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import locked, require_writable
from splash_workbench.overrides import one_line
from splash_workbench.provenance import stable_hash
from splash_workbench.records import jsonl
from splash_workbench.records.quality import QualityRecord
from splash_workbench.trial_status import Label

_NOT_OF_A_CANDIDATE = {"name", "budget"}
_OF_ALL = {
    *("prompt", "prompts", "seed", "stages", "topology", "num_videos", "run_dir", "output_dir", "results_path"),
    *("resume", "warm_up", "profile", "profile_run", "logdir", "verbose"),
}
_LEAST_SIDE = 32  # pixels, that AlexNet's strides leave something of
_REFERENCE = "reference"
_MEASURED_ANEW = ("denoise_times_s",)  # fields of a record that differ where the same command is given again
_BAR_FORMAT = "  {desc} {bar:24} {n:.0f} of {total:.0f} videos{postfix}, {elapsed} so far, {remaining} left"
_NAME_LENGTH = 80  # bytes
_FRAME_BYTES = 3 * 4  # a pixel of the reference, which is kept until all is compared


def judge(settings: QualityConfig) -> int:
    """Print a table, append records, write a page; return 1 where one is over its budget, failed, or the reference
    does not follow its prompts enough."""
    prompts, are_captions = _prompts(settings)
    _check_seeds(settings.seeds)
    if not (settings.candidates or are_captions or settings.page_dir or settings.videos_dir):
        raise UserError(
            "candidates=[]: expected some to compare; without, captions of which something is read, page_dir or "
            "videos_dir"
        )
    if settings.compilation_cache:
        use_compilation_cache()
    if settings.lpips:
        require_weights()
    wanted = [(prompt, seed) for prompt in prompts for seed in settings.seeds]
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(GenerateConfig)}
    base = GenerateConfig(**{**fields, "prompt": prompts[0], "prompts": None})
    reference = QualityVariant(_REFERENCE, to_request(base), to_parallel(base), Budget())
    from_config(lambda: [dataclasses.replace(reference.request, prompt=prompt) for prompt in prompts])
    if reference.request.quality != "exact":
        raise UserError(
            f"quality={reference.request.quality}: expected exact, what candidates are compared with; give it to a "
            "candidate"
        )
    check_runs_here(reference.request.attention, reference.request.dtype)
    if settings.lpips and (side := min(base.height or _LEAST_SIDE, base.width or _LEAST_SIDE)) < _LEAST_SIDE:
        raise UserError(f"{side} pixels: LPIPS needs {_LEAST_SIDE} a side or more; expected those, or lpips=false")
    chosen = _chosen(settings, base)
    if not 0 <= settings.follows <= 1:
        raise UserError(f"follows={settings.follows}: expected 0 to 1, a part of the videos")
    if not settings.first_frame_db >= 0:
        raise UserError(f"first_frame_db={settings.first_frame_db}: expected 0 or more, in dB")
    cache_dir = Path(settings.cache_dir) if settings.cache_dir else None
    checkpoint = checkpoint_of(reference.request, cache_dir)
    if reference.request.image is not None:
        open_image(reference.request.image)
    if settings.videos_dir is not None:
        require_writable(f"videos_dir={settings.videos_dir}", Path(settings.videos_dir))
    predicted = predicted_times(settings.predictions, reference.request, checkpoint)
    page_dir = Path(settings.page_dir) if settings.page_dir is not None else None
    if page_dir is not None:
        require_writable(f"page_dir={page_dir}", page_dir)
    pairs = Pairs(reference, wanted, page_dir, cache_dir, settings.lpips, are_captions)
    busy = f"page_dir={page_dir}: another process compares there; expected another folder"
    with locked(page_dir / ".lock", busy) if page_dir is not None else contextlib.nullcontext():
        rows = _compare_all(settings, pairs, (reference, *chosen), predicted)
    not_made = sum(row.outcome is None for row in rows)
    over = any(row.failures for row in rows if row.outcome is not None)
    if page_dir is not None:
        print(page_dir / "index.html")
    verdict = "over budget" if over else "all within budget"
    print(f"{verdict}, {not_made} not made" if not_made else verdict)
    return int(over or not_made > 0)


def _prompts(settings: QualityConfig) -> tuple[list[str], bool]:
    """Return the prompts, and whether they are captions, of which something is read back."""
    if settings.prompt is not None and settings.prompts is not None:
        raise UserError(f"prompt={settings.prompt!r} and prompts={settings.prompts!r}: expected one of them")
    if settings.prompt is not None:
        return [settings.prompt], False
    if settings.prompts is not None:
        path = Path(settings.prompts)
        if path.suffix != ".txt" or not path.is_file():
            raise UserError(f"prompts={settings.prompts!r}: expected a file *.txt, a prompt a line")
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
        except UnicodeDecodeError as error:
            raise UserError(f"prompts={settings.prompts!r}: not UTF-8 text ({error.reason})") from error
        prompts = list(dict.fromkeys(filter(None, lines)))
        if not prompts:
            raise UserError(f"prompts={settings.prompts!r}: holds no prompts; expected one a line")
        return prompts, False
    if not settings.captions:
        raise UserError("captions=[]: expected at least one, or prompts=mine.txt in place of captions")
    from_config(lambda: [parse_caption(caption) for caption in settings.captions])
    return list(settings.captions), True


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or not all(0 <= seed < 2**63 for seed in seeds):
        raise UserError(f"seeds={list(seeds)}: expected at least one, whole numbers from 0 to {2**63 - 1}")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"seeds={list(seeds)}: expected each once, as each makes the same videos again")


def _chosen(settings: QualityConfig, base: GenerateConfig) -> list[QualityVariant]:
    named = [fields.get("name") if isinstance(fields, dict) else None for fields in settings.candidates]
    candidates = [
        _candidate(base, fields, settings.budget)
        for name, fields in zip(named, settings.candidates, strict=True)
        if not settings.only or name in settings.only
    ]
    names = [str(name) for name in named]
    for name in names:
        if name == _REFERENCE or names.count(name) > 1:
            raise UserError(f"candidates: {name!r} is the name of two; expected one of its own for each")
    if unknown := set(settings.only) - set(names):
        raise UserError(f"only={sorted(unknown)}: expected some of {', '.join(names)}")
    return candidates


def _candidate(base: GenerateConfig, fields: Any, budget: Budget) -> QualityVariant:
    """Return a candidate of the configuration: the reference's keys with its own in their place."""
    if not isinstance(fields, dict):
        raise UserError(f"candidates=[{fields!r}]: expected mappings with a name, e.g. {{name: mine, dtype: bfloat16}}")
    name = fields.get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"candidates: expected a name in {fields}")
    changes = {key: value for key, value in fields.items() if key not in _NOT_OF_A_CANDIDATE}
    if idle := sorted(set(changes) & _OF_ALL):
        raise UserError(f"candidate {name!r}: {idle[0]} is the same for all, or used by none; expected it left out")
    own = fields.get("budget", {})  # a Budget where it names another key of the configuration
    own = dataclasses.asdict(own) if isinstance(own, Budget) else own
    limits = dataclasses.asdict(budget)
    if not isinstance(own, dict) or set(own) - set(limits):
        raise UserError(f"candidate {name!r}: budget={own!r}: expected some of {', '.join(limits)}")
    limits |= own
    try:
        settings: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(base), changes))
        request = to_request(settings)
        if request.attention.implementation is not None:  # what a preset chooses may cost its row only
            check_runs_here(request.attention, request.dtype)
        for size in ("height", "width", "num_frames"):
            if getattr(settings, size) != getattr(base, size):
                raise UserError(f"{size}={getattr(settings, size)}: expected the reference's, {getattr(base, size)}")
        return QualityVariant(name, request, to_parallel(settings), Budget(**limits))
    except (UserError, OmegaConfBaseException, TypeError, ValueError) as error:
        raise UserError(f"candidate {name!r}: {str(error).splitlines()[0]}") from error


def _compare_all(
    settings: QualityConfig, pairs: Pairs, variants: Sequence[QualityVariant], predicted: dict[str, str]
) -> list[Row]:
    """Compare each variant, print its line, keep its record, and write the page anew."""
    missing: dict[str, list[int]] = {}
    errors: dict[str, Exception] = {}
    for variant in variants:
        with _failing_alone(variant, errors):
            check_runs_here(variant.request.attention, variant.request.dtype)
            missing[variant.name] = pairs.missing(variant)
    references = pairs.references_to_make(sorted({index for found in missing.values() for index in found}))
    if pairs.folder is not None:
        request = pairs.reference.request
        size = request.num_frames * request.height * request.width * _FRAME_BYTES
        require_writable(f"page_dir={pairs.folder}", pairs.folder, max(1, size * len(references)))
    total = len(references) + sum(len(found) for name, found in missing.items() if name != _REFERENCE)
    rows: list[Row] = []
    with _bar(total) as bar:

        def tell(part: float, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(part)

        _say(bar, _header(pairs.with_readings))
        for variant in variants:
            before = bar.n
            bar.set_description_str(variant.name)
            if variant.name not in errors:
                with _failing_alone(variant, errors):
                    outcome = Comparison(variant, pairs.compare(variant, tell))
            if variant.name in errors:
                bar.total -= len(missing.get(variant.name, ())) - (bar.n - before)
                rows.append(Row(variant, None, None, [f"not made: {_reason(errors[variant.name])}"], None))
                _say(bar, f"  {variant.name:<22} {rows[-1].failures[0]}")
                continue
            if variant is pairs.reference and settings.videos_dir is not None:
                _write_videos(Path(settings.videos_dir), pairs, variant.request.fps)
            failures = _failures(outcome, settings, pairs)
            request = pairs.settled(variant)
            preset = "exact" if variant is pairs.reference else request.quality if request.quality != "exact" else None
            rows.append(Row(variant, outcome, request, failures, predicted.get(preset or "")))
            _say(bar, _line(outcome, failures))
            if settings.results_path is not None:
                record = _record(outcome, failures, settings, request, pairs)
                jsonl.append_once(Path(settings.results_path), record, _MEASURED_ANEW)
            if pairs.folder is not None:
                write_page(pairs, rows)
    if pairs.folder is not None:
        write_page(pairs, rows)
        if not any(row.outcome is None for row in rows):
            pairs.drop_references()
    return rows


@contextlib.contextmanager
def _failing_alone(variant: QualityVariant, failed: dict[str, Any]) -> Iterator[None]:
    """Note what a candidate fails with, so that the others go on; what the reference fails with is raised."""
    try:
        yield
    except OSError:  # of a full disk, which all write to
        raise
    except Exception as error:
        if variant.name == _REFERENCE:
            raise
        failed[variant.name] = error


def _reason(error: Exception) -> str:
    text = one_line(error)
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text[:300]}"


def _bar(total: int) -> Any:
    interval_s = 0.2 if sys.stderr.isatty() else 30  # seconds: a file gets few lines
    return tqdm(total=total, bar_format=_BAR_FORMAT, smoothing=0, mininterval=interval_s, disable=total == 0)


def _say(bar: Any, text: str) -> None:
    bar.clear()
    print(text, flush=True)


def _write_videos(folder: Path, pairs: Pairs, fps: float) -> None:
    for (prompt, seed), video in zip(pairs.wanted, pairs.references(), strict=True):
        text = "".join(letter if letter.isalnum() else "-" for letter in prompt)
        name = text if text.isascii() and len(text) <= _NAME_LENGTH and text.replace("-", " ") == prompt else None
        if name is None:  # others may look alike
            name = f"{text.encode()[:_NAME_LENGTH].decode(errors='ignore')}-{stable_hash(prompt)[:8]}"
        write_mp4(folder / f"{name}-seed{seed}.mp4", to_uint8(video), fps)


def _failures(outcome: Comparison, settings: QualityConfig, pairs: Pairs) -> list[str]:
    """Say why a variant fails: its budget, or of the reference what it shows."""
    failures = outcome.failures
    if outcome.variant is not pairs.reference:
        return failures
    if outcome.is_read_back and outcome.read_back["all"] < settings.follows:
        failures = [f"follows its prompts in {outcome.read_back['all']:.0%}, expected {settings.follows:.0%}"]
    first = [pair.first_frame_db for pair in outcome.pairs if pair.first_frame_db is not None]
    if first:
        print(f"  first frames beside their images: {min(first):.1f} dB or more", flush=True)
        if min(first) < settings.first_frame_db:
            failures.append(f"first frame {min(first):.1f} dB < {settings.first_frame_db:g} dB")
    return failures


_READ = ("colour", "shape", "motion", "all")


def _header(with_readings: bool) -> str:
    read = "".join(f" {name:>7}" for name in _READ) if with_readings else ""
    return f"  {'':<22} {'PSNR dB':>8} {'SSIM':>7} {'LPIPS':>7} {'denoise s':>9}{read}"


def _line(outcome: Comparison, failures: list[str]) -> str:
    """Return a line: figures of the worst video, and the fractions of videos that show what the prompt says."""
    psnr = min(outcome.psnr_db)
    read = "".join(f" {outcome.read_back[name]:>7.0%}" for name in _READ) if outcome.is_read_back else ""
    same = "same" if psnr == float("inf") else f"{psnr:.1f}"
    lpips = f"{max(outcome.lpips):.4f}" if outcome.lpips else ""
    figures = f"{same:>8} {min(outcome.ssim):>7.4f} {lpips:>7} {outcome.denoise_time_s:>9.2f}{read}"
    return f"  {outcome.variant.name:<22} {figures}  {'; '.join(failures) or 'ok'}"


def _record(
    outcome: Comparison, failures: list[str], settings: QualityConfig, settled: GenerateRequest, made_by: Pairs
) -> QualityRecord:
    """Return the record of a variant. settled: its request with what its quality chooses."""
    variant, pairs = outcome.variant, outcome.pairs
    return QualityRecord(
        label=Label.MEASURED,
        device=made_by.devices,
        environment=made_by.environment,
        request=dataclasses.asdict(variant.request),
        candidate=variant.name,
        parallel=dataclasses.asdict(variant.parallel),
        prompts=tuple(dict.fromkeys(pair.prompt for pair in pairs)),
        seeds=tuple(settings.seeds),
        budget={"follows": settings.follows} if variant.name == _REFERENCE else dataclasses.asdict(variant.budget),
        chosen=choices(settled),
        psnr_db=tuple(pair.psnr_db for pair in pairs),
        ssim=outcome.ssim,
        lpips=outcome.lpips,
        denoise_times_s=tuple(pair.denoise_time_s for pair in pairs),
        steps_computed=tuple(pair.steps_computed for pair in pairs),
        readings=tuple(pair.reading for pair in pairs if pair.reading is not None),
        read_back=outcome.read_back,
        failures=tuple(failures),
    )


def choices(settled: GenerateRequest) -> dict[str, Any]:
    """Return what of a request is not exact, as its user or its quality chose it."""
    cache = settled.cache
    return {
        "qk_dtype": settled.attention.qk_dtype,
        "quantization": settled.quantization,
        "method": cache.method,
        "threshold": cache.threshold,
        "unconditional_every": cache.unconditional_every,
    }
