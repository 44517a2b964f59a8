"""Choose what is shown of the kernels: winners, sweeps, rooflines, peers."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from offline_tpu.machine.devices import DeviceSpec
from splash_attn import tuned
from splash_workbench import provenance
from splash_workbench.status import Label
from tuning.report.charts import Point, roofline, to_svg
from tuning.report.inputs import TrialFile, newest_of
from tuning.report.parts import Stack, device_title, stack
from tuning.report.trials import (
    OURS,
    describe,
    kernel_bytes,
    kernel_order,
    kernel_time,
    newest_trials,
    on_device,
    options,
    origin_of_trials,
    series,
)
from tuning.trials import heatmap
from tuning.trials.bound import bf16_bound_ms, bound_fraction, kernel_bound_fraction, known_device, mxu_bound_ms
from tuning.trials.records import Trial, is_exact


@dataclasses.dataclass(frozen=True)
class Winner:
    """A tuned entry. chosen: what attention() runs for this shape; stale: it was tuned with another kernel source."""

    workload: str
    device: str
    entry: tuned.TunedEntry
    op_of_bound: float | None
    chosen: bool
    stale: bool


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
      ranking: each trial with the options in which it differs from the first.
      bound_at: where the MXU's bound is on the bars, in percent.
      heatmap: SVG; picture: the sweep's PNG.
    """

    title: str
    path: str
    first: Trial
    label: Label | None
    provenance: str
    counts: str
    variant: str
    ranking: tuple[tuple[Trial, str], ...]
    longest_ms: float
    left_out: int
    bound_ms: float | None
    bound_at: float | None
    heatmap: str | None
    picture: str | None
    errors: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Roofline:
    """A roofline. skipped: timed kernels that are not on it, for their HBM traffic is not known."""

    title: str
    name: str
    svg: str
    label: Label
    provenance: str
    skipped: int
    rows: tuple[tuple[Trial, float, float, float | None], ...]


@dataclasses.dataclass(frozen=True)
class Peers:
    """Kernels beside one another. rows: (trial, options that differ, kernel time over that of our best)."""

    title: str
    path: str
    first: Trial
    provenance: str
    bars: Stack
    rows: tuple[tuple[Trial, str, float | None], ...]
    best_ratio: float | None
    notes: tuple[str, ...]


def winners(entries: Iterable[tuple[str, tuned.TunedEntry]], tuned_dir: Path | None) -> list[Winner]:
    """Return all entries: by device, workload and shape, the one that runs first."""
    present = provenance.source_hash(provenance.KERNEL_SOURCES)
    found = []
    for device_kind, entry in entries:
        choice = tuned.choose(device_kind, entry.shape, entry.dtype, directory=tuned_dir)
        bound_ms = bf16_bound_ms(entry.shape, entry.dtype, device_kind)
        exact = is_exact(entry.variant.to_dict())
        found.append(
            Winner(
                workload=entry.provenance.workload,
                device=device_title(device_kind),
                entry=entry,
                op_of_bound=bound_fraction(bound_ms, entry.provenance.time_ms, exact),
                chosen=choice.entry == entry,
                stale=entry.provenance.kernel_hash != present,
            )
        )
    return sorted(
        found, key=lambda w: (w.device, w.workload, str(w.entry.shape), not w.chosen, w.entry.provenance.time_ms)
    )


def sweeps(files: Sequence[TrialFile], results_dir: Path, top: int) -> tuple[list[Sweep], list[TrialFile]]:
    """Return the newest sweep of each shape, dtype, device and backend, and the files that it outdates.

    Exact candidates and int8 are two sweeps, though they share a file.
    """
    current, others = newest_of(files)
    found = []
    for file in current:
        trials = newest_trials(file.trials)
        for exact in (True, False):
            if chosen := [trial for trial in trials if is_exact(trial.variant) == exact]:
                found.append(_sweep(file, chosen, results_dir, top))
    return found, others


def _sweep(file: TrialFile, trials: Sequence[Trial], results_dir: Path, top: int) -> Sweep:
    timed = sorted((t for t in trials if t.time_ms is not None), key=lambda t: (t.time_ms or 0.0, t.key))
    first = timed[0] if timed else trials[-1]
    shown = timed[:top]
    longest = max((t.time_ms or 0.0 for t in shown), default=1.0)
    bound_ms = bf16_bound_ms(first.shape, first.dtype, first.device_kind)
    figure = heatmap.draw(trials)
    exact = is_exact(first.variant)
    picture = results_dir / Path(file.path).relative_to(results_dir.name).parent / heatmap.file_name(exact)
    counts = collections.Counter(trial.status.value.replace("_", " ") for trial in trials)
    errors = collections.Counter(f"{t.status.value.replace('_', ' ')}: {t.error}" for t in trials if t.error)
    backend = "" if first.label else f", backend {first.backend}"
    return Sweep(
        title=f"{first.workload} on {device_title(first.device_kind)}{backend}{'' if exact else ', int8'}",
        path=file.path,
        first=first,
        label=first.label,
        provenance=origin_of_trials(trials),
        counts=", ".join(f"{number} {status}" for status, number in sorted(counts.items())),
        variant=" ".join(f"{name}={value}" for name, value in first.variant.items() if value is not None),
        ranking=tuple((trial, options(trial, [first])) for trial in shown),
        longest_ms=longest,
        left_out=len(timed) - len(shown),
        bound_ms=bound_ms,
        bound_at=bound_ms / longest * 100 if bound_ms and bound_ms <= longest else None,
        heatmap=to_svg(figure, f"heatmap-{file.path}-{exact}", {}) if figure else None,
        picture=picture.as_posix() if picture.exists() else None,
        errors=tuple(sorted(errors.items())),
    )


def rooflines(sweep_files: Sequence[TrialFile], peer_files: Sequence[TrialFile]) -> list[Roofline]:
    """Return one for each shape, device and way of getting times, of the newest sweeps and comparisons."""
    files = [*newest_of(sweep_files)[0], *newest_of(peer_files)[0]]
    trials = newest_trials(trial for file in files for trial in file.trials)
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        if trial.label is not None and (trial.kernel_time_ms or trial.time_ms) and trial.dtype == "bfloat16":
            groups.setdefault((str(trial.shape), trial.device_kind, trial.label.value), []).append(trial)
    kernels = kernel_order(trials)
    traffic = {on_device(trial): bytes_ for trial in trials if (bytes_ := kernel_bytes(trial))}
    drawn = []
    for (_, device_kind, label), members in sorted(groups.items(), key=lambda group: (group[1][0].workload, group[0])):
        spec = known_device(device_kind)
        placed = [trial for trial in members if on_device(trial) in traffic]
        if spec is None or not placed:
            continue
        drawn.append(_roofline(spec, Label(label), placed, len(members) - len(placed), traffic, kernels))
    return drawn


def _roofline(
    spec: DeviceSpec,
    label: Label,
    trials: Sequence[Trial],
    skipped: int,
    traffic: dict[tuple[object, ...], int],
    kernels: Sequence[str],
) -> Roofline:
    shape, workload = trials[0].shape, trials[0].workload
    best: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda t: (kernel_time(t), t.key)):
        best.setdefault(series(trial), trial)
    points, rows = [], []
    for trial in trials:
        intensity = trial.shape.flops / traffic[on_device(trial)]
        rate = trial.shape.flops / kernel_time(trial) / 1e9
        text = f"{describe(trial)}; {rate:.0f} TFLOP/s, {intensity:.0f} FLOP a byte"
        name = series(trial)
        top = best[name] is trial
        points.append(Point(name, text, intensity, rate, name if top else None))
        if top:
            rows.append((trial, intensity, rate, kernel_bound_fraction(trial)))
    bound_ms = mxu_bound_ms(shape, spec)
    name = f"roofline-{workload}-{spec.name}-{label}".replace("_", "-")
    mxu_tflops_per_s = shape.flops / bound_ms / 1e9 if bound_ms else None
    mxu_label = f"MXU bound at head_dim {shape.head_dim}, bf16"
    return Roofline(
        title=f"{workload} on TPU {spec.name}",
        name=name,
        svg=roofline(name, points, kernels, spec, mxu_tflops_per_s, mxu_label),
        label=label,
        provenance=origin_of_trials(trials),
        skipped=skipped,
        rows=tuple(sorted(rows, key=lambda row: -row[2])),
    )


def peers(files: Sequence[TrialFile]) -> list[Peers]:
    """Return the newest comparison of each shape, dtype and device."""
    return [_peers(file) for file in newest_of(files)[0]]


def _peers(file: TrialFile) -> Peers:
    trials = newest_trials(file.trials)
    trials.sort(key=lambda t: (t.time_ms is None, t.time_ms or 0.0, t.kernel, t.key))
    ours = [kernel_time(t) for t in trials if series(t) == OURS and t.time_ms is not None]
    theirs = [kernel_time(t) for t in trials if t.kernel != OURS and t.time_ms is not None]
    rows, bars = [], []
    for trial in trials:
        text = options(trial, [t for t in trials if t.kernel == trial.kernel])
        ratio = kernel_time(trial) / min(ours) if ours and trial.time_ms is not None else None
        rows.append((trial, text, ratio))
        if trial.time_ms is None or trial.label is None:
            continue
        kernel_ms = trial.kernel_time_ms
        parts = {"op": trial.time_ms} if kernel_ms is None else {"kernel": kernel_ms, "rest": trial.time_ms - kernel_ms}
        names = {"op": "whole op", "kernel": "kernel", "rest": "rest of the op: transposes, padding, checks"}
        note = " ".join(filter(None, [str(trial.block_sizes or ""), text]))
        bars.append((series(trial), trial.label, {names[part]: value for part, value in parts.items()}, note))
    colours = {"kernel": "c1", "whole op": "c1", "rest of the op: transposes, padding, checks": "c4"}
    first = trials[0]
    notes = collections.Counter((trial.kernel, note) for trial in trials for note in trial.notes)
    return Peers(
        title=f"{first.workload} on {device_title(first.device_kind)}",
        path=file.path,
        first=first,
        provenance=origin_of_trials(trials),
        bars=stack("", "ms", bars, colours, digits=4),
        rows=tuple(rows),
        best_ratio=min(theirs) / min(ours) if ours and theirs else None,
        notes=tuple(f"{kernel}: {note}" for kernel, note in sorted(notes)),
    )
