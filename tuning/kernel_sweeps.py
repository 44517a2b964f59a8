"""Do what only a sweep of a user's kernel does: look at it first, bound it, promote to a file of the user's own."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from splash_workbench import provenance
from splash_workbench.errors import OF_USERS_CODE, UserError, from_config, line_of
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Label, Status
from splash_workbench.workers.pool import Runner
from tuning.backends.base import Target
from tuning.backends.evaluate import Evaluator
from tuning.kernels import Kernel, KernelError, loading, promoted
from tuning.kernels.protocol import abstract
from tuning.search.settings import SweepSettings
from tuning.search.tunables import TunableSpace
from tuning.trials import contenders, records
from tuning.trials.bound import kernel_bound_fraction, roofline_ms
from tuning.trials.contenders import Contender, SideBySide
from tuning.trials.promote import Promotion
from tuning.trials.records import Trial

#: A prediction may be somewhat below a bound by the published peak.
_MOST_OF_A_BOUND = 1.5


def capture(settings: SweepSettings) -> provenance.Environment:
    """Describe this process and the kernel's sources, for the records of a sweep."""
    captured = settings.backend.capture(settings.backend.sources)
    if settings.source is None:
        return captured
    packages = provenance.package_versions(loading.find(settings.source).requires)
    hashed = loading.hash_of(settings.source)
    return dataclasses.replace(captured, kernel_hash=hashed, versions=captured.versions | packages)


def bound_ms(settings: SweepSettings, target: Target) -> float | None:
    """Return the least time of a user's kernel on a device, by its FLOPs and bytes; None where it is not known."""
    if settings.source is None or target.spec is None:
        return None
    kernel = loading.find(settings.source)
    workload, spec = kernel.Workload(**settings.workload.sizes), target.spec
    _users(kernel, workload, settings.source, "arguments", lambda: abstract(kernel.arguments(workload)))
    flops, hbm_bytes = (_count(kernel, workload, settings.source, name) for name in ("flops", "hbm_bytes"))
    return roofline_ms(flops, hbm_bytes, spec)


def _count(kernel: Kernel[Any, Any], workload: Any, source: str, name: str) -> float | None:
    """Return what one of a kernel's methods counts. Raises UserError in one line where it fails or is no count."""
    found = _users(kernel, workload, source, name, lambda: getattr(kernel, name)(workload))
    if found is not None and not (isinstance(found, int | float | np.number) and 0 <= found <= sys.float_info.max):
        raise UserError(f"{kernel.name}.{name}({workload}) returns {found!r}: expected a number from 0, or None.")
    return None if found is None else float(found)


def _users(kernel: Kernel[Any, Any], workload: Any, source: str, name: str, call: Callable[[], Any]) -> Any:
    """Return what a method of a user's kernel returns. Raises UserError in one line where it fails."""
    try:
        return call()
    except OF_USERS_CODE as error:
        path = loading.file_of(source)
        at = f"{line_of(error, path)}: " if path is not None else ""
        kind = "" if isinstance(error, KernelError) else f"{type(error).__name__}: "
        first = str(error).partition("\n")[0]
        raise UserError(f"{at}{kernel.name}.{name}({workload}): {kind}{first}") from error


def look(settings: SweepSettings, evaluator: Evaluator) -> None:
    """Look at a user's kernel in a worker. Raises UserError with what is wrong with it."""
    assert isinstance(settings.space, TunableSpace)
    if settings.progress:
        print(f"looking at {settings.space.name} and its default configuration ...", file=sys.stderr, flush=True)
    payload = evaluator.payload(None, settings.space.defaults, settings.kernel_name, "shorter")
    payload |= {
        "space": dict(settings.space.choices),
        "traces": settings.backend.quick,
        "device_checks": settings.backend.exclusive,
    }
    for _ in range(2):
        outcome = evaluator.runner.run(
            "tuning.backends.preflight:look",
            payload,
            timeout_s=settings.timeout_s,
            variables=functools.partial(settings.backend.worker_env, evaluator.target),
        )
        if outcome.status is not Status.CRASHED:  # which may be this machine's fault
            break
    if outcome.status in (Status.TIMEOUT, Status.CRASHED):
        remedy = "; give it a check_workload that is smaller, or more time" if outcome.status is Status.TIMEOUT else ""
        looked_at = f"{settings.kernel_name}: the look at its default configuration {settings.space.kernel.Config()}"
        raise UserError(f"{looked_at}: {outcome.error}{remedy}.")
    if outcome.status is not Status.OK:
        raise UserError(str(outcome.error))


def side_by_side(
    settings: SweepSettings, evaluator: Evaluator, winner: Trial, directory: Path
) -> tuple[SideBySide | None, str]:
    """Time or predict what the winner of a user's kernel is to be seen beside, and keep it in the sweep's folder.

    Returns what is on record for this winner, else what was made now, else None; and what went wrong, or nothing.
    """
    job, path = settings.backend.side_by_side, directory / contenders.FILE_NAME
    if settings.source is None or job is None:
        return None, ""
    if not settings.backend.exclusive and not loading.find(settings.source).baselines():
        return None, ""
    for record in from_config(lambda: jsonl.read(path, SideBySide)):
        if record.winner == winner.record_id:
            return record, ""
    default = dict(settings.default_options)
    payload = evaluator.payload(None, winner.variant, settings.kernel_name, "whole") | {"default": default}
    outcome = Runner(directory / "state" / "work").run(  # a process of its own: the candidates' have ended
        job,
        payload,
        timeout_s=settings.timeout_s,
        variables=functools.partial(settings.backend.worker_env, evaluator.target),
    )
    if outcome.status is not Status.OK:
        return None, f"nothing to see the winner beside: {outcome.error}"
    found = tuple(jsonl.decode(fields, Contender) for fields in outcome.result["contenders"])
    if not found:
        return None, ""
    if not settings.backend.exclusive:  # its winner was predicted already
        own = Contender("winner", winner.config, winner.label or Label.PREDICTED, winner.time_samples_ms)
        found = (own, *found)
    record = SideBySide(
        context=winner.context,
        winner=winner.record_id,
        kernel=winner.kernel,
        device_kind=winner.device_kind,
        contenders=found,
        environment=evaluator.environment,
    )
    try:
        jsonl.append(path, record)
    except OSError as error:  # the trials are on record, and the winner is still to be said
        return record, f"{path.name}: {error.strerror}"
    return record, ""


def comparison_lines(winner: Trial, trials: Sequence[Trial], settings: SweepSettings) -> Iterator[str]:
    """Yield what the winner's first estimate was, its bound, and what the default configuration costs beside it."""
    if winner.estimate_ms is not None and winner.time_ms is not None:
        off = winner.estimate_ms / winner.time_ms - 1
        yield f"its first estimate: {winner.estimate_ms:.3f} ms, {abs(off):.1%} {'below' if off < 0 else 'above'}"
    if settings.source is None or winner.time_ms is None:
        return
    if (fraction := kernel_bound_fraction(winner)) is not None:
        yield f"bound by FLOPs and bytes: {winner.bound_ms:.3f} ms, {fraction:.0%} of it reached"
        if fraction > _MOST_OF_A_BOUND:
            yield "no chip does that: flops or hbm_bytes of the kernel counts too much"
    default = _default(winner, trials, settings)
    if default is None or default.time_ms is None:
        yield f"the default configuration has no time: {default.status if default else 'not tried'}"
    elif default.key != winner.key:
        times = default.time_ms / winner.time_ms
        yield f"the default configuration: {default.time_ms:.3f} ms, {times:.2f} times the winner's"


def promote(winner: Trial, trials: Sequence[Trial], settings: SweepSettings) -> Promotion:
    """Write the winner to the user's file if it beats the kernel's default configuration."""
    path: Path | None = settings.tuned_path
    assert path is not None and winner.time_ms is not None and winner.label is not None
    default = _default(winner, trials, settings)
    if default is None:
        return Promotion(False, "no trial of the default configuration", path)
    if default.key == winner.key:
        return Promotion(False, "the default configuration is the best", path)
    if default.time_ms is not None and default.time_ms <= winner.time_ms:
        return Promotion(False, f"the default configuration takes {default.time_ms:.4g} ms", path)
    if winner.compiler_options:
        return Promotion(False, "its compiler options are not tunables: a call does not know them", path)
    environment = winner.environment
    entry = promoted.Entry(
        kernel=winner.kernel,
        device_kind=winner.device_kind,
        sizes=winner.sizes,
        config=winner.variant,
        label=winner.label.value,
        time_ms=winner.time_ms,
        default_ms=default.time_ms,
        record_id=winner.record_id,
        source=promoted.source_of(environment.kernel_hash, environment.backend_hash, environment.compiler_versions),
        created_at=winner.created_at,
    )
    written, reason = from_config(lambda: promoted.promote(path, entry))
    return Promotion(written, reason, path)


def _default(winner: Trial, trials: Sequence[Trial], settings: SweepSettings) -> Trial | None:
    key = records.config_key(None, settings.default_options)
    return next((t for t in reversed(trials) if t.key == key and t.context == winner.context), None)
