"""The records that a report is made of, read and checked. A file that is not there is no error; a malformed one is."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from splash_attn import tuned
from splash_workbench.status import Label
from tuning.trials import records
from tuning.trials.records import Trial
from tuning.trials.reported import DEFAULT_PATH, Reported, ReportedRow

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrialFile:
    """The trials of one folder under results/sweeps or results/peers, at least one."""

    path: str
    trials: tuple[Trial, ...]

    @property
    def newest(self) -> Trial:
        return max(self.trials, key=lambda trial: (trial.created_at, trial.record_id))


@dataclasses.dataclass(frozen=True)
class ValidationRow:
    """One call: what was reported for it and what is predicted, None where `error` says why not."""

    shape: str
    config: str
    reported_ms: float
    predicted_ms: float | None
    bound: str | None
    error: str | None


@dataclasses.dataclass(frozen=True)
class Validation:
    """What `python -m tuning.validate json=...` wrote; where it has not, the reported times alone and libtpu None."""

    source: str
    device_kind: str
    libtpu: str | None
    rows: tuple[ValidationRow, ...]
    median_abs_error: float | None
    max_abs_error: float | None
    spearman: float | None


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a record of the pipeline was made."""

    label: Label
    created_at: str
    versions: Mapping[str, str]
    git_commit: str | None
    git_dirty: bool

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        git = fields["git"] or {"commit": None, "dirty": False}
        return cls(Label(fields["label"]), fields["created_at"], fields["versions"], git["commit"], git["dirty"])


@dataclasses.dataclass(frozen=True)
class Video:
    """What a pipeline was asked for."""

    checkpoint: str
    width: int
    height: int
    num_frames: int
    num_inference_steps: int

    @classmethod
    def of(cls, request: Mapping[str, Any]) -> Self:
        return cls(**{field.name: request[field.name] for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        steps = f"{self.num_inference_steps} step{'s' if self.num_inference_steps != 1 else ''}"
        return f"{self.width}x{self.height}, {self.num_frames} frames, {steps}"


@dataclasses.dataclass(frozen=True)
class PredictedStage:
    """A stage of `pipeline.predict`: seconds by kind of work, bytes a chip."""

    time_s: float
    breakdown_s: Mapping[str, float]
    peak_hbm_bytes: int
    hbm_bytes: int
    mfu_fraction: float | None

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        kinds = {str(kind): float(seconds) for kind, seconds in fields["breakdown_s"].items()}
        memory = int(fields["peak_hbm_bytes"]), int(fields["hbm_bytes"])
        return cls(float(fields["time_s"]), kinds, *memory, _number(fields.get("mfu_fraction")))


@dataclasses.dataclass(frozen=True)
class PredictedRun:
    """A line of predict.jsonl. step_time_s: of the denoise stage, with the kernel that the plan is about."""

    origin: Origin
    video: Video
    topology: str
    plan: str
    step_time_s: float | None
    stages: Mapping[str, PredictedStage]
    reported: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        plan = fields["plan"]
        return cls(
            origin=Origin.of(fields),
            video=Video.of(fields["request"]),
            topology=fields["topology"],
            plan=f"{plan['plan']}, dp={plan['dp']} x model={plan['model']}, weights {plan['weights']}",
            step_time_s=_number(fields["step_time_s"]),
            stages={stage: PredictedStage.of(value) for stage, value in fields["stages"].items()},
            reported=fields["reported"] and _reported_of(fields["reported"]),
            notes=(*fields["notes"], *_other_outcomes(plan["plan"], fields)),
        )


@dataclasses.dataclass(frozen=True)
class GeneratedStage:
    """Seconds that a stage took."""

    load_time_s: float
    compile_time_s: float
    run_time_s: float
    step_times_s: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class GeneratedRun:
    """A line of generate.jsonl."""

    origin: Origin
    video: Video
    device: str
    stages: Mapping[str, GeneratedStage]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        names = [field.name for field in dataclasses.fields(GeneratedStage)]
        stages = {}
        for stage, value in fields["stages"].items():
            load_s, compile_s, run_s = (float(value[name]) for name in names[:3])
            stages[stage] = GeneratedStage(load_s, compile_s, run_s, tuple(map(float, value[names[3]])))
        return cls(Origin.of(fields), Video.of(fields["request"]), _device_of(fields), stages)


@dataclasses.dataclass(frozen=True)
class QualityRun:
    """A line of quality.jsonl: a candidate's videos beside the reference's. psnr_db: None where both are the same."""

    origin: Origin
    video: Video
    device: str
    candidate: str
    psnr_db: tuple[float | None, ...]
    ssim: tuple[float, ...]
    read_back: Mapping[str, float]
    failures: tuple[str, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        psnr_db, ssim = tuple(map(_number, fields["psnr_db"])), tuple(map(float, fields["ssim"]))
        if not psnr_db or len(psnr_db) != len(ssim):
            raise ValueError(f"expected as many PSNR as SSIM figures, got {len(psnr_db)} and {len(ssim)}")
        device, read_back = _device_of(fields), dict(fields["read_back"])
        what = Origin.of(fields), Video.of(fields["request"]), device, fields["candidate"]
        return cls(*what, psnr_db, ssim, read_back, tuple(fields["failures"]))


def _other_outcomes(plan: str, fields: Mapping[str, Any]) -> list[str]:
    """What became of stages without a prediction, and of the plans that were tried and not taken."""
    lines = [f"{plan}: {stage}: {reason.splitlines()[0]}" for stage, reason in fields.get("failures", {}).items()]
    for other, outcome in fields.get("other_plans", {}).items():
        text = outcome.splitlines()[0] if isinstance(outcome, str) else f"{outcome:.3f} s a step"
        lines.append(f"{other}: {text}, predicted and not taken")
    return lines


def _reported_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    times = {name: float(fields[name]) for name in ("total_time_s", "step_time_s")}
    return {"source": fields["source"], **times}


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _device_of(fields: Mapping[str, Any]) -> str:
    device = fields["device"]
    return f"{device['count']} x {device['kind']}"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Everything that is on record.

    Attributes:
      entries: (device kind, tuned entry).
      sweeps, peers: one for each folder.
      validation: of `tuning.validate`, or the reported rows alone.
      predicted, generated, quality: the lines of the pipeline's files.
      files: (file, what it holds) of each file that was read.
      torn: a line about each that a crash tore, and that is left out.
    """

    entries: tuple[tuple[str, tuned.TunedEntry], ...]
    sweeps: tuple[TrialFile, ...]
    peers: tuple[TrialFile, ...]
    validation: Validation
    predicted: tuple[PredictedRun, ...]
    generated: tuple[GeneratedRun, ...]
    quality: tuple[QualityRun, ...]
    files: tuple[tuple[str, str], ...]
    torn: tuple[str, ...]


def read(results_dir: Path, validation_path: Path, tuned_dir: Path = tuned.TUNED_DIR) -> Inputs:
    """Reads all of it.

    Raises:
      ValueError: a file is malformed; the message names it, and the line where it has lines.
    """
    files: list[tuple[str, str]] = []
    torn: list[str] = []

    def shown(path: Path) -> str:
        inside = path.is_relative_to(results_dir)
        return f"{results_dir.name}/{path.relative_to(results_dir).as_posix()}" if inside else path.name

    def trial_files(folder: str) -> tuple[TrialFile, ...]:
        found = []
        for path in sorted((results_dir / folder).glob(f"*/{records.TRIALS_FILE}")):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trials = records.read(path)
            torn.extend(str(warning.message).replace(str(path), shown(path)) for warning in caught)
            if trials:
                found.append(TrialFile(shown(path), tuple(trials)))
                files.append((shown(path), _count(len(trials), "trial")))
        return tuple(found)

    def lines(name: str, what: str, parse: Callable[[dict[str, Any]], T]) -> tuple[T, ...]:
        path = results_dir / name
        found = _read_lines(path, parse) if path.exists() else ()
        if found:
            files.append((shown(path), _count(len(found), what)))
        return found

    entries = _tuned_entries(tuned_dir, files)
    sweeps, peers = trial_files("sweeps"), trial_files("peers")
    validation = _validation(validation_path)
    if validation.libtpu is not None:
        files.append((shown(validation_path), _count(len(validation.rows), "comparison")))
    return Inputs(
        entries=entries,
        sweeps=sweeps,
        peers=peers,
        validation=validation,
        predicted=lines("predict.jsonl", "prediction", PredictedRun.of),
        generated=lines("generate.jsonl", "run", GeneratedRun.of),
        quality=lines("quality.jsonl", "comparison", QualityRun.of),
        files=tuple(files),
        torn=tuple(torn),
    )


def _tuned_entries(directory: Path, files: list[tuple[str, str]]) -> tuple[tuple[str, tuned.TunedEntry], ...]:
    entries = []
    for path in sorted(directory.glob("*.json")):
        try:
            device_kind = json.loads(path.read_text())["device_kind"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name}: unreadable tuned entries ({type(error).__name__}: {error}).") from error
        found = tuned.load(device_kind, directory)
        entries += [(device_kind, entry) for entry in found]
        files.append((f"splash_attn/tuned/{path.name}", _count(len(found), "tuned entry", "tuned entries")))
    return tuple(entries)


def _read_lines(path: Path, parse: Callable[[dict[str, Any]], T]) -> tuple[T, ...]:
    parsed = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict):
                raise TypeError(f"expected an object, got {type(fields).__name__}")
            parsed.append(parse(fields))
        except KeyError as error:
            raise ValueError(f"{path}:{number}: expected a field {error}.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number}: not a record that this version reads ({error}).") from error
    return tuple(parsed)


def _validation(path: Path) -> Validation:
    if not path.exists():
        reported = Reported.read(DEFAULT_PATH)
        rows = [ValidationRow(r.shape, r.config, r.median_time_ms, None, None, None) for r in reported.rows]
        return Validation(reported.source, reported.device_kind, None, tuple(rows), None, None, None)
    own = {field.name for field in dataclasses.fields(ReportedRow)}
    try:
        content = json.loads(path.read_text())
        rows = []
        for fields in content["rows"]:
            call = ReportedRow(**{name: fields[name] for name in own})
            times = float(fields["reported_ms"]), _number(fields["predicted_ms"])
            rows.append(ValidationRow(call.shape, call.config, *times, fields["bound"], fields["error"]))
        names = ("source", "device_kind", "libtpu", "median_abs_error", "max_abs_error", "spearman")
        return Validation(rows=tuple(rows), **{name: content[name] for name in names})
    except KeyError as error:
        raise ValueError(f"{path}: expected a field {error}; write it with `python -m tuning.validate`.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not what `python -m tuning.validate json=...` writes ({error}).") from error


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


def newest_of(files: Sequence[TrialFile]) -> tuple[list[TrialFile], list[TrialFile]]:
    """The newest file of each workload, device and backend, in that order, and the others."""
    groups: dict[tuple[str, str, str], list[TrialFile]] = {}
    for file in files:
        trial = file.newest
        groups.setdefault((trial.workload, trial.device, trial.backend), []).append(file)
    current, others = [], []
    for _, members in sorted(groups.items()):
        members.sort(key=lambda file: (file.newest.created_at, file.path))
        current.append(members.pop())
        others += members
    return current, others
