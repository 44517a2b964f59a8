"""Choose what is shown of the kernels, as dicts for the templates: winners, sweeps, rooflines, peers."""

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from offline_tpu.machine.devices import DeviceSpec
from splash_attn import tuned
from splash_workbench import provenance
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Label, Status
from tuning.report.charts import Point, roofline, to_svg
from tuning.report.inputs import TrialFile, newest_of
from tuning.report.parts import device_title, listed, origin, percent, significant, stack
from tuning.trials import contenders, heatmap
from tuning.trials.bound import bf16_bound_ms, bound_fraction, kernel_bound_fraction, known_device, mxu_bound_ms
from tuning.trials.contenders import SideBySide
from tuning.trials.records import Trial, best_of, is_exact, ranked

_OURS = "splash_attn"
_REST = "rest of the op: transposes, padding, checks"
_HOW = {
    None: "checked, not timed:",
    Label.PREDICTED: "predicted for",
    Label.MEASURED: "measured on",
    Label.REPORTED: "reported for",
}


def winners(entries: Iterable[tuple[str, tuned.TunedEntry]], tuned_dir: Path | None) -> list[dict[str, Any]]:
    """Return all entries by device, workload and shape; `chosen` is what attention() runs for exactly that shape."""
    present = provenance.source_hash(provenance.KERNEL_SOURCES)
    found: list[dict[str, Any]] = []
    for kind, entry in entries:
        bound_ms = bf16_bound_ms(entry.shape, entry.dtype, kind)
        found.append(
            {
                "workload": entry.provenance.workload,
                "device": device_title(kind),
                "entry": entry,
                "op_of_bound": bound_fraction(bound_ms, entry.provenance.time_ms, is_exact(entry.variant.to_dict())),
                "chosen": tuned.choose(kind, entry.shape, entry.dtype, directory=tuned_dir).entry == entry,
                "stale": entry.provenance.kernel_hash != present,
            }
        )
    found.sort(key=lambda w: (not w["chosen"], w["entry"].provenance.time_ms))
    return sorted(found, key=lambda w: (w["device"], w["workload"], str(w["entry"].shape)))


def sweeps(files: Sequence[TrialFile], results_dir: Path, top: int) -> tuple[list[dict[str, Any]], list[TrialFile]]:
    """Return the newest sweep of each shape, dtype, device and backend, and the files that it outdates.

    Exact candidates and int8 are two sweeps, though they share a file.
    """
    found: list[dict[str, Any]] = []
    outdated: dict[str, TrialFile] = {}
    for exact in (True, False):
        chosen = [(file.path, [t for t in file.trials if is_exact(t.variant) == exact]) for file in files]
        current, old = newest_of([TrialFile(path, tuple(trials)) for path, trials in chosen if trials])
        found += [_sweep(file, newest_trials(file.trials), results_dir, top) for file in current]
        outdated |= {file.path: file for file in old}
    shown = {sweep["path"] for sweep in found}
    found.sort(key=lambda sweep: (sweep["first"].workload, sweep["first"].device, sweep["first"].backend))
    return found, [file for path, file in sorted(outdated.items()) if path not in shown]


def _sweep(file: TrialFile, trials: Sequence[Trial], results_dir: Path, top: int) -> dict[str, Any]:
    timed = ranked(trial for trial in trials if trial.time_ms is not None)
    first = timed[0] if timed else trials[-1]
    longest = max((t.time_ms or 0.0 for t in timed[:top]), default=1.0)
    bound_ms = bf16_bound_ms(first.shape, first.dtype, first.device_kind)
    figure = heatmap.draw(trials)
    exact = is_exact(first.variant)
    picture = results_dir / Path(file.path).relative_to(results_dir.name).parent / heatmap.file_name(exact)
    counts = collections.Counter(trial.status.value.replace("_", " ") for trial in trials)
    errors = collections.Counter(f"{t.status.value.replace('_', ' ')}: {t.error}" for t in trials if t.error)
    backend = "" if first.label else f", backend {first.backend}"
    return {
        "title": f"{first.workload} on {device_title(first.device_kind)}{backend}{'' if exact else ', int8'}",
        "path": file.path,
        "first": first,
        "label": first.label,
        "provenance": origin_of_trials(trials),
        "counts": ", ".join(f"{number} {status}" for status, number in sorted(counts.items())),
        "variant": " ".join(f"{name}={value}" for name, value in first.variant.items() if value is not None),
        "ranking": [(trial, options(trial, [first])) for trial in timed[:top]],
        "longest_ms": longest,
        "estimates": any(trial.compiled != "whole" for trial in timed[:top]),
        "left_out": len(timed[top:]),
        "bound_ms": bound_ms,
        "bound_at": bound_ms / longest * 100 if bound_ms and bound_ms <= longest else None,  # percent of a bar
        "heatmap": to_svg(figure, f"heatmap-{file.path}-{exact}", {}) if figure else None,
        "picture": picture.as_posix() if picture.exists() else None,
        "errors": sorted(errors.items()),
    }


def others(files: Sequence[TrialFile], results_dir: Path) -> list[dict[str, Any]]:
    """Return the newest sweep of each other kernel, workload, device and backend that has a winner."""
    found = []
    for file in newest_of(files)[0]:
        trials = newest_trials(file.trials)
        timed = [trial for trial in trials if trial.time_ms is not None]
        best = best_of(timed)
        if best is None:
            continue
        tried_first = min(timed, key=lambda trial: trial.created_at)
        varied = [name for name in best.tunables if len({str(trial.tunables.get(name)) for trial in timed}) > 1]
        names = (varied[0], varied[1]) if len(varied) > 1 else None
        figure = heatmap.draw(trials, names) if names else None
        folder = results_dir / Path(file.path).relative_to(results_dir.name).parent
        pictures = sorted(folder.glob("heatmap*.png"))
        beside = [r for r in jsonl.read(folder / contenders.FILE_NAME, SideBySide) if r.winner == best.record_id]
        found.append(
            {
                "title": f"{best.kernel}, {best.call} on {device_title(best.device_kind)}",
                "path": file.path,
                "best": best,
                "tried_first": tried_first,
                "gain": (tried_first.time_ms or 0.0) / (best.time_ms or 1.0),
                "timed": len(timed),
                "of_bound": kernel_bound_fraction(best),
                "beside": "\n".join(beside[-1].lines()) if beside else None,
                "heatmap": to_svg(figure, f"heatmap-{file.path}", {}) if figure else None,
                "picture": pictures[0].as_posix() if pictures else None,
                "provenance": origin_of_trials(trials),
            }
        )
    return found


def rooflines(sweep_files: Sequence[TrialFile], peer_files: Sequence[TrialFile]) -> list[dict[str, Any]]:
    """Return one for each shape, device and way of getting times, of the newest sweeps and comparisons."""
    files = [*newest_of(sweep_files)[0], *newest_of(peer_files)[0]]
    trials = newest_trials(trial for file in files for trial in file.trials)
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        if trial.label is not None and (trial.kernel_time_ms or trial.time_ms) and trial.dtype == "bfloat16":
            groups.setdefault((str(trial.shape), trial.device_kind, trial.label.value), []).append(trial)
    kernels = sorted({series(trial) for trial in trials}, key=lambda name: (name != _OURS, name))
    traffic = {on_device(trial): hbm_bytes for trial in trials if (hbm_bytes := _kernel_bytes(trial))}
    drawn = []
    for (_, device_kind, label), members in sorted(groups.items(), key=lambda group: (group[1][0].workload, group[0])):
        spec = known_device(device_kind)
        placed = [trial for trial in members if on_device(trial) in traffic]
        if spec is not None and placed:
            skipped = len(members) - len(placed)
            drawn.append(_roofline(spec, label, placed, traffic, kernels) | {"skipped": skipped})
    return drawn


def _roofline(
    spec: DeviceSpec, label: str, trials: Sequence[Trial], traffic: dict[tuple[object, ...], int], kernels: list[str]
) -> dict[str, Any]:
    shape, workload = trials[0].shape, trials[0].workload
    assert shape is not None, "the report is of attention"
    best: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda t: (_kernel_time(t), t.key)):
        best.setdefault(series(trial), trial)
    points, rows = [], []
    for trial in trials:
        intensity = shape.flops / traffic[on_device(trial)]
        rate = shape.flops / _kernel_time(trial) / 1e9
        text = f"{describe(trial)}; {rate:.0f} TFLOP/s, {intensity:.0f} FLOP a byte"
        name = series(trial)
        is_best = best[name] is trial
        points.append(Point(name, text, intensity, rate, name if is_best else None))
        if is_best:
            rows.append((trial, intensity, rate, kernel_bound_fraction(trial)))
    bound_ms = mxu_bound_ms(shape, spec)
    name = f"roofline-{workload}-{spec.name}-{label}".replace("_", "-")
    mxu_tflops_per_s = shape.flops / bound_ms / 1e9 if bound_ms else None
    return {
        "title": f"{workload} on TPU {spec.name}",
        "name": name,
        "svg": roofline(name, points, kernels, spec, mxu_tflops_per_s, f"MXU bound at head_dim {shape.head_dim}, bf16"),
        "label": label,
        "provenance": origin_of_trials(trials),
        "rows": sorted(rows, key=lambda row: -row[2]),
    }


def peers(files: Sequence[TrialFile]) -> list[dict[str, Any]]:
    """Return the newest comparison of each shape, dtype and device."""
    return [_peers(file) for file in newest_of(files)[0]]


def _peers(file: TrialFile) -> dict[str, Any]:
    trials = newest_trials(file.trials)
    trials.sort(key=lambda t: (t.time_ms is None, t.time_ms or 0.0, t.kernel, t.key))
    timed = [t for t in trials if t.time_ms is not None]
    ours = min((_kernel_time(t) for t in timed if series(t) == _OURS), default=None)
    theirs = min((_kernel_time(t) for t in timed if t.kernel != _OURS), default=None)
    rows, bars = [], []
    for trial in trials:
        text = options(trial, [t for t in trials if t.kernel == trial.kernel])
        rows.append((trial, text, _kernel_time(trial) / ours if ours and trial.time_ms is not None else None))
        if trial.time_ms is None or trial.label is None:
            continue
        parts = {"whole op": trial.time_ms}
        if trial.kernel_time_ms is not None:
            parts = {"kernel": trial.kernel_time_ms, _REST: trial.time_ms - trial.kernel_time_ms}
        note = " ".join(filter(None, [str(trial.block_sizes or ""), text]))
        bars.append((series(trial), trial.label, parts, note))
    notes = {f"{trial.kernel}: {note}" for trial in trials for note in trial.notes}
    return {
        "title": f"{trials[0].workload} on {device_title(trials[0].device_kind)}",
        "path": file.path,
        "first": trials[0],
        "provenance": origin_of_trials(trials),
        "bars": stack("", "ms", bars, {"kernel": "c1", "whole op": "c1", _REST: "c4"}, digits=4),
        "rows": rows,
        "best_ratio": theirs / ours if ours and theirs else None,
        "notes": sorted(notes),
    }


def newest_trials(trials: Iterable[Trial]) -> list[Trial]:
    """Return one for each kernel, configuration, shape, device and backend: the newest, in the order of the first."""
    by_key: dict[tuple[object, ...], list[Trial]] = {}
    for trial in trials:
        by_key.setdefault((*on_device(trial), trial.backend), []).append(trial)
    return [max(reversed(same), key=lambda trial: trial.created_at) for same in by_key.values()]


def origin_of_trials(trials: Sequence[Trial]) -> str:
    """Return how the figures of these trials were got, in one line; of attention, whether the sources have changed."""
    present = provenance.source_hash(provenance.KERNEL_SOURCES)
    ok = [trial for trial in trials if trial.status is Status.OK]
    texts = []
    for label in sorted({trial.label for trial in ok}, key=str):
        members = [trial for trial in ok if trial.label is label]
        old = {t.environment.kernel_hash for t in members if t.shape is not None} - {present}
        hashes = sorted({trial.environment.kernel_hash for trial in members})
        sources = [f"{h[:8]}{' (not the present one)' if h in old else ''}" for h in hashes]
        where = f"{_HOW[label]} {listed(trial.device_kind for trial in members)} with "
        texts.append(origin(members, where, f"; kernel source {', '.join(sources)}"))
    return "; ".join(texts) or "no candidate ended ok"


def describe(trial: Trial) -> str:
    """Return a trial in words, for the reader who points at it."""
    known = {
        f"kernel {significant(trial.kernel_time_ms)} ms": trial.kernel_time_ms,
        f"{percent(fraction := kernel_bound_fraction(trial))} of the MXU bound": fraction,
        f"VMEM {(trial.vmem_bytes or 0) / 2**20:.1f} MiB": trial.vmem_bytes,
        f"{trial.spill_count or 0:,} spills": trial.spill_count,
    }
    texts = [f"{trial.kernel} {trial.config}", f"{trial.label} {significant(trial.time_ms)} ms"]
    return ", ".join([*texts, *(text for text, value in known.items() if value is not None)])


def options(trial: Trial, among: Sequence[Trial]) -> str:
    """Return the fields of its variant in which the trial differs from any of these."""
    return " ".join(
        f"{name}={value}"
        for name, value in trial.variant.items()
        if any((name, value) not in other.variant.items() for other in among)
    )


def series(trial: Trial) -> str:
    """Return the kernel's name, with what sets it apart from the exact ones."""
    return trial.kernel if is_exact(trial.variant) else f"{trial.kernel} int8"


def on_device(trial: Trial) -> tuple[object, ...]:
    """Return a key that is equal for trials of the same kernel, configuration, call and device, however timed."""
    return trial.kernel, trial.shape, trial.dtype, trial.key, trial.device_kind


def _kernel_bytes(trial: Trial) -> int:
    """Return the HBM traffic in bytes of the kernel alone, 0 where it is not known."""
    return sum(op.hbm_bytes * op.calls for op in trial.ops if op.category == "kernel")


def _kernel_time(trial: Trial) -> float:
    """Return milliseconds of the kernel alone, of the op where that is not known."""
    time_ms = trial.kernel_time_ms or trial.time_ms
    assert time_ms is not None
    return time_ms
