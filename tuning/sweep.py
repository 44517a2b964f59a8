"""Find the fastest block sizes and variant of the kernel: `python -m tuning.sweep --help`."""

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from offline_tpu.options import options_text
from splash_attn import tuned
from splash_workbench import cli, provenance
from splash_workbench.engines.cluster import Cluster, connected
from splash_workbench.engines.runner import ClusterRunner
from splash_workbench.errors import EXIT_USER_ERROR, UserError, from_config
from splash_workbench.files import locked, require_writable
from splash_workbench.profiles import sessions
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import JOBS_PER_WORKER, Runner, Usage
from splash_workbench.workers.room import WORKER_BYTES, room_line
from tuning import hparams
from tuning import kernel_sweeps as kernels
from tuning.backends.base import Target, context_of
from tuning.backends.evaluate import Evaluator
from tuning.kernel_sweeps import capture
from tuning.kernels import promoted
from tuning.on_nodes import OnNode, shipped_files
from tuning.passes import Passes, todays_keys
from tuning.search import kernel_settings
from tuning.search.kernel_settings import KernelSweepSchema
from tuning.search.settings import SweepSchema, SweepSettings, settings_from
from tuning.search.space import Candidates
from tuning.search.study import Search, storage_errors, where
from tuning.traces import of_sweep
from tuning.trials import records
from tuning.trials.contenders import SideBySide
from tuning.trials.promote import Promotion, promote
from tuning.trials.records import Trial, best_of, ranked


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep.

    Attributes:
      directory: where its records are.
      trials: one for each candidate of the study, best first.
      winner: the best ok trial with a time; None where there is none.
      side_by_side: what the winner of a user's kernel was timed beside.
      evaluated_count: trials made by this run, from the compile cache or by a job; the others were on record.
    """

    directory: Path
    trials: tuple[Trial, ...]
    winner: Trial | None
    candidates: Candidates
    evaluated_count: int
    wall_time_s: float
    usage: Usage
    side_by_side: SideBySide | None = None

    def effort(self) -> dict[str, Any]:
        """Return what this run took. Candidates from the cache are in no rate."""
        jobs = self.usage.job_count
        return {
            "wall_time_s": self.wall_time_s,
            "jobs": jobs,
            "from_cache": self.evaluated_count - jobs,
            "candidates_per_minute": 60 * jobs / self.wall_time_s if jobs else None,
            "workers_started": self.usage.worker_count,
            "peak_memory_bytes": self.usage.peak_memory_bytes or None,
            "peak_disk_bytes": self.usage.peak_disk_bytes,
        }


def sweep(settings: SweepSettings, *, report: Callable[[str], None] = print) -> SweepResult:
    """Run or resume a sweep; call `report` with each line for the user.

    Raises:
      UserError: the device does not fit the backend or is not there, no candidate can be valid, a folder or file
        cannot be written or read, the same sweep is running, or the engine is not there.
    """
    if settings.engine is None:
        return _sweep(settings, report, None)
    with connected(settings.engine) as cluster:
        workers = settings.workers or cluster.require_room(WORKER_BYTES)
        return _sweep(dataclasses.replace(settings, workers=workers), report, cluster)


def _sweep(settings: SweepSettings, report: Callable[[str], None], cluster: Cluster | None) -> SweepResult:
    workload, backend = settings.workload, settings.backend
    target = backend.find_target(settings.device)
    captured = capture(settings)
    context = context_of(workload, target, backend, captured, settings.compiler_options)
    sweeps_dir = settings.results_dir / "sweeps"
    workers = settings.workers
    fewer = f"fewer workers= than {workers}" if workers > 1 else ""
    require_writable(f"results_dir={settings.results_dir}", sweeps_dir, workers * backend.scratch_bytes, fewer)
    if settings.promote and (tuned_path := settings.tuned_path) is not None:
        require_writable(f"tuned={tuned_path}", tuned_path.parent)
        from_config(lambda: promoted.read(tuned_path))
    elif settings.promote and target.device_kind.startswith("TPU"):
        names = "" if settings.promotion_dir else f" ({tuned.USER_VARIABLE} names the folder; promote=false needs none)"
        require_writable(f"promote={settings.promote}{names}", settings.promotion_dir or tuned.user_dir())
    first = from_config(lambda: todays_keys(settings, target.device_kind)) if settings.promote else []
    directory = sweeps_dir / f"{workload.name}-{target.name}-{backend.name}-{context[:8]}"
    state, path = directory / "state", directory / records.TRIALS_FILE
    vmem_limit_bytes = target.spec.vmem_bytes if settings.vmem_pruning and target.spec else None
    space: Any = settings.space  # which knows its own kind of workload
    candidates = from_config(lambda: space.candidates(workload, vmem_limit_bytes))
    if not candidates.valid:
        call = workload.name if settings.source is None else f"{settings.kernel_name}, {workload.call}"
        reasons = "; ".join(f"{count} {reason}" for reason, count in candidates.pruned.items())
        raise UserError(f"{call}: no candidate of space={settings.space.name} can be valid: {reasons}.")
    cache = JobCache.of_user(settings.reuse)
    if cluster is None:
        runner = Runner(state / "work", jobs_per_worker=JOBS_PER_WORKER)
    else:
        files = shipped_files(settings.source)
        runner = ClusterRunner(cluster, OnNode(backend, captured, settings.source, files, settings.reuse))
    evaluator = Evaluator(
        runner=runner,
        workload=workload,
        target=target,
        backend=backend,
        context=context,
        environment=captured,
        timeout_s=settings.timeout_s,
        measure=settings.measure,
        cache_dir=cache.directory / "numerics" if cache else state / "work" / "numerics",
        cache=cache,
        compiler_options=settings.compiler_options,
        source=settings.source,
        bound_ms=kernels.bound_ms(settings, target),
    )
    if settings.compiler_options:
        backend.check_options(target, settings.compiler_options)
    busy = f"{directory}: another sweep is writing here; wait for it or stop it."
    with locked(state / "lock", busy), contextlib.ExitStack() as stack:
        shutil.rmtree(state / "work", ignore_errors=True)  # of a sweep that is dead
        stack.callback(shutil.rmtree, state / "work", ignore_errors=True)
        recorded = from_config(lambda: records.read(path))
        on_record = {trial.key: trial for trial in records.reusable(recorded, settings.timeout_s)}
        if not settings.quick:
            on_record = {key: trial for key, trial in on_record.items() if trial.compiled == "whole"}
        if settings.source is not None and not on_record:
            stack.callback(runner.cancel)
            kernels.look(settings, evaluator)
            runner.usage.job_count = 0  # it is no candidate
        fingerprint = provenance.stable_hash(settings.space.fingerprint)
        study_name = f"{settings.space.name}-{settings.search.sampler}-{settings.search.seed}-{fingerprint}"
        storage_path = state / "study.sqlite3"
        if settings.search.storage is not None:
            study_name = f"{directory.name}/{study_name}"  # other workloads may be in the same storage
        with storage_errors(where(settings.search, storage_path)):
            search = Search(storage_path, study_name, settings.space, candidates, settings.search, on_record, first)
            stack.callback(search.close)
            where_run = cluster.line() if cluster is not None else room_line()
            for line in _introduction(settings, target, candidates, search, path, where_run):
                report(line)
            start = time.monotonic()
            passes = Passes(settings, search, evaluator, on_record, path, recorded)
            passes.run()
            for trial in _from_others(search, recorded, path):
                jsonl.append(path, trial)
        winner, beside = best_of(search.told.values()), None
        if winner is not None:
            beside, trouble = kernels.side_by_side(settings, evaluator, winner, directory)
            if trouble:
                report(trouble)
        wall_time_s = time.monotonic() - start
    for line in _what_was_learnt(search):
        report(line)
    if cache and cache.trouble:
        report(cache.trouble)
    trials = ranked(search.told.values())
    return SweepResult(
        directory, tuple(trials), winner, candidates, passes.evaluated_count, wall_time_s, runner.usage, beside
    )


def _from_others(search: Search, recorded: Sequence[Trial], path: Path) -> list[Trial]:
    """Return the records of a study that other sweeps made, and that are not in this one's file."""
    if not search.is_shared:
        return []
    here = {trial.record_id for trial in (*recorded, *records.read(path))}
    return [trial for trial in search.told.values() if trial.record_id not in here]


def _what_was_learnt(search: Search) -> Iterator[str]:
    if search.stopped:
        yield search.stopped
    elif search.untried_count:
        yield f"{search.untried_count} candidates were not tried: a larger search.max_trials goes on from here"
    if search.ruled_out:
        yield f"{len(search.ruled_out)} not tried: smaller ones exceed VMEM"
    if len(importances := search.importances()) > 1:
        yield f"what matters: {', '.join(f'{name} {part:.0%}' for name, part in importances.items() if part >= 0.005)}"


def _introduction(
    settings: SweepSettings, target: Target, candidates: Candidates, search: Search, path: Path, where_run: str
) -> Iterator[str]:
    workload = settings.workload
    call = workload.name if workload.shape is None else f"{workload.name}: {workload.shape} {workload.dtype}"
    yield f"{call} on {target.device_kind}, backend {settings.backend.name}"
    if settings.compiler_options:
        yield f"compiler options: {options_text(settings.compiler_options)}"
    reasons = "; ".join(f"{count} {reason}" for reason, count in candidates.pruned.items())
    pruned = f"{sum(candidates.pruned.values())} more pruned without compiling{reasons and f': {reasons}'}"
    yield f"{len(candidates.valid)} candidates, {pruned}"
    resumed = f"; resumed with {len(search.told)} on record" if search.told else ""
    if search.interrupted:
        resumed += f", {len(search.interrupted)} asked for and not finished come first"
    yield f"{settings.search.sampler} search of {search.budget}, {settings.workers} at once ({where_run}){resumed}"
    yield f"records: {path}"


def _draw(result: SweepResult, on_record: Sequence[Trial], names: tuple[str, str]) -> Path | None:
    """Draw all that is on record, exact or int8 as the winner is. Return the path, None where there was nothing."""
    from tuning.trials import heatmap
    from tuning.trials.figures import save_png

    exact = result.winner is None or records.is_exact(result.winner.variant)
    newest = {trial.key: trial for trial in on_record}.values()
    figure = heatmap.draw([trial for trial in newest if records.is_exact(trial.variant) == exact], names)
    if figure is None:
        return None
    path = result.directory / heatmap.file_name(exact, names)
    save_png(figure, path)
    return path


@cli.command("sweep", SweepSchema, free=("compiler_options", "engine.resources"), goes_on=lambda _: True)
def attention_main(config: SweepSchema) -> int:
    """Run the command for splash_attn; return its exit code."""
    return run(from_config(lambda: settings_from(config)), config)


@cli.command(
    "sweep_kernel",
    KernelSweepSchema,
    free=("workload", "space", "compiler_options", "engine.resources"),
    goes_on=lambda _: True,  # a trial that is on record counts, whatever reuse says of the cache
)
def kernel_main(config: KernelSweepSchema) -> int:
    """Run the command for a user's kernel; return its exit code."""
    return run(from_config(lambda: kernel_settings.settings_from(config)), config)


def main() -> int:
    """Run the command, for the kernel that its arguments name; return its exit code."""
    given = sys.argv[1:]
    if not any(argument.startswith("kernel=") for argument in given):
        return attention_main()
    for argument in given:
        if argument.startswith(("workload=", "space=")):
            name = argument.partition("=")[0]
            value = "value" if name == "workload" else "[value,value]"
            print(
                f"error: {argument}: {name}s with a name are splash_attn's; expected {name}.NAME={value}",
                file=sys.stderr,
            )
            return EXIT_USER_ERROR
    return kernel_main()


main.keys = attention_main.keys  # type: ignore[attr-defined] # for what describes the command


def run(settings: SweepSettings, config: SweepSchema | KernelSweepSchema) -> int:
    """Sweep, print and draw; return the exit code."""
    if config.profile_top < 1:
        raise UserError(f"profile_top={config.profile_top}: expected at least 1.")
    if config.profile:
        sessions.require_tensorboard("profile=true")
    result = sweep(settings)
    # Here, since pandas and Matplotlib take a second or more to import, and the first candidate would wait for it.
    from tuning.trials import tables

    print(tables.table(result.trials))
    for line in tables.note_lines(result.trials):
        print(line)
    print(tables.effort_line(result.effort()))
    if crashed := sum(trial.status is Status.CRASHED for trial in result.trials):
        print(f"{crashed} crashed, which may be this machine's fault: the same command tries them again")
    on_record = records.read(result.directory / records.TRIALS_FILE)
    picture = _draw(result, on_record, settings.heatmap)
    promotion: Promotion | None = None
    if (best := result.winner) is not None:
        kernel = "" if best.kernel_time_ms is None else f", kernel alone {best.kernel_time_ms:.3f} ms"
        print(f"winner: {best.config}: {best.label} {best.time_ms:.3f} ms{kernel} on {best.device_kind}")
        if best.slow_time_ms is not None:
            print(f"where data make it slowest: {best.slow_time_ms:.3f} ms; see the notes on what is assumed")
        for line in kernels.comparison_lines(best, on_record, settings):
            print(line)
        if result.side_by_side is not None:
            print("\n".join(result.side_by_side.lines()))
        if picture:
            print(f"heat map: {picture}")
        if settings.promote:
            promotion = (
                promote(best, on_record, settings.promotion_dir)
                if settings.tuned_path is None
                else kernels.promote(best, on_record, settings)
            )
            print(f"{promotion.path}: {'promoted' if promotion.written else 'not changed'}, {promotion.reason}")
    cli.write_json(
        config.json,
        {
            "directory": str(result.directory),
            "winner": jsonl.encode(result.winner) if result.winner else None,
            "promotion": dataclasses.asdict(promotion) if promotion else None,
            "side_by_side": jsonl.encode(result.side_by_side) if result.side_by_side else None,
            "heatmap": str(picture) if picture else None,
            "candidates": len(result.candidates.valid),
            "pruned": result.candidates.pruned,
            "evaluated": result.evaluated_count,
            "effort": result.effort(),
            "statuses": tables.status_counts(result.trials),
            "trials": tables.rows(result.trials),
        },
    )
    if config.profile:
        logdir = Path(config.logdir)
        print(f"hparams: {hparams.write(result.trials, logdir, result.directory.name)}")
        for line in of_sweep.write(result.trials, logdir, config.profile_top, settings.source):
            print(line)
    if not any(trial.status is Status.OK for trial in result.trials):
        print("no candidate was ok", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
