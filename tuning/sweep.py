"""Find the fastest block sizes and variant of the kernel: `python -m tuning.sweep --help`."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from offline_tpu.options import options_text
from splash_attn import tuned
from splash_attn.kernel import vmem_bytes_estimate
from splash_workbench import cli, provenance
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import locked, require_writable
from splash_workbench.profiles import sessions
from splash_workbench.records import jsonl
from splash_workbench.status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import JOBS_PER_WORKER, Runner, Usage
from splash_workbench.workers.room import room_line
from tuning.backends.base import Target, context_of
from tuning.backends.evaluate import Evaluator
from tuning.backends.offline import DUMP_BYTES
from tuning.search.settings import SweepSchema, SweepSettings, settings_from
from tuning.search.space import Candidate, Candidates, Pruner, enumerate_candidates
from tuning.search.study import Search, storage_errors
from tuning.traces import of_sweep
from tuning.trials import heatmap, records, tables
from tuning.trials.figures import save_png
from tuning.trials.promote import Promotion, promote, todays_choice
from tuning.trials.records import Trial, objective

#: Candidates asked for ahead of the first that is not told yet: a slow one must not leave workers idle.
_ASKED_PER_WORKER = 2


@dataclasses.dataclass(frozen=True)
class SweepResult:
    """The outcome of a sweep.

    Attributes:
      directory: where its records are.
      trials: one for each candidate of the study, best first.
      winner: the best ok trial with a time; None where there is none.
      candidates: those that could be searched, and how many were pruned why.
      evaluated_count: trials made by this run, from the compile cache or by a job; the others were on record.
      wall_time_s: of this run.
      usage: what its jobs took.
    """

    directory: Path
    trials: tuple[Trial, ...]
    winner: Trial | None
    candidates: Candidates
    evaluated_count: int
    wall_time_s: float
    usage: Usage

    def effort(self) -> dict[str, Any]:
        """Return what this run took. Candidates from the cache are in no rate."""
        jobs = self.usage.job_count
        return {
            "wall_time_s": self.wall_time_s,
            "jobs": jobs,
            "from_cache": self.evaluated_count - jobs,
            "candidates_per_minute": 60 * jobs / self.wall_time_s if jobs else None,
            "workers_started": self.usage.worker_count,
            "peak_memory_bytes": self.usage.peak_memory_bytes,
            "peak_disk_bytes": self.usage.peak_disk_bytes,
        }


def sweep(settings: SweepSettings, *, report: Callable[[str], None] = print) -> SweepResult:
    """Run or resume a sweep.

    Args:
      settings: what to sweep.
      report: called with each line for the user.

    Raises:
      UserError: the device does not fit the backend or is not there, no candidate can be valid, a folder or file
        cannot be written or read, or the same sweep is running.
    """
    target = settings.backend.find_target(settings.device)
    captured = provenance.capture(settings.backend.sources)
    context = context_of(settings.workload, target, settings.backend, captured, settings.compiler_options)
    sweeps_dir = settings.results_dir / "sweeps"
    require_writable(f"results_dir={settings.results_dir}", sweeps_dir, settings.workers * DUMP_BYTES)
    if settings.promote and target.device_kind.startswith("TPU"):
        require_writable(f"promote={settings.promote}", settings.promotion_dir or tuned.user_dir())
    directory = sweeps_dir / f"{settings.workload.name}-{target.name}-{settings.backend.name}-{context[:8]}"
    candidates = enumerate_candidates(settings.space, _pruner(settings, target))
    if not candidates.valid:
        raise UserError(f"space={settings.space.name}: no candidate can be valid; pruned {candidates.pruned}.")
    cache = JobCache.of_user(settings.cache)
    if settings.compiler_options:
        settings.backend.check_options(target, settings.compiler_options)
    with _locked(directory / "state"):
        runner = Runner(directory / "state" / "work", jobs_per_worker=JOBS_PER_WORKER)
        evaluator = Evaluator(
            runner=runner,
            workload=settings.workload,
            target=target,
            backend=settings.backend,
            context=context,
            environment=captured,
            timeout_s=settings.timeout_s,
            measure=settings.measure,
            cache_dir=cache.numerics_dir if cache else sweeps_dir / ".numerics",
            cache=cache,
            compiler_options=settings.compiler_options,
        )
        path = directory / records.TRIALS_FILE
        recorded = from_config(lambda: records.read(path))
        on_record = {trial.key: trial for trial in records.reusable(recorded, settings.timeout_s)}
        fingerprint = provenance.stable_hash(settings.space.fingerprint)
        storage_path = directory / "state" / "study.sqlite3"
        with storage_errors(storage_path):
            search = Search(
                storage_path=storage_path,
                study_name=f"{settings.space.name}-{settings.search.sampler}-{settings.search.seed}-{fingerprint}",
                space=settings.space,
                candidates=candidates,
                settings=settings.search,
                on_record=on_record,
            )
            for line in _introduction(settings, target, candidates, search, directory):
                report(line)
            start = time.monotonic()
            evaluated_count = _evaluate_all(settings, search, evaluator, on_record, path)
        wall_time_s = time.monotonic() - start
    if cache and cache.trouble:
        report(cache.trouble)
    trials = sorted(search.told.values(), key=lambda t: (t.status is not Status.OK, t.status.value, objective(t)))
    timed = [trial for trial in trials if trial.status is Status.OK and trial.time_ms is not None]
    return SweepResult(
        directory=directory,
        trials=tuple(trials),
        winner=timed[0] if timed else None,
        candidates=candidates,
        evaluated_count=evaluated_count,
        wall_time_s=wall_time_s,
        usage=runner.usage(),
    )


def _evaluate_all(
    settings: SweepSettings, search: Search, evaluator: Evaluator, on_record: dict[str, Trial], path: Path
) -> int:
    """Ask, evaluate, record and tell until the budget is spent. Return how many candidates were evaluated.

    A trial is recorded as soon as it is made, but told in the order in which the candidates were asked, each followed
    by one question: what the search then asks depends on its seed and on `workers`, not on which worker was faster.
    """
    evaluated_count = 0
    best: Trial | None = None
    bar = tqdm(total=search.budget, initial=len(search.told), disable=not settings.progress, unit="trial", leave=False)
    pool = concurrent.futures.ThreadPoolExecutor(settings.workers)
    running: dict[concurrent.futures.Future[Trial], Candidate] = {}
    untold: collections.deque[Candidate] = collections.deque()
    made: dict[str, Trial] = {}

    def show(trial: Trial) -> None:
        nonlocal best
        if trial.status is Status.OK and (best is None or objective(trial) < objective(best)):
            best = trial
        if best is not None and best.time_ms is not None:
            bar.set_postfix_str(f"best {best.time_ms:.3f} ms {best.label} {best.block_sizes}", refresh=False)

    def ask() -> None:
        candidate = search.ask()
        if candidate is None:
            return
        untold.append(candidate)
        if candidate.key in on_record:  # another study of this context has evaluated it
            made[candidate.key] = on_record[candidate.key]
            show(on_record[candidate.key])
            bar.update()
        else:
            running[pool.submit(evaluator.evaluate, candidate.block_sizes, candidate.variant.to_dict())] = candidate

    try:
        for trial in search.told.values():
            show(trial)
        for _ in range(_ASKED_PER_WORKER * settings.workers):
            ask()
        while untold:
            if untold[0].key in made:
                candidate = untold.popleft()
                search.tell(candidate, made.pop(candidate.key))
                ask()
                continue
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                candidate, trial = running.pop(future), future.result()
                jsonl.append(path, trial)  # on disk first: the study can be put right from it, not the other way
                made[candidate.key] = trial
                evaluated_count += 1
                show(trial)
                bar.update()
        known = on_record.keys() | {trial.key for trial in search.told.values()}
        if best is not None and (missing := _todays_candidate(settings, best, known)) is not None:
            trial = evaluator.evaluate(missing.block_sizes, missing.variant.to_dict())
            jsonl.append(path, trial)
            evaluated_count += 1
        return evaluated_count
    finally:
        evaluator.runner.cancel()
        pool.shutdown(cancel_futures=True)
        bar.close()


def _todays_candidate(settings: SweepSettings, best: Trial, known: Collection[str]) -> tuned.Choice | None:
    """Return what the winner must beat to be promoted, None where that is known or nothing is to be promoted."""
    if not settings.promote or best.time_ms is None or best.compiler_options:
        return None
    choice = todays_choice(best, settings.promotion_dir)
    if choice is None or records.config_key(choice.block_sizes, choice.variant.to_dict()) in known:
        return None
    return choice


def _pruner(settings: SweepSettings, target: Target) -> Pruner:
    return Pruner(
        settings.workload.shape,
        settings.space.max_block_scores,
        vmem_limit_bytes=target.spec.vmem_bytes if settings.vmem_pruning and target.spec else None,
        vmem_estimate=functools.partial(vmem_bytes_estimate, itemsize=settings.workload.itemsize),
    )


def _introduction(
    settings: SweepSettings, target: Target, candidates: Candidates, search: Search, directory: Path
) -> Iterator[str]:
    workload = settings.workload
    yield f"{workload.name}: {workload.shape} {workload.dtype} on {target.device_kind}, backend {settings.backend.name}"
    if settings.compiler_options:
        yield f"compiler options: {options_text(settings.compiler_options)}"
    reasons = "; ".join(f"{count} {reason}" for reason, count in candidates.pruned.items())
    pruned = f"{candidates.pruned_count} pruned without compiling{reasons and f': {reasons}'}"
    yield f"{len(candidates.valid)} candidates, {pruned}"
    resumed = f"; resumed with {len(search.told)} on record" if search.told else ""
    if search.interrupted:
        resumed += f", {len(search.interrupted)} asked for and not finished come first"
    yield f"{settings.search.sampler} search of {search.budget}, {settings.workers} at once ({room_line()}){resumed}"
    yield f"records: {directory / records.TRIALS_FILE}"


@contextlib.contextmanager
def _locked(state_dir: Path) -> Iterator[None]:
    """Hold the lock of a context, or raise UserError. Remove what a dead sweep left in its work folder."""
    with locked(state_dir / "lock", f"{state_dir.parent}: another sweep is writing here; wait for it or stop it."):
        shutil.rmtree(state_dir / "work", ignore_errors=True)
        try:
            yield
        finally:
            shutil.rmtree(state_dir / "work", ignore_errors=True)


def _draw(result: SweepResult) -> tuple[Path, bool]:
    """Draw all that is on record, exact or int8 as the winner is. Return the path, and whether anything was drawn."""
    exact = result.winner is None or records.is_exact(result.winner.variant)
    picture = result.directory / heatmap.file_name(exact)
    on_record = {t.key: t for t in records.read(result.directory / records.TRIALS_FILE)}.values()
    figure = heatmap.draw([t for t in on_record if records.is_exact(t.variant) == exact])
    if figure is not None:
        save_png(figure, picture)
    return picture, figure is not None


@cli.command("sweep", SweepSchema, free=("compiler_options",))
def main(config: SweepSchema) -> int:
    """Run the command; return its exit code."""
    settings = from_config(lambda: settings_from(config))
    if config.profile:
        sessions.require_tensorboard("profile=true")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what Ctrl-C does: workers end, the same command resumes
    result = sweep(settings)
    print(tables.table(result.trials))
    for line in tables.note_lines(result.trials):
        print(line)
    print(tables.effort_line(result.effort()))
    if crashed := sum(trial.status is Status.CRASHED for trial in result.trials):
        print(f"{crashed} crashed, which may be this machine's fault: the same command tries them again")
    picture, drawn = _draw(result)
    promotion: Promotion | None = None
    if result.winner is not None:
        print(tables.winner_line(result.winner))
        if drawn:
            print(f"heat map: {picture}")
        if settings.promote:
            on_record = records.read(result.directory / records.TRIALS_FILE)
            promotion = promote(result.winner, on_record, settings.promotion_dir)
            print(f"{promotion.path}: {'promoted' if promotion.written else 'not changed'}, {promotion.reason}")
    cli.write_json(
        config.json,
        {
            "directory": str(result.directory),
            "winner": jsonl.encode(result.winner) if result.winner else None,
            "promotion": dataclasses.asdict(promotion) if promotion else None,
            "heatmap": str(picture) if drawn else None,
            "candidates": len(result.candidates.valid),
            "pruned": result.candidates.pruned,
            "evaluated": result.evaluated_count,
            "effort": result.effort(),
            "statuses": tables.status_counts(result.trials),
            "trials": tables.rows(result.trials),
        },
    )
    if config.profile:
        for line in of_sweep.write(result.trials, result.directory.name, Path(config.logdir), config.profile_top):
            print(line)
    if not any(trial.status is Status.OK for trial in result.trials):
        print("no candidate was ok", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
