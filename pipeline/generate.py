"""Command line: `python -m pipeline.generate prompt="..."`. See --help."""

import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from pipeline.requests.config import GenerateConfig, request_field
from pipeline.requests.default_model import BIG_MODEL, default_model
from pipeline.requests.errors import RequestError
from pipeline.requests.unused import check_used
from splash_workbench.cli import command, given_keys
from splash_workbench.engines.settings import EngineSettings, engine_from
from splash_workbench.errors import from_config
from splash_workbench.files import require_writable

if TYPE_CHECKING:  # what imports jax and torch is imported once the options are read
    from pipeline.requests.batch_file import Entry
    from pipeline.requests.options import RunOptions
    from pipeline.requests.request import Stage
    from pipeline.terminal import Terminal

_multirun_dirs: set[Path] = set()


@command(
    "generate",
    GenerateConfig,
    text_or_list=("stages", "lora"),
    free=("engine.resources",),
    resolvers={"default_model": default_model, "request": request_field},
)
def main(settings: GenerateConfig) -> int:
    """Run the command; return its exit code, 128 + the signal's number where one ended it."""
    engine = from_config(lambda: engine_from(settings.engine))
    _check_combination(settings, engine)
    if settings.prompts is None or settings.prompts.endswith(".txt"):  # other lines may use what these do not
        check_used(settings, given_keys())
    if settings.topology is not None:
        return _compile_ahead(settings, settings.topology)
    from pipeline.requests.options import to_distributed
    from pipeline.runs.hosts import together
    from pipeline.stages.progress import Interrupted
    from pipeline.terminal import Terminal

    _set_up_logging(settings.verbose)
    terminal = Terminal()
    try:
        with together(to_distributed(settings)) as hosts, terminal.handling_signals():
            terminal.hosts = hosts
            return _generate(settings, engine, terminal)
    except Interrupted as error:
        terminal.close()
        if error.everywhere and terminal.hosts is not None and not terminal.hosts.is_first:
            return 128 + error.signal_number  # the first process says it
        said = f"interrupted {terminal.where}"
        if not settings.warm_up:
            command = "the same command" if settings.resume else "the same command without resume=false"
            is_kept = error.between_steps and terminal.keeps_steps
            said += f"; {command} goes on from {'there' if is_kept else 'what is saved'}"
        print(said, file=sys.stderr)
        return 128 + error.signal_number
    finally:
        terminal.close()


def _generate(settings: GenerateConfig, engine: EngineSettings | None, terminal: "Terminal") -> int:
    """Run what is asked for; return the exit code."""
    from pipeline.requests.options import RunOptions, to_parallel
    from pipeline.requests.request import parse_stages, to_request
    from pipeline.requests.run_names import run_name
    from pipeline.runs.request_run import generate, warm_up
    from pipeline.stages.progress import recorder_of, tracing
    from pipeline.terminal import timing_table
    from splash_workbench.profiles.sessions import how_to_look

    every = settings.checkpoint_every, settings.preview_every
    stages, run_options = parse_stages(settings.stages), RunOptions(settings.resume, to_parallel(settings), *every)
    cache_dir, results_path = _path(settings.cache_dir), _path(settings.results_path)
    if settings.prompts is not None or settings.num_videos != 1:
        if engine is not None:
            return _run_fleet(settings, stages, run_options, engine, terminal)
        return _run_batch(settings, stages, run_options, terminal)
    request = to_request(settings)
    run_dir = _path(settings.run_dir) or Path(settings.output_dir) / run_name(request, settings.name)
    _check_apart(run_dir, settings.name)
    _begin(settings, request.checkpoint)
    if settings.warm_up:
        timings = warm_up(request, stages=stages, run_options=run_options, cache_dir=cache_dir, progress=terminal)
        terminal.close()
        print(timing_table(timings))
        return 0
    recorder = recorder_of(settings, request)
    if recorder is not None:  # what is not run leaves no trace, and the profiler takes time
        run_options, results_path = dataclasses.replace(run_options, resume=False), None
    with tracing(recorder):
        result = generate(
            request,
            stages=stages,
            run_dir=run_dir,
            run_options=run_options,
            cache_dir=cache_dir,
            results_path=results_path,
            progress=terminal,
        )
    terminal.close()
    print(timing_table(result.timings))
    print(f"video: {result.video_path}" if result.video_path else f"stage outputs: {result.run_dir}")
    if recorder is not None:
        print("\n".join(how_to_look(recorder.logdir, recorder.run)))
    elif results_path is not None and not all(timing.reused for timing in result.timings):
        print(f"timings: {results_path}")
    return 0


def _compile_ahead(settings: GenerateConfig, topology: str) -> int:
    """Compile the request's programs for chips that are not here, into the compilation cache; start no chip."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    from pipeline.checkpoints.checks import check_request, checkpoint_of, part_configs
    from pipeline.predict.ahead import compile_ahead, request_programs, topology_devices
    from pipeline.requests.options import to_parallel
    from pipeline.requests.request import parse_stages, to_request
    from splash_workbench.compile_cache import use_compilation_cache

    _set_up_logging(settings.verbose)
    stages, request, cache_dir = parse_stages(settings.stages), to_request(settings), _path(settings.cache_dir)
    configs, checkpoint = part_configs(request.checkpoint, lambda: checkpoint_of(request, cache_dir))
    check_request(request, configs)
    use_compilation_cache()
    folder = jax.config.values["jax_compilation_cache_dir"]
    devices = topology_devices(topology)
    print(f"for {len(devices)} x {devices[0].device_kind}, which need not be here, into {folder}", flush=True)
    programs = request_programs(request, stages, to_parallel(settings), devices, configs, checkpoint)
    compile_ahead(programs, lambda text: print(f"  {text}", flush=True))
    print("copy that folder to the chips' hosts, and name it there: JAX_COMPILATION_CACHE_DIR")
    return 0


def _run_batch(
    settings: GenerateConfig,
    stages: tuple["Stage", ...],
    run_options: "RunOptions",
    terminal: "Terminal",
) -> int:
    from pipeline.runs.batch import Batch, prepare
    from pipeline.terminal import batch_table

    path, entries = _entries(settings)
    output_dir, cache_dir = Path(settings.output_dir), _path(settings.cache_dir)
    items = prepare(entries, path, stages, output_dir, run_options, cache_dir, terminal.checking)
    _begin(settings, ", ".join(dict.fromkeys(entry.request.checkpoint for entry in entries)))
    batch = Batch(items, _path(settings.results_path), terminal, terminal.say)
    try:
        batch.run_all()
    finally:
        terminal.close()
        print(batch_table(items), flush=True)
    return 1 if any(item.status == "failed" for item in items) else 0


def _run_fleet(
    settings: GenerateConfig,
    stages: tuple["Stage", ...],
    run_options: "RunOptions",
    engine: EngineSettings,
    terminal: "Terminal",
) -> int:
    """Run a batch on the slices of a cluster; start no JAX here, which would take their chips."""
    from pipeline.runs.fleet import Fleet, new_marker
    from pipeline.runs.slices import Job
    from pipeline.terminal import batch_table
    from splash_workbench.engines.cluster import connected

    path, entries = _entries(settings)
    output_dir = Path(settings.output_dir).absolute()
    require_writable(f"output_dir={settings.output_dir!r}", output_dir)
    job = Job(
        entries=tuple(entries),
        path=path,
        stages=stages,
        folder=Path.cwd(),
        output_dir=output_dir,
        marker=new_marker(),
        run_options=run_options,
        cache_dir=_path(settings.cache_dir),
        compilation_cache=settings.compilation_cache,
        omp_threads=os.environ.get("OMP_NUM_THREADS"),
    )
    with connected(engine, show_output=settings.verbose) as cluster:
        checkpoints = ", ".join(dict.fromkeys(entry.request.checkpoint for entry in entries))
        print(f"model {HydraConfig.get().runtime.choices['model']}, checkpoint {checkpoints}, on {cluster.line()}")
        fleet = Fleet(cluster, job, _path(settings.results_path), terminal.say)
        try:
            fleet.run_all()
        finally:
            terminal.close()
            if any(line.status != "waiting" for line in fleet.lines):
                print(batch_table(fleet.lines), flush=True)
    return 1 if any(line.status == "failed" for line in fleet.lines) else 0


def _entries(settings: GenerateConfig) -> tuple[Path | None, list["Entry"]]:
    """Return the file of a batch and what it asks for. Raises RequestError."""
    from pipeline.requests.batch_file import entries_of, read_entries

    path = _path(settings.prompts)
    return path, read_entries(path, settings) if path is not None else entries_of(settings)


def _check_combination(settings: GenerateConfig, engine: EngineSettings | None) -> None:
    if settings.topology is not None and not (settings.warm_up and settings.compilation_cache):
        raise RequestError(
            f"topology={settings.topology!r}: chips that are not here make no video; expected warm_up=true, which "
            "compiles for them, and compilation_cache=true"
        )
    if engine is not None:
        if settings.prompts is None and settings.num_videos == 1:
            raise RequestError("engine=ray: hands out the lines of a batch; expected prompts=FILE, or num_videos=")
        if settings.distributed.enabled or settings.distributed.coordinator is not None:
            raise RequestError("engine=ray and distributed.enabled: expected one of them; a slice is of one host")
        if not settings.resume:
            raise RequestError(
                "engine=ray and resume=false: a line goes on where another slice was lost; expected another output_dir"
            )
    if (path := settings.prompts) is not None:
        for name, instead in (("prompt", "put every prompt into the file"), ("run_dir", "use output_dir and name")):
            if (value := getattr(settings, name)) is not None:
                raise RequestError(f"prompts={path!r} and {name}={value!r}: expected one of them; {instead}")
        for name, what in (("warm_up", "warming up"), ("profile", "a trace")):
            if getattr(settings, name):
                raise RequestError(f"prompts and {name}=true: {what} takes one request; expected prompt=...")
    elif settings.num_videos != 1:
        for name in ("run_dir", "warm_up", "profile"):
            if value := getattr(settings, name):
                raise RequestError(f"num_videos={settings.num_videos} and {name}={value!r}: expected one of them")
    if settings.run_dir is not None and settings.name is not None:
        raise RequestError(f"run_dir={settings.run_dir!r} and name={settings.name!r}: expected one of them")


def _check_apart(run_dir: Path, name: str | None) -> None:
    """Raise RequestError where an earlier run of the same --multirun went to this folder."""
    hydra = HydraConfig.get()
    if hydra.mode is not RunMode.MULTIRUN:
        return
    if hydra.job.num == 0:
        _multirun_dirs.clear()
    if run_dir in _multirun_dirs:
        given = f"run_dir={str(run_dir)!r}" if name is None else f"{name=}"
        raise RequestError(
            f"{given}: an earlier one of these runs went there; leave it out, or give a name with what differs, e.g. "
            "name={seed}"
        )
    _multirun_dirs.add(run_dir)


def _begin(settings: GenerateConfig, checkpoint: str) -> None:
    """Turn the compilation cache on, and say what runs, where, and why this model."""
    import jax

    from splash_workbench.compile_cache import use_compilation_cache

    if settings.compilation_cache:
        use_compilation_cache()
    device = jax.devices()[0]
    kind = device.device_kind if device.device_kind == device.platform else f"{device.device_kind} ({device.platform})"
    where = f"{jax.device_count()} x {kind}"
    choice = HydraConfig.get().runtime.choices["model"]
    if "model" in given_keys():
        why = "as asked"
    elif choice == BIG_MODEL:
        why = "the default on a TPU"
    else:
        why = f"the default without a TPU; model={BIG_MODEL} for the full one"
    print(f"model {choice} ({why}), checkpoint {checkpoint}, on {where}", flush=True)


def _set_up_logging(verbose: bool) -> None:
    logging.basicConfig(format="  %(message)s", level=logging.WARNING)
    logging.getLogger("pipeline").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("splash_attn").setLevel(logging.INFO)  # which implementation runs, and why
    # Of libraries, about things that are theirs: optional packages that are not here, deprecations.
    for library, warning in (("transformers", FutureWarning), ("diffusers", DeprecationWarning)):
        logging.getLogger(library).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=warning)


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


if __name__ == "__main__":
    from pipeline.runs.hosts import end_with

    sys.exit(end_with(main))
