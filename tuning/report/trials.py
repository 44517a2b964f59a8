"""Trials as a report shows them: which count, in which words, how far from the bound."""

from collections.abc import Iterable, Sequence

from splash_workbench import provenance
from splash_workbench.status import Label, Status
from tuning.report.parts import listed, origin, percent, significant
from tuning.trials.bound import kernel_bound_fraction
from tuning.trials.records import Trial, is_exact

OURS = "splash_attn"
_ABSENT = object()


def newest_trials(trials: Iterable[Trial]) -> list[Trial]:
    """Return one for each kernel, configuration, shape, device and backend: the newest, in the order of the first."""
    found: dict[tuple[object, ...], Trial] = {}
    for trial in trials:
        key = (*on_device(trial), trial.backend)
        if key not in found or trial.created_at >= found[key].created_at:
            found[key] = trial
    return list(found.values())


def origin_of_trials(trials: Sequence[Trial]) -> str:
    """Return how the figures of these trials were got, in one line."""
    present = provenance.source_hash(provenance.KERNEL_SOURCES)
    how = {
        None: "checked, not timed: ",
        Label.PREDICTED: "predicted for ",
        Label.MEASURED: "measured on ",
        Label.REPORTED: "reported for ",
    }
    texts = []
    for label in sorted({t.label for t in trials if t.status is Status.OK}, key=str):
        members = [t for t in trials if t.label is label and t.status is Status.OK]
        hashes = sorted({t.environment.kernel_hash for t in members})
        sources = [f"{h[:8]}{'' if h == present else ' (not the present one)'}" for h in hashes]
        where = f"{how[label]}{listed(t.device_kind for t in members)} with "
        texts.append(origin(members, where, f"; kernel source {', '.join(sources)}"))
    return "; ".join(texts) or "no candidate ended ok"


def describe(trial: Trial) -> str:
    """Return a trial in words, for the reader who points at it."""
    texts = [f"{trial.kernel} {trial.config}", f"{trial.label} {significant(trial.time_ms)} ms"]
    if trial.kernel_time_ms is not None:
        texts.append(f"kernel {significant(trial.kernel_time_ms)} ms")
    if (fraction := kernel_bound_fraction(trial)) is not None:
        texts.append(f"{percent(fraction)} of the MXU bound")
    if trial.vmem_bytes is not None:
        texts.append(f"VMEM {trial.vmem_bytes / 2**20:.1f} MiB")
    if trial.spill_count is not None:
        texts.append(f"{trial.spill_count:,} spills")
    return ", ".join(texts)


def options(trial: Trial, among: Sequence[Trial]) -> str:
    """Return the fields of its variant in which the trial differs from any of these."""
    shown = [
        (name, value)
        for name, value in trial.variant.items()
        if any(other.variant.get(name, _ABSENT) != value for other in among)
    ]
    return " ".join(f"{name}={value}" for name, value in shown)


def series(trial: Trial) -> str:
    """Return the kernel's name, with what sets it apart from the exact ones."""
    return trial.kernel if is_exact(trial.variant) else f"{trial.kernel} int8"


def kernel_order(trials: Iterable[Trial]) -> list[str]:
    """Return our kernel, then the others by name: the order of their colours."""
    return sorted({series(trial) for trial in trials}, key=lambda name: (name != OURS, name))


def on_device(trial: Trial) -> tuple[object, ...]:
    """Return a key that is equal for trials of the same kernel, configuration, call and device, however timed."""
    return trial.kernel, trial.shape, trial.dtype, trial.key, trial.device_kind


def kernel_bytes(trial: Trial) -> int:
    """Return the HBM traffic in bytes of the kernel alone, 0 where it is not known."""
    return sum(op.hbm_bytes * op.calls for op in trial.ops if op.category == "kernel")


def kernel_time(trial: Trial) -> float:
    """Return milliseconds of the kernel alone, of the op where that is not known."""
    time_ms = trial.kernel_time_ms or trial.time_ms
    assert time_ms is not None
    return time_ms
