"""A batch over many slices: lines are handed out as slices are free, and those of a lost slice handed out again.

First the text of all lines, then the rest, as in a batch of one machine and for the same reason. Slices come as the
cluster has room for them and go as they like; results and failures are told, recorded and counted here.
"""

import concurrent.futures
import contextlib
import dataclasses
import queue
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.requests.errors import RequestError
from pipeline.requests.request import Stage
from pipeline.runs import records
from pipeline.runs.batch import Line, duration, write_error
from pipeline.runs.messages import Done, Job, Ready
from pipeline.runs.slices import Slice
from splash_workbench.engines.cluster import Cluster
from splash_workbench.errors import UserError
from splash_workbench.records.base import new_id

#: Seconds between two looks at how many slices there is room for, between two lines on what all are at, and for which
#: slices that are told to stop are waited for.
_LOOK_S, _TELL_S, _STOP_S = 2.0, 30.0, 120.0
#: Slices in a row that may be lost before they have looked at the lines.
_MAX_FAILED_STARTS = 3


@dataclasses.dataclass(eq=False)
class _Member:
    """A slice as it is seen from here. doing: the line and the stages that it is at; group: of its last line."""

    number: int
    actor: Any
    ready: Ready | None = None
    doing: tuple[int, tuple[Stage, ...]] | None = None
    group: int | None = None


class Fleet:
    """Run a batch on the slices of a cluster.

    say: told "[2 of 3]", or "", and what began or ended. kind: of the slices. Attribute lines: what became of each.
    """

    def __init__(
        self,
        cluster: Cluster,
        job: Job,
        results_path: Path | None,
        say: Callable[[str, str], None],
        kind: type = Slice,
    ) -> None:
        self.lines = [Line(entry) for entry in job.entries]
        self._cluster, self._job, self._results_path, self._say, self._kind = cluster, job, results_path, say, kind
        self._members: list[_Member] = []
        self._answers: queue.SimpleQueue[tuple[_Member, Any]] = queue.SimpleQueue()
        self._count, self._failed_starts = 0, 0
        self._reference: Ready | None = None  # the first slice that was ready
        self._losses = [0] * len(self.lines)
        self._text = list(range(len(self.lines))) if "text" in job.stages else []
        self._rest = [] if self._text else list(range(len(self.lines)))

    def run_all(self) -> None:
        """Run every line. Raises RequestError before any work for lines or slices that cannot be."""
        marker = self._job.output_dir / self._job.marker
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        try:
            self._loop()
        except KeyboardInterrupt as error:
            self._stop(getattr(error, "signal_number", 2))
            raise
        finally:
            marker.unlink(missing_ok=True)
            for member in self._members:
                self._kill(member)

    def _loop(self) -> None:
        told = time.monotonic()
        if self._cluster.settings.slices is None:
            self._cluster.require_room()
        while any(line.status == "waiting" for line in self.lines):
            self._grow()
            with contextlib.suppress(queue.Empty):
                member, ref = self._answers.get(timeout=_LOOK_S)
                self._hear(member, ref)
            for member in self._members:
                self._hand_out(member)
            if time.monotonic() - told > _TELL_S:
                told = time.monotonic()
                self._say("", self._overview())

    def _grow(self) -> None:
        """Ask for as many slices as there is room and work for; those there is no room for yet come when there is."""
        waiting = sum(line.status == "waiting" for line in self.lines)
        limit = self._cluster.settings.slices or max(1, self._cluster.room())
        while len(self._members) < min(limit, waiting):
            self._count += 1
            options = self._cluster.options() | {"max_restarts": 0, "concurrency_groups": {"watch": 2}}
            given = {name: value for name, value in options.items() if value is not None}
            actor = self._cluster.ray.remote(**given)(self._kind).remote(self._job)
            self._members.append(_Member(self._count, actor))
            self._ask(self._members[-1], actor.prepare.remote())

    def _ask(self, member: _Member, ref: Any) -> None:
        """Hear of a call's end. In a queue, because a signal that comes while Ray waits is lost in it."""
        ref.future().add_done_callback(lambda _: self._answers.put((member, ref)))

    def _hear(self, member: _Member, ref: Any) -> None:
        """Take what a slice has made, or that it is lost."""
        errors = self._cluster.ray.exceptions
        doing, member.doing = member.doing, None
        try:
            answer = self._cluster.ray.get(ref)
        except errors.RayError as error:
            lines = str(getattr(error, "cause", None) or error).strip().splitlines()
            if isinstance(error, errors.RayTaskError) or "creation task" in lines[0]:  # it lives, and cannot work
                raise UserError(
                    f"engine=ray: slice {member.number} failed ({lines[-1]}); expected this package, installed alike, "
                    "on every node; Ray's logs there say more."
                ) from error
            self._lose(member, doing, lines[0])
            return
        if isinstance(answer, Ready):
            self._welcome(member, answer)
        elif doing is not None:
            self._take(member, doing[0], answer)

    def _welcome(self, member: _Member, ready: Ready) -> None:
        if ready.errors:
            raise RequestError(*ready.errors)
        self._failed_starts = 0
        first = self._reference
        if first is None:
            self._reference = ready
            for index, finished in enumerate(ready.finished):
                if finished is not None:
                    self.lines[index].status, self.lines[index].result = "finished before", self._shown(finished)
                    self._tell(index, f"finished before, skipped: {finished.video_path}")
            self._text = [index for index in self._text if self.lines[index].status == "waiting"]
            self._rest = [index for index in self._rest if self.lines[index].status == "waiting"]
        elif first.digest != ready.digest:
            raise RequestError(
                f"engine=ray: node {ready.where} ({ready.devices}) has other weights, devices or versions than "
                f"{first.where} ({first.devices}); expected slices that are alike, for they would make other bits"
            )
        member.ready = ready
        self._say("", f"slice {member.number}: {ready.devices} on {ready.where}")

    def _hand_out(self, member: _Member) -> None:
        """Give a free slice a line: text first, then one that needs what it has loaded."""
        if member.ready is None or member.doing is not None:
            return
        stages: tuple[Stage, ...] = ("text",)
        if self._text:
            index = self._text.pop(0)
        elif self._rest:
            groups = member.ready.groups
            index = next((i for i in self._rest if groups[i] == member.group), self._rest[0])
            self._rest.remove(index)
            member.group, stages = groups[index], self._job.stages
        else:
            return
        member.doing = index, stages
        self._ask(member, member.actor.work.remote(index, stages))

    def _take(self, member: _Member, index: int, done: Done) -> None:
        line = self.lines[index]
        line.time_s += done.time_s
        if done.status == "waiting":
            self._rest.append(index)
            return
        assert done.status != "interrupted", "only a slice that is told to stop stops"
        line.status, line.error = done.status, done.error
        if done.result is not None:
            line.result = self._shown(done.result)
            if self._results_path is not None and done.result.record is not None:
                records.keep(self._results_path, done.result.record)
            self._tell(index, f"done on slice {member.number}: {line.result.video_path or line.result.run_dir}")
        else:
            self._tell(index, f"failed on slice {member.number}: {done.error}")

    def _lose(self, member: _Member, doing: tuple[int, tuple[Stage, ...]] | None, reason: str) -> None:
        """Forget a slice; its line is the next one to be handed out, unless it was lost too often."""
        self._members.remove(member)
        self._kill(member)
        self._say("", f"slice {member.number} is lost ({reason})")
        if member.ready is None:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise UserError(f"engine=ray: {self._failed_starts} slices were lost as they started ({reason}).")
        if doing is None:
            return
        index, stages = doing
        self._losses[index] += 1
        if self._losses[index] <= self._cluster.settings.retries:
            (self._text if stages == ("text",) else self._rest).insert(0, index)
            return
        line, tries = self.lines[index], self._losses[index]
        line.status = "failed"
        line.error = f"lost with its slice {tries} time{'s' * (tries > 1)}: {reason}"
        self._tell(index, f"failed: {line.error}")
        folder = self._job.output_dir / line.entry.name
        write_error(folder, line, stages[-1], line.entry.request, line.error, "Lost", None)

    def _stop(self, signal_number: int) -> None:
        """Let the slices end the steps that they are at, and save them."""
        refs = [self._watch(member.actor.stop).remote(signal_number) for member in self._members if member.doing]
        if refs:
            self._say("", f"{len(refs)} slices stop after the step that they are at")
            concurrent.futures.wait([ref.future() for ref in refs], timeout=_STOP_S)

    def _overview(self) -> str:
        ray, counts = self._cluster.ray, {"done": 0, "failed": 0, "waiting": 0}
        for line in self.lines:
            counts["done" if line.status == "finished before" else line.status] += 1
        said = f"{counts['done']} of {len(self.lines)} done"
        if counts["failed"]:
            said += f", {counts['failed']} failed"
        if starting := sum(member.ready is None for member in self._members):
            said += f"; {starting} of {len(self._members)} slices start, or wait for room"
        at = {member: self._watch(member.actor.where).remote() for member in self._members if member.doing}
        ready, _ = ray.wait(list(at.values()), num_returns=len(at), timeout=1.0) if at else ([], [])
        for member, ref in at.items():
            if ref in ready and member.doing is not None:
                with contextlib.suppress(ray.exceptions.RayError):  # lost meanwhile: `_hear` says so
                    said += f"; slice {member.number}: line {member.doing[0] + 1} {ray.get(ref)}"
        times = [line.time_s for line in self.lines if line.status == "done"]
        if times and at:
            said += f"; about {duration(statistics.median(times) * counts['waiting'] / len(at))} left"
        return said

    def _shown(self, result: Any) -> Any:
        """Return a result with paths as the command names them."""
        shown = Path(self._job.output_dir)
        with contextlib.suppress(ValueError):
            shown = shown.relative_to(self._job.folder)
        run_dir = shown / result.run_dir.name
        video_path = run_dir / result.video_path.name if result.video_path is not None else None
        return dataclasses.replace(result, run_dir=run_dir, video_path=video_path)

    def _tell(self, index: int, text: str) -> None:
        self._say(f"[{index + 1} of {len(self.lines)}]", text)

    def _watch(self, method: Any) -> Any:
        return method.options(concurrency_group="watch")

    def _kill(self, member: _Member) -> None:
        with contextlib.suppress(Exception):  # it is gone, or the cluster is
            self._cluster.ray.kill(member.actor)


def new_marker() -> str:
    """Return the name of a file that tells a slice whether it sees a folder."""
    return f".slices-{new_id()}"
