"""Read what `python -m tuning.compare` is given: profiles, and records of predictions and measurements."""

import collections
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from offline_tpu import timeline
from splash_workbench.errors import UserError
from splash_workbench.files import user_path
from splash_workbench.profiles import reader
from splash_workbench.profiles import sessions as trace
from splash_workbench.profiles.scopes import named_scope
from splash_workbench.profiles.sessions import Session
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import PredictionRecord
from splash_workbench.trial_status import Label, Status
from tuning.compare.table import ALL_OPS, NO_SCOPE, STEP, Run
from tuning.traces import of_sweep
from tuning.trials import records
from tuning.trials.records import Trial

#: The first step of a session of at least this many is left out: it meets cold caches.
_STEPS_TO_SKIP_ONE = 3
_LEAST_ID = 6
#: Of a line that is no record.
_SHOWN_BYTES = 40


def resolve(argument: str, logdir: Path, results_dir: Path) -> Run:
    """Find a run by what the user calls it, see `HELP`. Raises UserError where there is none, with those there are."""
    name, _, source = argument.rpartition("=")
    if not source.strip():
        raise UserError(f"{argument!r}: names no run; expected a name, a folder, a file, or LABEL=any of these.")
    path = user_path(source)
    file, colon, selector = str(path).rpartition(":")
    if colon and file.endswith(".jsonl"):
        return _of_record(name, Path(file), selector)
    if path.name.endswith(reader.SUFFIX) and path.is_file():
        return _of_profiles(name or path.name.removesuffix(reader.SUFFIX), [(path, None)])
    if found := _of_folder(path):
        return _of_profiles(name or path.name, found)
    known = trace.sessions(logdir)
    found = [profile for folder, session in known if session.run == source for profile in _of_folder(folder)]
    if found := found or _of_folder(trace.profile_dir(logdir) / source):
        return _of_profiles(name or source, found)
    if len(source) >= _LEAST_ID:
        trials = [trial for trial in records.read_all(results_dir) if trial.record_id.startswith(source)]
        if len(trials) > 1:
            raise UserError(f"{source!r}: {len(trials)} trials begin so; expected more of the record_id.")
        if trials:
            return _of_trial(name or source[:8], trials[0])
    if path.is_dir():
        raise UserError(f"{source!r}: a folder that holds no profile; expected one with *{reader.SUFFIX} in it.")
    runs = ", ".join(sorted({session.run for _, session in known})) or "none"
    raise UserError(
        f"{source!r}: expected a run in {logdir} (there are: {runs}), a folder or file of a profile, the record_id of "
        f"a trial in {results_dir}, or FILE.jsonl:RECORD."
    )


HELP = """\
  NAME                     a run in --logdir, all its parts and repeats (profile_run=NAME of pipeline.generate)
  FOLDER or FILE.xplane.pb a profile, from wherever
  RECORD_ID                a trial of a sweep, its first 6 characters or more (python -m tuning.results shows them)
  FILE.jsonl:RECORD        a record of tuning.sweep (RECORD: record_id) or pipeline.predict (RECORD: number of the line,
                           from 1; -1 is the last)
  LABEL=any of these       under another name in the table"""


def _xplanes(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{reader.SUFFIX}"))


def _of_folder(folder: Path) -> list[tuple[Path, Session | None]]:
    """Return the first profile of a folder with its description; [] where it holds no profile."""
    path = folder / trace.SESSION_FILE
    session = trace.read_session(path) if path.exists() else None
    return [(file, session) for file in _xplanes(folder)[:1]]


def _of_profiles(name: str, found: Sequence[tuple[Path, Session | None]]) -> Run:
    repeats: dict[int, dict[str, list[float]]] = collections.defaultdict(dict)
    spaces: dict[str, Any] = {}
    paths: dict[str, Path] = {}
    notes: list[str] = []
    label, device, made_by = Label.MEASURED, "unknown device", None
    for path, session in sorted(found, key=lambda item: item[1].repeat if item[1] else 1):
        try:
            space = reader.parse(path)
        except ValueError as error:
            raise UserError(str(error)) from error
        profile = reader.from_space(space, path.name.removesuffix(reader.SUFFIX))
        part = session.part if session else ""
        if not profile.ops:
            notes.append(f"{path.parent.name}: holds no XLA ops, only what the host did")
        repeats[session.repeat if session else 1] |= samples_of(profile, part, notes)
        spaces[part], paths[part] = space, path
        if profile.predicted:
            label = Label.PREDICTED
        if session is not None:
            device, made_by = session.device, session.made_by
        elif profile.on_device:
            device = ", ".join(profile.planes)
        if (others := len(_xplanes(path.parent)) - 1) > 0:
            notes.append(f"{path.parent.name}: {path.name} of {others + 1} hosts")
    described = [session for _, session in found if session is not None]
    notes += _differences(described)
    return Run(
        name=name,
        label=label,
        device=device,
        made_by=made_by,
        sessions=tuple(repeats[number] for number in sorted(repeats)),
        notes=tuple(dict.fromkeys(notes)),
        spaces=spaces,
        paths=paths,
        config=described[-1].config if described else {},
    )


def samples_of(profile: reader.Profile, part: str, notes: list[str]) -> dict[str, list[float]]:
    """Return scope -> seconds in each step, of which the profile has at least one. Notes what was left out."""
    steps = profile.ops_by_step()
    if len(steps) >= _STEPS_TO_SKIP_ONE:
        notes.append(f"the first of {len(steps)} steps of each session is left out")
        steps = steps[1:]
    seconds = [profile.seconds_by_scope(ops) for _, ops in steps] or [profile.seconds_by_scope()]
    samples = {
        scope or _special(part, NO_SCOPE): [step.get(scope, 0.0) for step in seconds]
        for scope in {scope for step in seconds for scope in step}
    }
    samples[_special(part, ALL_OPS)] = [sum(step.values()) for step in seconds]
    if steps:
        samples[_special(part, STEP)] = [step.duration_ps / 1e12 for step, _ in steps]
    return samples


def _special(part: str, kind: str) -> str:
    return f"{part} {kind}".strip()


def _differences(sessions: Sequence[Session]) -> list[str]:
    """Say what differs between repeats that ought to be of the same thing."""
    notes = []
    if len({session.device for session in sessions}) > 1:
        notes.append("its sessions ran on different devices")
    for name in ("kernel_hash", "git_commit"):
        if len({getattr(session.environment, name) for session in sessions}) > 1:
            notes.append(f"its sessions differ in {name}: not repeats of the same code")
    first, *others = [session.config for session in sessions] or [{}]
    if changed := [key for key in first if any(other.get(key) != first[key] for other in others)]:
        notes.append(f"its sessions differ in {', '.join(sorted(changed))}")
    return notes


def _of_record(name: str, path: Path, selector: str) -> Run:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    if re.fullmatch(r"-?[0-9]+", selector) and len(selector) < _LEAST_ID:
        number = int(selector)
        if not 1 <= abs(number) <= len(lines):
            raise UserError(f"{path}:{selector}: the file has {len(lines)} lines.")
        line = lines[number - 1 if number > 0 else number]
        record = _fields_of(line)
        if record is None:
            shown = line[:_SHOWN_BYTES].decode(errors="replace")
            raise UserError(
                f"{path}:{selector}: expected a JSON object on one line, got {shown!r}; name another record."
            )
    else:
        records_there = [fields for line in lines if (fields := _fields_of(line)) is not None]
        found = [fields for fields in records_there if str(fields.get("record_id", "")).startswith(selector)]
        if len(found) != 1:
            raise UserError(f"{path}:{selector}: expected the record_id of one record; {len(found)} begin so.")
        record = found[0]
    try:
        if "stages" in record and record.get("label") == Label.PREDICTED:
            return _of_pipeline_prediction(name, jsonl.decode(record, PredictionRecord))
        return _of_trial(name or selector, jsonl.decode(record, Trial))
    except ValueError as error:
        raise UserError(f"{path}:{selector}: neither a trial nor a prediction of the pipeline ({error}).") from error


def _fields_of(line: bytes) -> dict[str, Any] | None:
    """Return the fields of a record; None for a torn line, or what is no record."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    return fields if isinstance(fields, dict) else None


def _of_trial(name: str, trial: Trial) -> Run:
    if trial.status is not Status.OK or trial.label is None or not trial.time_samples_ms:
        raise UserError(f"trial {trial.record_id}: ended as {trial.status} and has no time to compare.")
    samples: dict[str, list[float]] = {STEP: [time_ms / 1e3 for time_ms in trial.time_samples_ms]}
    spaces = {}
    made_by = None
    if trial.label is Label.PREDICTED:
        made_by = timeline.predicted_by(trial.environment.versions)
        for op in trial.ops:
            samples.setdefault(named_scope(op.scope) or NO_SCOPE, [0.0])[0] += op.time_s
        samples[ALL_OPS] = [sum(op.time_s for op in trial.ops)]
        spaces[""] = of_sweep.space_of_trial(trial)
    config = {"workload": trial.workload, "shape": trial.call, "config": trial.config}
    return Run(name, trial.label, trial.device_kind, made_by, (samples,), trial.notes, spaces, config=config)


def _of_pipeline_prediction(name: str, record: PredictionRecord) -> Run:
    samples: dict[str, list[float]] = {}
    for stage, result in record.stages.items():
        samples[_special(stage, STEP)] = [result.time_s]
        samples |= {f"{stage}: kind {kind}": [time_s] for kind, time_s in result.breakdown_s.items()}
    made_by = timeline.predicted_by(record.environment.versions)
    name = name or f"{record.topology}-{record.plan.plan}"
    note = "a record without ops: by kind of work instead of by scope; predict again with profile=true for scopes"
    config = record.request | {"plan": jsonl.encode(record.plan)}
    return Run(name, Label.PREDICTED, record.topology, made_by, (samples,), (note,), config=config)
