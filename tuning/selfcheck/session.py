"""Runs the parts, each in a process of its own, and writes down each result when it is there."""

import dataclasses
import datetime
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from splash_workbench.errors import UserError
from splash_workbench.files import locked, write_json
from splash_workbench.records import jsonl
from splash_workbench.records.base import utc_now
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import JOBS_PER_WORKER, Outcome, Runner
from splash_workbench.workers.room import worker_count
from tuning.selfcheck.predictions import Predictions
from tuning.selfcheck.records import (
    Check,
    Failure,
    Predicted,
    SelfCheck,
    TimedRow,
    anonymous_tree,
    failure_text,
    file_name,
)
from tuning.selfcheck.tasks import PARTS, Part, Task

#: Of the time of a part with several tasks, so much may one take.
_MOST_OF_A_PART = 0.5


@dataclasses.dataclass
class Session:
    """One self-check.

    Attributes:
      parts: names of those asked for; the environment is always looked at.
      timeout_s: for all of them together.
      output_dir: of the file.
      resume: take over what today's file of these chips has.
      chip: what finds the chip in a worker, "package.module:function".
      say: told of each task when it begins.
    """

    parts: Sequence[str]
    timeout_s: float
    output_dir: Path
    resume: bool
    chip: str
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        self.found = SelfCheck(
            source=f"tuning.selfcheck, {_today()}: device times by the profiler", created_at=utc_now()
        )
        self.path = self.output_dir / file_name(self.found.device_kind, _today())
        for path in sorted(self.output_dir.glob(f"selfcheck-*-{_today()}*.json")):
            _read(path, strict=self.resume)  # before the chips are looked for, which takes a while
        self._tasks: dict[str, Task] = {}
        self._deadline = time.monotonic() + self.timeout_s
        self._work = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)

    def run(self) -> SelfCheck:
        """Run the parts; return all that was found. It is in the file at every moment, if this one is the last, too."""
        first, *others = PARTS
        busy = f"{self.output_dir}: another self-check writes here; wait for it, or give output_dir=FOLDER."
        with locked(self.output_dir / ".selfcheck.lock", busy), self._work:
            self._run_part(first, first.tasks({}), [first, *self._wanted(others)])
            if not self.found.environment:
                self._leave_out({part.name: "the chips were not found" for part in others})
            else:
                self._run_others(others)
            self._write()
        return self.found

    def _run_others(self, parts: Sequence[Part]) -> None:
        """Run all parts but the first, and predict meanwhile."""
        wanted = self._wanted(parts)
        self._leave_out({part.name: "not asked for" for part in parts if part not in wanted})
        ready = [(part, tasks) for part in wanted if (tasks := self._tasks_of(part))]
        folder, workers = Path(self._work.name) / "predictions", max(1, worker_count(None) - 1)
        predicted = {row.task for row in self.found.rows if row.predicted.time_ms is not None}
        with Predictions(self.found.environment, folder, workers, self.timeout_s) as predictions:
            for _, tasks in reversed(ready):  # the stages, which take longest, first
                for task in (task for task in tasks if task.id not in predicted):
                    self._tasks[task.id] = task
                    predictions.start(task)
            for index, (part, tasks) in enumerate(ready):
                self._run_part(part, tasks, [part for part, _ in ready[index:]])
            self.say("waiting for predictions")
            self._update(rows=tuple(self._with_prediction(row, predictions) for row in self.found.rows))

    def _wanted(self, parts: Sequence[Part]) -> list[Part]:
        return [part for part in parts if part.name in self.parts]

    def _tasks_of(self, part: Part) -> list[Task]:
        """Return the tasks of a part here; where there are none, it is left out."""
        why_not = part.left_out(self.found.environment)
        tasks = [] if why_not else part.tasks(self.found.environment)
        if not tasks:
            self._leave_out({part.name: why_not or f"nothing of it is of {self.found.device_kind}"})
        return tasks

    def _run_part(self, part: Part, tasks: Sequence[Task], remaining: Sequence[Part]) -> None:
        """Run the tasks of a part in one worker, which is replaced where a task ends badly, and gone in the end."""
        share_s = self._left_s * part.share / sum(each.share for each in remaining)
        end = time.monotonic() + share_s
        runner = Runner(Path(self._work.name) / part.name, jobs_per_worker=JOBS_PER_WORKER)
        try:
            for task in tasks:
                if task.id in self.found.done:
                    continue
                limit_s = min(end - time.monotonic(), share_s * (_MOST_OF_A_PART if len(tasks) > 1 else 1.0))
                self.say(f"{task.id} ({self._left_s:.0f} s left)")
                self._keep(task, self._outcome(runner, task, limit_s, share_s))
                self._write()
        finally:
            runner.cancel()

    def _outcome(self, runner: Runner, task: Task, limit_s: float, share_s: float) -> Outcome:
        if limit_s <= 0:
            return Outcome(Status.TIMEOUT, {}, f"the {share_s:.0f} s of this part were over before it began", "", 0.0)
        # JAX goes on with the CPU where it cannot have the chips, unless it is told that it must.
        on_tpu = self.found.environment.get("platform") == "tpu"
        must = {"JAX_PLATFORMS": "tpu,cpu"} if on_tpu and not os.environ.get("JAX_PLATFORMS") else {}
        payload = task.payload | {"chip": self.chip}
        return runner.run(task.job, payload, timeout_s=limit_s, variables=lambda folder: must)

    @property
    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _keep(self, task: Task, outcome: Outcome) -> None:
        """Add what came of a task to what was found."""
        result, found = outcome.result, self.found
        if outcome.status is not Status.OK:
            error = failure_text(outcome.error)
            failure = Failure(id=task.id, part=task.part, name=task.name, status=outcome.status, error=error)
            others = tuple(each for each in found.failures if each.id != task.id)
            self._update(failures=(*others, failure))
        elif task.part == "environment":
            self._begin(anonymous_tree(result))
        elif task.op is None:
            self._update(checks=(*found.checks, Check(id=task.id, name=task.name, says=result["says"])))
        else:
            self._update(rows=(*found.rows, self._row(task, result)))

    def _begin(self, environment: dict[str, Any]) -> None:
        """Take the chips as found; go on with today's file of the same chips. One of others is left as it is."""
        kind = environment["device_kind"]
        first = self.path = self.output_dir / file_name(kind, _today())
        for number in itertools.count(2):
            before = _read(self.path, strict=self.resume)
            if before is None or before.same_place(environment):
                break
            self.path = first.with_stem(f"{first.stem}-{number}")
        if before is not None and self.resume:
            others = tuple(each for each in before.failures if each.part not in (*self.parts, "environment"))
            self.found = msgspec.structs.replace(before, left_out={}, failures=others)
        self._update(environment=environment, device_kind=kind)

    def _row(self, task: Task, result: Mapping[str, Any]) -> TimedRow:
        return TimedRow(
            id=f"{self.path.stem}, {task.id}",
            source=self.found.source,
            device_kind=self.found.device_kind,
            op=task.op or "",
            arguments=result.get("arguments", task.arguments),
            config=result.get("config", task.config),
            times_ms=tuple(result["times_ms"]),
            notes=tuple(anonymous_tree(result["notes"])),
            part=task.part,
            name=task.name,
            kernel_time_ms=result["kernel_time_ms"],
            reported_ms=task.reported_ms,
            predicted=Predicted(says="not predicted yet"),
        )

    def _with_prediction(self, row: TimedRow, predictions: Predictions) -> TimedRow:
        task = self._tasks.get(row.task)
        if task is None:  # of an earlier session: predicted there, or not asked for in this one
            return row
        task = dataclasses.replace(task, arguments=row.arguments, config=row.config)
        return msgspec.structs.replace(row, predicted=predictions.of(task, self._deadline))

    def _leave_out(self, reasons: Mapping[str, str]) -> None:
        self._update(left_out={**self.found.left_out, **reasons})

    def _update(self, **changes: Any) -> None:
        self.found = msgspec.structs.replace(self.found, **changes)

    def _write(self) -> None:
        write_json(self.path, jsonl.encode(self.found))


def _read(path: Path, *, strict: bool) -> SelfCheck | None:
    """Return what a file holds; without `strict` None for one that cannot be read, which is then replaced."""
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=SelfCheck)
    except (msgspec.DecodeError, ValueError) as error:
        if not strict:
            return None
        raise UserError(f"{path}: {error}; move it away, or start anew with resume=false.") from error


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
