"""Command line: `python -m pipeline.predict topology=v6e-8`. What a video costs on chips that are not here."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

from offline_tpu.options import check_with_compiler, checked_options
from pipeline.predict.presets import ALL, UNUSED, predict_presets, video_of
from pipeline.predict.report import make_report, print_report, write_timelines
from pipeline.requests.config import GenerateConfig
from pipeline.requests.options import to_parallel
from pipeline.requests.request import parse_stages
from pipeline.stages.presets import settle_parallel
from pipeline.stages.progress import check_profile_run
from splash_workbench import cli
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import write_json
from splash_workbench.records import jsonl
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.room import check_timeout_s

#: Fields of a record that differ where the same command is given again: what it took here.
_TIMED = ("compile_time_s", "compile_cpu_s", "compile_peak_rss_bytes", "wall_time_s")


@dataclasses.dataclass
class PredictConfig(GenerateConfig):
    """Keys of the command line: those of generate, and these."""

    topology: str = "v6e-8"
    json: str | None = None
    timeout_s: float = 1200.0
    compiler_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    results_path: str | None = None
    quality: str = ALL
    reuse: bool = True


@cli.command("predict", PredictConfig, text_or_list=("stages",), unused=UNUSED, free=("compiler_options",))
def main(settings: PredictConfig) -> int:
    """Run the command; return its exit code."""
    from_config(lambda: check_timeout_s(settings.timeout_s))
    options = from_config(lambda: checked_options(settings.compiler_options))
    stages = parse_stages(settings.stages)
    check_profile_run(settings.profile_run)
    video = video_of(settings, settings.topology, settings.quality)
    from_config(lambda: check_with_compiler(video.device, [options]))
    first = video.first
    parallel = settle_parallel(to_parallel(settings), first.request)
    cache = JobCache.of_user(settings.reuse)
    say = functools.partial(print, " ", file=sys.stderr, flush=True)
    predictor = video.predictor(first, settings.timeout_s, say, compiler_options=options, cache=cache)
    prediction = predictor.predict(stages, parallel)
    presets, failed = predict_presets(video.presets, predictor, prediction, to_parallel(settings))
    notes = (*video.refused, *failed)
    report = make_report(first.request, settings.topology, prediction, video.source, options, presets, notes)
    print_report(report)
    if settings.json is not None:
        write_json(Path(settings.json), jsonl.encode(report))
    if settings.results_path is not None:
        jsonl.append_once(Path(settings.results_path), report.without_ops(), _TIMED)
    if settings.profile:
        print("\n".join(write_timelines(report, Path(settings.logdir), settings.profile_run)))
    if cache is not None and cache.trouble:
        print(cache.trouble, file=sys.stderr)
    if prediction.failures:
        raise UserError("; ".join(prediction.failures.values()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
