"""Tables of trials, as text and as rows for JSON."""

import collections
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from offline_tpu.machine import residuals
from offline_tpu.options import options_text
from splash_workbench.trial_status import Label
from tuning.trials.bound import OVER_BOUND, kernel_bound_fraction, known_device
from tuning.trials.records import VARIANT_PREFIX, Trial

_ERROR_CHARACTERS = 60
_RECORD_ID_CHARACTERS = 8
#: Units of the core, as the compiler names them, and their columns: the share of their slots that the kernel uses.
_UNITS = {"MATMUL": "mxu", "VALU": "valu", "VPOP": "vpop", "EUP": "eup", "VLOAD": "vload", "VSTORE": "vstore"}
_FORMATS = {
    **dict.fromkeys(("block_q", "block_kv", "block_kv_compute", "spills", "fills"), "{:.0f}"),
    "kernel_bound_fraction": "{:.1%}",
    **dict.fromkeys(_UNITS.values(), "{:.0%}"),
    "rms_error": "{:.1e}",
    "vmem_mib": "{:.1f}",
    "peak_hbm_mib": "{:.0f}",
    "compile_s": "{:.1f}",
    "wall_s": "{:.1f}",
}
_HIDDEN = ("record_id", "created_at", "workload", "shape", "device", "backend", "dtype", "kernel")


def rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return one dict a trial, as the table shows them but whole; what is unknown is None."""
    return json.loads(frame(trials).to_json(orient="records")) if trials else []


def table(
    trials: Sequence[Trial],
    *,
    limit: int | None = 40,
    hide: Sequence[str] = _HIDDEN,
    one_variant_column: bool = False,
    units: bool = False,
) -> str:
    """Return the trials in their order as aligned text, the first `limit` of them.

    Columns that are empty or hidden are left out; a variant's field that is the same in all trials is said once, above.

    units: show how busy each unit of the core is in the kernel; one_variant_column: put the fields of the variant in
    one column, for trials of different kernels.
    """
    if not trials:
        return "no trials"
    shown = trials[:limit]
    same = _common_options(shown) if len(shown) > 1 else {}
    hide = [*hide, *(() if units else _UNITS.values()), *(f"{VARIANT_PREFIX}{name}" for name in same)]
    found = frame(shown).drop(columns=hide).dropna(axis="columns", how="all")
    fields = [name for name in found if name.startswith(VARIANT_PREFIX)]
    if one_variant_column and fields:
        found = found.drop(columns=fields)
        texts = [" ".join(f"{name}={value}" for name, value in t.variant.items() if name not in same) for t in shown]
        found.insert(list(found.columns).index("status"), "variant", texts)
    for name in fields if not one_variant_column else ():
        found[name] = [_shorten(value) if isinstance(value, str) else value for value in found[name]]
    if "record_id" in found:
        found["record_id"] = found["record_id"].str[:_RECORD_ID_CHARACTERS]
    if "error" in found:
        found["error"] = found["error"].fillna("").map(_shorten)
    for column, form in _FORMATS.items():
        if column in found:
            found[column] = ["-" if pd.isna(value) else form.format(value) for value in found[column]]
    columns = set(found.columns)  # a tunable may have the name of one of them
    bare = {name: name.removeprefix(VARIANT_PREFIX) for name in fields}
    found = found.rename(columns={name: short for name, short in bare.items() if short not in columns})
    lines = [found.to_string(index=False, na_rep="-", float_format="{:.3f}".format)]
    if same:
        lines.insert(0, f"all with {', '.join(f'{name}={value}' for name, value in same.items())}")
    if left_out := len(trials) - len(shown):
        lines.append(f"... {left_out} more")
    return "\n".join(lines)


def note_lines(trials: Sequence[Trial]) -> list[str]:
    """Return notes about the figures, each once, with how many trials it is about."""
    counts = collections.Counter((trial.kernel, note) for trial in trials for note in trial.notes)
    counts.update((trial.kernel, OVER_BOUND) for trial in trials if (kernel_bound_fraction(trial) or 0) > 1)
    counts.update((trial.kernel, note) for trial in trials if (note := _trust(trial)))
    return [f"note: {kernel} ({count} of {len(trials)}): {note}" for (kernel, note), count in counts.items()]


def _trust(trial: Trial) -> str | None:
    device = known_device(trial.device_kind)
    if trial.label is not Label.PREDICTED or trial.time_ms is None or device is None:
        return None
    low, high = residuals.factors(device.name, {"kernel": 1.0})
    return (
        f"four fifths of the measured times of such kernels on {device.name} are {low:.2f} to {high:.2f} of the "
        "predicted ones; candidates that differ by less are told apart by their schedules alone"
    )


def effort_line(effort: Mapping[str, Any]) -> str:
    """Return what a sweep took, in one sentence; see SweepResult.effort."""
    parts = [f"{effort['jobs']} candidates evaluated in {effort['wall_time_s']:.0f} s"]
    if effort["candidates_per_minute"] is not None:
        parts.append(f"{effort['candidates_per_minute']:.1f} a minute")
    if effort["from_cache"]:
        parts.append(f"{effort['from_cache']} more from the cache")
    if effort["jobs"]:
        memory = effort["peak_memory_bytes"]
        parts.append(
            f"{effort['workers_started']} worker processes, together at most "
            f"{'unknown' if memory is None else f'{memory / 2**30:.1f}'} GiB of memory and "
            f"{effort['peak_disk_bytes'] / 2**20:.0f} MiB of scratch files"
        )
    return "; ".join(parts)


def status_counts(trials: Sequence[Trial]) -> dict[str, int]:
    """Return the number of trials by status."""
    return dict(collections.Counter(trial.status.value for trial in trials))


def frame(trials: Iterable[Trial]) -> pd.DataFrame:
    """Return one row a trial. Times of each label have a column of their own."""
    return pd.DataFrame([_row(trial) for trial in trials])


def _row(trial: Trial) -> dict[str, Any]:
    kernels = [op for op in trial.ops if op.category == "kernel" and op.time_s > 0]
    time_s = sum(op.time_s for op in kernels)

    def utilization(unit: str) -> float | None:
        """Return the share of a unit's slots in use while the kernel runs; of several, the mean by their time."""
        return sum(op.utilization[unit] * op.time_s for op in kernels) / time_s if kernels else None

    return {
        "workload": trial.workload,
        "shape": trial.call,
        "device": trial.device,
        "backend": trial.backend,
        "kernel": trial.kernel,
        "dtype": trial.dtype,
        **{name: getattr(trial.block_sizes, name, None) for name in ("block_q", "block_kv", "block_kv_compute")},
        **{f"{VARIANT_PREFIX}{name}": value for name, value in trial.variant.items()},
        "compiler_options": options_text(trial.compiler_options) or None,
        "status": trial.status.value,
        "compiled": None if trial.compiled == "whole" else trial.compiled,
        **{f"{label.value}_ms": trial.time_ms if trial.label is label else None for label in Label},
        "slow_ms": trial.slow_time_ms,
        "kernel_ms": trial.kernel_time_ms,
        "kernel_bound_fraction": kernel_bound_fraction(trial),
        "mcycles": None if trial.cycles is None else trial.cycles / 1e6,
        **{column: utilization(unit) for unit, column in _UNITS.items()},
        "vmem_mib": None if trial.vmem_bytes is None else trial.vmem_bytes / 2**20,
        "spills": trial.spill_count,
        "fills": trial.fill_count,
        "peak_hbm_mib": None if trial.peak_hbm_bytes is None else trial.peak_hbm_bytes / 2**20,
        "compile_s": trial.compile_time_s,
        "wall_s": trial.wall_time_s,
        "rms_error": trial.numerics.rms_error if trial.numerics else None,
        "error": trial.error,
        "record_id": trial.record_id,
        "created_at": trial.created_at,
    }


def _common_options(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the fields of the variant that all trials have alike."""
    first, *others = (trial.variant for trial in trials)
    return {name: v for name, v in first.items() if all((name, v) in other.items() for other in others)}


def _shorten(error: str) -> str:
    return error if len(error) <= _ERROR_CHARACTERS else error[: _ERROR_CHARACTERS - 3] + "..."
