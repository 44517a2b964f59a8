"""Tables of trials, as text and as rows for JSON."""

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from tuning.trials import records
from tuning.trials.bound import OVER_BOUND, kernel_bound_fraction
from tuning.trials.records import Trial

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
    return json.loads(_frame(trials).to_json(orient="records")) if trials else []


def table(
    trials: Sequence[Trial],
    *,
    limit: int | None = 40,
    hide: Sequence[str] = _HIDDEN,
    one_variant_column: bool = False,
    units: bool = False,
) -> str:
    """Return the trials in their order as aligned text.

    Columns that are empty or hidden are left out; a variant's field that is the same in all trials is said once, above.

    Args:
      trials: what to show.
      limit: show the first so many; None shows all.
      hide: columns to leave out.
      units: show how busy each unit of the core is in the kernel.
      one_variant_column: put the fields of the variant in one column, for trials of different kernels.
    """
    if not trials:
        return "no trials"
    shown = trials[:limit] if limit else trials
    hide = [*hide, *(() if units else _UNITS.values())]
    frame = _frame(shown).drop(columns=hide).dropna(axis="columns", how="all")
    same = _common_options(shown)
    header = ", ".join(f"{name}={value}" for name, value in same.items())
    frame = frame.drop(columns=[records.VARIANT_PREFIX + name for name in same], errors="ignore")
    fields = [name for name in frame if name.startswith(records.VARIANT_PREFIX)]
    if one_variant_column and fields:
        options = [{name: value for name, value in trial.variant.items() if name not in same} for trial in shown]
        frame = frame.drop(columns=fields)
        texts = [" ".join(f"{name}={value}" for name, value in option.items()) for option in options]
        frame.insert(list(frame.columns).index("status"), "variant", texts)
    frame = frame.rename(columns=lambda name: name.removeprefix(records.VARIANT_PREFIX))
    if "record_id" in frame:
        frame["record_id"] = frame["record_id"].str[:_RECORD_ID_CHARACTERS]
    if "error" in frame:
        frame["error"] = [_shorten(error) for error in frame["error"]]
    for column, form in _FORMATS.items():
        if column in frame:
            frame[column] = ["-" if pd.isna(value) else form.format(value) for value in frame[column]]
    text = frame.to_string(index=False, na_rep="-", float_format="{:.3f}".format)
    left_out = len(trials) - len(shown)
    return "\n".join(
        [*([f"all with {header}"] if header else []), text, *([f"... {left_out} more"] if left_out else [])]
    )


def winner_line(trial: Trial) -> str:
    """Return the winner in one sentence."""
    kernel = f", kernel alone {trial.kernel_time_ms:.3f} ms" if trial.kernel_time_ms is not None else ""
    return f"winner: {trial.config}: {trial.label} {trial.time_ms:.3f} ms{kernel} on {trial.device_kind}"


def note_lines(trials: Sequence[Trial]) -> list[str]:
    """Return notes about the figures, each once, with how many trials it is about."""
    counts = collections.Counter((trial.kernel, note) for trial in trials for note in trial.notes)
    counts.update((trial.kernel, OVER_BOUND) for trial in trials if (kernel_bound_fraction(trial) or 0) > 1)
    return [f"note: {kernel} ({count} of {len(trials)}): {note}" for (kernel, note), count in counts.items()]


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


def _frame(trials: Sequence[Trial]) -> pd.DataFrame:
    frame = records.frame(trials)
    fractions = [kernel_bound_fraction(trial) for trial in trials]
    frame.insert(list(frame.columns).index("mcycles"), "kernel_bound_fraction", fractions)
    for unit, column in _UNITS.items():
        frame.insert(list(frame.columns).index("vmem_mib"), column, [_utilization(trial, unit) for trial in trials])
    return frame


def _utilization(trial: Trial, unit: str) -> float | None:
    """Return the share of a unit's slots in use while the kernel runs; of several kernels, the mean by their time."""
    kernels = [op for op in trial.ops if op.category == "kernel" and op.time_s > 0]
    if not kernels:
        return None
    return sum(op.utilization[unit] * op.time_s for op in kernels) / sum(op.time_s for op in kernels)


def _common_options(trials: Sequence[Trial]) -> dict[str, Any]:
    """Return the fields of the variant that all of several trials have alike."""
    if len(trials) < 2:
        return {}
    first, *others = (trial.variant for trial in trials)
    return {name: v for name, v in first.items() if all(name in other and other[name] == v for other in others)}


def _shorten(error: object) -> str:
    text = error if isinstance(error, str) else ""
    return text if len(text) <= _ERROR_CHARACTERS else text[: _ERROR_CHARACTERS - 3] + "..."
