"""Writes a sweep's winner to splash_attn/tuned/<device_kind>.json."""

import dataclasses
import fcntl
import json
from pathlib import Path

from splash_attn import tuned
from splash_attn.types import Variant
from splash_workbench.files import atomic_path
from splash_workbench.status import Status
from tuning.trials.records import Trial


def entry_of(trial: Trial) -> tuned.TunedEntry:
    """Return the tuned entry that a trial makes.

    Raises:
      ValueError: the trial is not one to run by: not ok, without a time, unchecked, or of a peer's kernel.
    """
    if trial.status is not Status.OK or trial.time_ms is None or trial.label is None or trial.block_sizes is None:
        raise ValueError(f"status={trial.status}, time_ms={trial.time_ms}: expected an ok trial with a time.")
    if trial.kernel != "splash_attn" or trial.numerics is None:
        raise ValueError(f"kernel={trial.kernel!r}, numerics={trial.numerics}: expected splash_attn, checked.")
    environment = trial.environment
    return tuned.TunedEntry(
        shape=trial.shape,
        dtype=trial.dtype,
        block_sizes=trial.block_sizes,
        variant=Variant.from_dict(trial.variant),
        provenance=tuned.Provenance(
            label=trial.label.value,
            time_ms=trial.time_ms,
            workload=trial.workload,
            record_id=trial.record_id,
            kernel_hash=environment.kernel_hash,
            git_commit=environment.git_commit,
            versions=environment.compiler_versions | {"backend_sources": environment.backend_hash},
            created_at=trial.created_at,
        ),
    )


@dataclasses.dataclass(frozen=True)
class Promotion:
    """Whether a winner was written, and why or why not."""

    written: bool
    reason: str
    path: Path


def promote(trial: Trial, directory: Path = tuned.TUNED_DIR) -> Promotion:
    """Puts a better trial in the place of the entry with the same shape, dtype, softmax, qk_dtype and label.

    Only a TPU's entries are kept: the kernel is not what other devices run. Better is a smaller time. A time that
    another kernel source, compiler or cost model gave is not comparable: such an entry is replaced, and that of the
    other softmax goes with it.
    """
    new = entry_of(trial)
    path = tuned.path_for(trial.device_kind, directory)
    if not trial.device_kind.startswith("TPU"):
        return Promotion(False, f"{trial.device_kind!r} is not a TPU", path)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = list(tuned.load(trial.device_kind, directory))
        old = next((entry for entry in entries if _key(entry) == _key(new)), None)
        if old is None:
            reason = f"first {new.provenance.label} entry for {new.shape} {new.dtype} {new.variant.softmax}"
        elif _source(old) != _source(new):
            reason = f"replaces an entry ({old.block_sizes}) of another kernel source, compiler or cost model"
        elif new.provenance.time_ms < old.provenance.time_ms:
            reason = f"{new.provenance.time_ms:.3f} ms beats {old.provenance.time_ms:.3f} ms ({old.block_sizes})"
        else:
            reason = f"not better than the {old.provenance.time_ms:.3f} ms of the entry there ({old.block_sizes})"
            return Promotion(False, reason, path)
        entries = [entry for entry in entries if entry is not old and not _outdated_by(new, entry)] + [new]
        entries.sort(key=lambda entry: json.dumps(entry.to_dict(), sort_keys=True))
        content = tuned.TunedFile(1, trial.device_kind, tuple(entries))
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(content), indent=1) + "\n")
    return Promotion(True, reason, path)


def _key(entry: tuned.TunedEntry) -> tuple[object, ...]:
    return entry.shape, entry.dtype, entry.variant.softmax, entry.variant.qk_dtype, entry.provenance.label


def _outdated_by(new: tuned.TunedEntry, entry: tuned.TunedEntry) -> bool:
    """Whether an entry competes with `new`, with a time that cannot be compared."""

    def rivals(one: tuned.TunedEntry) -> tuple[object, ...]:
        return one.shape, one.dtype, one.variant.qk_dtype, one.provenance.label

    return rivals(entry) == rivals(new) and _source(entry) != _source(new)


def _source(entry: tuned.TunedEntry) -> tuple[str, dict[str, str]]:
    return entry.provenance.kernel_hash, entry.provenance.versions
