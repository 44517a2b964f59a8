"""Promote a sweep's winner: write it where `attention()` finds it, if it beats what would run today."""

import dataclasses
import fcntl
import json
from collections.abc import Sequence
from pathlib import Path

from offline_tpu.options import options_text
from splash_attn import tuned
from splash_attn.types import AttentionShape, QkDtype, Variant
from splash_workbench.files import atomic_path
from splash_workbench.trial_status import Status
from tuning.trials.records import Trial, config_key


def entry_of(trial: Trial) -> tuned.TunedEntry:
    """Return the tuned entry of a trial. Raises ValueError for one that is not ok, timed, checked, and ours."""
    if trial.status is not Status.OK or trial.time_ms is None or trial.label is None or trial.block_sizes is None:
        raise ValueError(f"status={trial.status}, time_ms={trial.time_ms}: expected an ok trial with a time.")
    if trial.kernel != "splash_attn" or trial.numerics is None or trial.shape is None:
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


def today(
    device_kind: str, shape: AttentionShape, dtype: str, qk_dtype: QkDtype, directory: Path | None = None
) -> tuned.Choice | None:
    """Return what `attention()` would run today for a call; None where that is not our kernel."""
    if not device_kind.startswith("TPU"):
        return None
    return tuned.choose(device_kind, shape, dtype, qk_dtype=qk_dtype, directory=directory)


def todays_choice(winner: Trial, directory: Path | None = None) -> tuned.Choice | None:
    """Return what `attention()` would run today for the winner's call; None where that is not our kernel."""
    if winner.shape is None:
        return None
    qk_dtype = Variant.from_dict(winner.variant).qk_dtype
    return today(winner.device_kind, winner.shape, winner.dtype, qk_dtype, directory)


def promote(winner: Trial, trials: Sequence[Trial], directory: Path | None = None) -> Promotion:
    """Write the winner as a tuned entry if it beats what would run today for its call.

    Both times are of the same context: of the same backend, kernel source and versions. The entry takes the place of
    that of the same shape, dtype, softmax, qk_dtype and label, and of those of other sources for the same call.

    Args:
      winner: an ok trial, which `entry_of` takes.
      trials: of the winner's context, among them one of `todays_choice`.
      directory: of the tuned entries; None: today's choice is from the user's and the shipped ones, the winner goes to
        the user's.
    """
    new = entry_of(winner)
    path = tuned.path_for(winner.device_kind, directory or tuned.user_dir())
    if not winner.device_kind.startswith("TPU"):
        return Promotion(False, f"{winner.device_kind!r} is not a TPU", path)
    if winner.compiler_options:
        return Promotion(False, f"attention() runs without {options_text(winner.compiler_options)}", path)
    try:
        better, reason = _compare(winner, new, trials, directory)
        if not better:
            return Promotion(False, reason, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            better, reason = _compare(winner, new, trials, directory)  # another sweep may have promoted its own
            entries = tuned.load(winner.device_kind, path.parent)
            # The entry in the new one's place need not be what runs: one of another label may.
            old = next((entry for entry in entries if _key(entry) == _key(new)), None)
            if old and old.source == new.source and old.provenance.time_ms <= new.provenance.time_ms and better:
                there = f"the {old.provenance.time_ms:.3f} ms of the entry there ({old.block_sizes})"
                better, reason = False, f"not better than {there}"
            if better:
                kept = [entry for entry in entries if _key(entry) != _key(new) and not entry.rivals(new)]
                ordered = sorted([*kept, new], key=lambda entry: json.dumps(entry.to_dict(), sort_keys=True))
                content = dataclasses.asdict(tuned.TunedFile(1, winner.device_kind, tuple(ordered)))
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(content, indent=1) + "\n")
    except ValueError as error:  # entries that cannot be read any more
        return Promotion(False, str(error), path)
    except OSError as error:
        return Promotion(False, f"cannot be written ({error}); {tuned.USER_VARIABLE} names another folder", path)
    return Promotion(better, reason, path)


def _compare(winner: Trial, new: tuned.TunedEntry, trials: Sequence[Trial], directory: Path | None) -> tuple[bool, str]:
    """Return whether the winner is to be written as far as today's choice goes, and why or why not."""
    choice = todays_choice(winner, directory)
    assert choice is not None
    key = config_key(choice.block_sizes, choice.variant.to_dict())
    of_choice = [t for t in trials if t.key == key and t.context == winner.context and t.kernel == winner.kernel]
    today = f"what runs today ({choice.block_sizes}, {choice.variant})"
    if not of_choice:
        return False, f"no time is known of {today}"
    rival = of_choice[-1]
    if rival.status is not Status.OK and rival.conclusive:
        return True, f"{today} is {rival.status}"
    if rival.time_ms is None or winner.time_ms is None:
        return False, f"no time is known of {today}: {rival.status}"
    if rival.key == winner.key:
        entry = choice.entry
        renews = entry is not None and entry.rivals(new) and entry.block_sizes == new.block_sizes
        return renews, f"the same as {today}" + (", of another kernel source, compiler or cost model" if renews else "")
    if winner.time_ms < rival.time_ms:
        return True, f"{winner.time_ms:.3f} ms beats the {rival.time_ms:.3f} ms of {today}"
    return False, f"{winner.time_ms:.3f} ms does not beat the {rival.time_ms:.3f} ms of {today}"


def _key(entry: tuned.TunedEntry) -> tuple[object, ...]:
    return entry.shape, entry.dtype, entry.variant.softmax, entry.variant.qk_dtype, entry.provenance.label
