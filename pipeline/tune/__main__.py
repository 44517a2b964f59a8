"""Command line: `python -m pipeline.tune topology=v6e-8`. The fastest compiler options of a denoising step."""

import dataclasses
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offline_tpu import libtpu
from offline_tpu.options import check_with_compiler, checked_options, options_text
from pipeline.model import step_options
from pipeline.model.denoise_step import EVERYTHING, StepWork
from pipeline.model.sharding import ParallelPlan
from pipeline.model.step_options import Entry, StepCall
from pipeline.predict.planner import SOURCES, Predictor
from pipeline.predict.presets import ALL, UNUSED, Video, video_of
from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.options import to_parallel
from pipeline.requests.request import AttentionOptions
from pipeline.runs.records import environment
from pipeline.stages.presets import settle_parallel
from pipeline.tune.search import SPACE, Found, most_trials, search
from splash_workbench import cli
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import require_writable
from splash_workbench.provenance import Environment
from splash_workbench.records import jsonl
from splash_workbench.records.base import utc_now
from splash_workbench.records.jsonl import decode, encode
from splash_workbench.records.step_search import StepSearchRecord, TriedOptions
from splash_workbench.trial_status import Label
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import Runner
from splash_workbench.workers.room import check_timeout_s, worker_count


@dataclasses.dataclass
class TuneConfig(GenerateConfig):
    """Keys of the command line: those of generate, and these."""

    topology: str = "v6e-8"
    timeout_s: float = 1200.0
    flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    results_path: str | None = None
    quality: str = ALL
    promote: Any = True
    reuse: bool = True
    workers: int | None = None


_UNUSED = (*UNUSED, "prompt", "negative_prompt", "stages", "fps", "seed", "profile", "profile_run", "logdir")


@cli.command("tune", TuneConfig, unused=_UNUSED, free=("flags",))
def main(settings: TuneConfig) -> int:
    """Run the command; return its exit code."""
    from_config(lambda: check_timeout_s(settings.timeout_s))
    workers = from_config(lambda: worker_count(settings.workers))
    if (path := _promoted_to(settings.promote)) is not None:
        require_writable(f"promote={settings.promote}", path.parent)
    flags = from_config(lambda: _checked_flags(settings.flags))
    space = dict(SPACE) | flags
    video = video_of(settings, settings.topology, settings.quality)
    asked = [{flag: value} for flag, values in flags.items() for value in values if value]
    from_config(lambda: check_with_compiler(video.device, asked))
    cache = JobCache.of_user(settings.reuse)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _search_all(settings, video, cache, Runner(Path(folder)), space, workers, path)
    for text in (*video.refused, cache.trouble if cache is not None else None):
        if text:
            print(text, file=sys.stderr)
    return 0


def _search_all(
    settings: TuneConfig,
    video: Video,
    cache: JobCache | None,
    runner: Runner,
    space: Mapping[str, tuple[str, ...]],
    workers: int,
    path: Path | None,
) -> None:
    """Search each kind of step that runs the transformer's blocks once; print, keep and record what is found."""
    captured = libtpu.with_compiler(environment(SOURCES))
    done: set[tuple[str, str, bool, AttentionOptions]] = set()
    for name, preset in video.presets.items():
        request = preset.request
        predictor = video.predictor(preset, settings.timeout_s, lambda text: None, cache=cache, runner=runner)
        plan = predictor.plan(settle_parallel(to_parallel(settings), request))
        for work in dict.fromkeys((EVERYTHING, *preset.schedule.steps)):
            same = (str(plan), str(work), request.int8_linears, request.attention)
            if same in done or not work.blocks:
                continue
            done.add(same)
            kind = _Kind(predictor, plan, work, most_trials(space))
            print(f"quality={name}, {work}: {plan} on {settings.topology}", flush=True)
            default = step_options.default(request.int8_linears)
            found = search(kind.try_options, default, space, workers, runner.cancel)
            if found.winner.time_s is None or kind.call is None:
                raise PipelineError(f"{found.default.error}")
            kept = _keep(path, kind.call, found, captured)
            _print_result(found, kept)
            if settings.results_path is not None:
                record = StepSearchRecord(
                    label=Label.PREDICTED,
                    topology=settings.topology,
                    request=encode(request),
                    call=encode(kind.call),
                    default=found.default,
                    winner=found.winner,
                    tried=found.tried,
                    kept=kept,
                    environment=captured,
                )
                jsonl.append_once(Path(settings.results_path), record)


def _promoted_to(promote: Any) -> Path | None:
    """Return the file of entries that a winner goes to, None for none. Raises RequestError."""
    paths = {True: step_options.user_path(), "shipped": step_options.SHIPPED, False: None}
    if not isinstance(promote, bool | str) or promote not in paths:
        raise RequestError(f"promote={promote!r}: expected true, false or shipped")
    return paths[promote]


def _checked_flags(flags: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Return the flags of a command line with their values as text. Raises ValueError."""
    checked = {}
    for flag, values in flags.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"flags.{flag}={values!r}: expected a list of values, as [true,false].")
        checked[flag] = tuple(checked_options({flag: value})[flag] if value != "" else "" for value in values)
    return checked


class _Kind:
    """One kind of step: tries options and says what became of them."""

    def __init__(self, predictor: Predictor, plan: ParallelPlan, work: StepWork, most: int) -> None:
        self._predictor, self._plan, self._work, self._most = predictor, plan, work, most
        self._start, self._count, self._lock = time.monotonic(), 0, threading.Lock()
        self._first_s: float | None = None
        #: What the step is, once one was compiled.
        self.call: StepCall | None = None

    def try_options(self, options: Mapping[str, str], short_attention: bool) -> TriedOptions:
        """Return what becomes of the step with these options. Raises UserError for flags that libtpu refuses."""
        predictor = dataclasses.replace(self._predictor, step_options=dict(options))
        try:
            result = predictor.stage("denoise", self._plan, self._work, short_attention)
            self.call = decode(result["step_call"], StepCall)
            tried = decode(result | {"options": dict(options), "short_attention": short_attention}, TriedOptions)
        except PipelineError as error:
            text = str(error).partition("\n")[0]
            tried = TriedOptions(options=dict(options), short_attention=short_attention, error=text)
        self._say(tried)
        return tried

    def _say(self, tried: TriedOptions) -> None:
        with self._lock:
            self._count += 1
            took_s = time.monotonic() - self._start
            left_s = took_s / self._count * max(0, self._most - self._count)
            shown = f"{tried.time_s:.4f} s" if tried.time_s is not None else f"no time ({tried.error})"
            if tried.time_s is not None and tried.short_attention:
                self._first_s = self._first_s or tried.time_s
                shown += f" {tried.time_s / self._first_s - 1:+6.1%}"
            how = "attention compiled short" if tried.short_attention else "compiled whole"
            place = f"{self._count:2d} of at most {self._most}"
            left = f"{took_s / 60:.0f} min so far, at most {left_s / 60:.0f} left"
            print(f"  {place}: {shown}, {how}, {options_text(tried.options)}; {left}", flush=True)


def _keep(path: Path | None, call: StepCall, found: Found, captured: Environment) -> str:
    """Write the winner as an entry if it beats the default; return what was done, and why."""
    winner, default = found.winner, found.default
    if winner.time_s is None or winner is default:
        return "not kept: nothing beats the default options"
    if path is None:
        return "not kept: promote=false"
    entry = Entry(
        call=call,
        options=winner.options,
        label=Label.PREDICTED.value,
        time_s=winner.time_s,
        default_time_s=default.time_s,
        versions=captured.compiler_versions,
        source=captured.backend_hash,
        created_at=utc_now(),
    )
    try:
        step_options.keep(path, entry)
    except OSError as error:
        raise UserError(f"{path.name}: the entry was not written ({error.strerror})") from error
    return "kept as a shipped entry" if path == step_options.SHIPPED else "kept: every such step takes them from now on"


def _print_result(found: Found, kept: str) -> None:
    winner, default = found.winner, found.default
    assert winner.time_s is not None  # without one the command ended before
    gain = ""
    if default.time_s is None:
        print(f"  default: no time ({default.error})")
    else:
        print(f"  default: {default.time_s:.4f} s a step, {default.compile_cpu_s:.0f} CPU s to compile")
        gain = f" ({winner.time_s / default.time_s - 1:+.1%})"
    print(
        f"  best:    {winner.time_s:.4f} s a step{gain}, "
        f"{winner.compile_cpu_s:.0f} CPU s to compile: {options_text(winner.options)}"
    )
    print(f"  {kept}; all times are predicted", flush=True)


if __name__ == "__main__":
    sys.exit(main())
