"""Many requests in one go, so that nothing is loaded or compiled twice.

Order: first the text of all prompts, whose embeddings are small, so that the T5 (half of all weights) is loaded once
and gone; then video by video, transformer and VAE decoder both kept, so that a video is there as soon as it can be.
Where the two do not fit into memory together, the rest of the batch is denoised first and decoded after that.
"""

import contextlib
import dataclasses
import logging
import resource
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from pipeline.checkpoints.checks import Configs, check_request, check_weights, checkpoint_of, read_configs
from pipeline.checkpoints.loading import Checkpoint
from pipeline.model.step_options import entry_hashes
from pipeline.requests.batch_file import Entry
from pipeline.requests.errors import DeviceMemoryError, PipelineError, RequestError
from pipeline.requests.options import RunOptions
from pipeline.requests.request import GenerateRequest, Stage
from pipeline.runs.hosts import check_same
from pipeline.runs.request_run import GenerateResult, RequestRun, needed_stages
from pipeline.stages.progress import Progress, no_progress
from pipeline.stages.stages import Stages
from splash_workbench.errors import UserError
from splash_workbench.files import write_json
from splash_workbench.records.base import utc_now

logger = logging.getLogger(__name__)

_ERROR_NAME = "error.json"
_SCHEMA_VERSION = 1  # of it
_OTHER_FILES = 40  # that a run of one line may have open
Status = Literal["waiting", "done", "finished before", "failed"]


@dataclasses.dataclass(eq=False)
class Line:
    """A line of the batch, and its result.

    error: why it failed, in one line. time_s: spent on it in this run, with what it was the first to load and compile.
    """

    entry: Entry
    status: Status = "waiting"
    error: str | None = None
    result: GenerateResult | None = None
    time_s: float = 0.0


@dataclasses.dataclass(eq=False)
class Item(Line):
    """A line that is run in this process."""

    run: RequestRun = dataclasses.field(kw_only=True)


def prepare(
    entries: Sequence[Entry],
    path: Path | None,
    stages: Sequence[Stage],
    output_dir: Path,
    run_options: RunOptions,
    cache_dir: Path | None = None,
    watch: Callable[[Sequence[Entry]], Iterable[Entry]] = iter,
) -> list[Item]:
    """Check the entries of the file `path` against the checkpoints, devices and folders here. Raises RequestError.

    path: None where there is no file, and the entries differ in their seeds. watch: yields the entries, and may show
    how far they are: those of many images or videos take a while.
    """
    found: dict[Any, tuple[Configs, Checkpoint, dict[Stage, str]]] = {}
    checked: set[Any] = set()
    writable: set[Path] = set()
    items: list[Item] = []
    errors: list[str] = []
    for entry in watch(entries):
        request = entry.request
        needed = needed_stages(stages, request)
        which = (request.checkpoint, request.revision, request.transformer, needed, request.encodes)
        try:
            if which not in found:
                checkpoint = checkpoint_of(request, cache_dir)
                found[which] = read_configs(checkpoint), checkpoint, checkpoint.identities(*needed)
            configs, checkpoint, identities = found[which]
            check_request(request, configs)
            run_dir = output_dir / entry.name
            run = RequestRun(request, stages, run_dir, checkpoint, identities, run_options, writable)
            if which not in checked:
                check_weights(checkpoint, configs, needed, request.encodes)
                checked.add(which)
            items.append(Item(entry, run=run))
        except PipelineError as error:
            errors.append(f"{path}:{entry.line}: {error}" if path is not None else str(error))
    if errors:
        raise RequestError(*dict.fromkeys(errors))
    return items


class Batch:
    """Run items. One that fails leaves an error.json in its folder, and the others go on.

    say: told "[2 of 3]" and what begins or ended there ("": nothing but the place). progress: told of every step; what
    it raises that is no Exception (KeyboardInterrupt) ends the batch, and another one of the same items resumes it.
    """

    def __init__(
        self,
        items: Sequence[Item],
        results_path: Path | None = None,
        progress: Progress = no_progress,
        say: Callable[[str, str], None] = lambda place, text: None,
    ):
        self.items, self._stages = list(items), Stages()
        self._results_path, self._progress, self._say = results_path, progress, say
        self._apart = False  # whether the transformer and the decoder must not share the memory

    def run_all(self) -> None:
        """Run every item. Raises UserError, before any work, for too many, or one that another process is at work on.

        With several processes whatever is no PipelineError ends the batch: the others may not have met it.
        """
        check_same([[item.run.described for item in self.items], entry_hashes()])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and len(self.items) + _OTHER_FILES > hard:
            raise UserError(
                f"{len(self.items)} lines: each has a file open, of {hard} that may be (`ulimit -Hn`); expected fewer "
                "lines at a time, or a higher limit"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, soft + len(self.items)), hard))  # a lock each
        for item in self.items:
            finished = item.run.finished() if item.run.run_options.resume else None
            if finished is not None:
                item.status, item.result = "finished before", finished
                with contextlib.suppress(UserError, OSError), item.run.locked():
                    pass  # of a batch that was killed, takes away the lock that it left
                self._tell(item, f"finished before, skipped: {finished.video_path}")
        with contextlib.ExitStack() as locks:
            for item in self._waiting():
                locks.enter_context(item.run.locked())
            for item in self._waiting():
                try:
                    item.run.check_inputs()
                except PipelineError as error:
                    self._fail(item, item.run.stages[0], error)
            self._run_waiting(self.items[0].run.stages)

    def run_one(self, item: Item, stages: Sequence[Stage]) -> None:
        """Run those of an item's stages that are not done; it stays "waiting" while others are to be run.

        What is loaded is kept for the next one, but for text, which is not kept beside the others.
        """
        for stage in ("denoise", "vae") if tuple(stages) == ("text",) else ("text",):
            self._stages.drop(stage)
        done = {timing.stage for timing in item.run.timings}
        for stage in stages:
            if stage in done:
                continue
            if self._apart:
                self._stages.drop("denoise" if stage == "vae" else "vae")
            self._attempt(item, stage)
            if stage == "vae" and item.status == "waiting":  # it did not fit beside the transformer
                self._stages.drop("denoise")
                self._attempt(item, stage)

    def _run_waiting(self, stages: Sequence[Stage]) -> None:
        for item in self._in_order("text") if "text" in stages else ():
            self._tell(item, "")
            self._attempt(item, "text")
        self._stages.drop("text")
        todo = self._in_order("denoise") if "denoise" in stages else []
        for videos_left, item in zip(range(len(todo), 0, -1), todo, strict=True):
            self._tell(item, f"{item.entry.name}{self._time_left(videos_left)}")
            self._attempt(item, "denoise")
            if videos_left == 1:
                self._stages.drop("denoise")
            if "vae" in stages and not self._apart:
                self._attempt(item, "vae")
        for item in self._waiting() if "vae" in stages else ():
            self._tell(item, f"decoding: {item.entry.name}")
            self._attempt(item, "vae")
        self._stages.drop("vae")

    def _waiting(self) -> list[Item]:
        return [item for item in self.items if item.status == "waiting"]

    def _in_order(self, stage: Stage) -> list[Item]:
        """Return waiting items in the file's order, those that share what an earlier one loads right behind it."""
        items = self._waiting()
        groups = list(dict.fromkeys(item.run.loaded_keys[stage] for item in items))
        return sorted(items, key=lambda item: groups.index(item.run.loaded_keys[stage]))

    def _attempt(self, item: Item, stage: Stage) -> None:
        """Run a stage of an item that has not failed. It stays "waiting" while stages of it are to be run."""
        if item.status != "waiting":
            return
        run, start = item.run, time.perf_counter()
        try:
            try:
                run.run_stage(stage, self._stages, self._progress)
            except DeviceMemoryError:
                if not self._stages.holds("denoise", "vae"):
                    raise
                logger.warning("%s: not enough device memory beside the other stage; from now on one by one", stage)
                self._apart = True
                self._stages.drop("vae")
                if stage == "vae":
                    return  # its turn comes when all are denoised
                run.run_stage(stage, self._stages, self._progress)
            if stage == run.stages[-1]:
                item.result = run.finish(self._results_path)
                item.status = "done"
                if jax.process_index() == 0:
                    (run.run_dir / _ERROR_NAME).unlink(missing_ok=True)
                self._tell(item, f"done: {item.result.video_path or item.result.run_dir}")
        except Exception as error:
            if jax.process_count() > 1 and not isinstance(error, PipelineError):
                raise
            self._fail(item, stage, error)
        finally:
            item.time_s += time.perf_counter() - start

    def _fail(self, item: Item, stage: Stage, error: Exception) -> None:
        expected = isinstance(error, PipelineError)
        first_line = (str(error).strip().splitlines() or [""])[0]
        item.error = first_line if expected else f"{stage}: {type(error).__name__}: {first_line}"
        item.status = "failed"
        self._tell(item, f"failed: {item.error}")
        if jax.process_index() == 0:
            trace = None if expected else traceback.format_exception(error)
            write_error(item.run.run_dir, item, stage, item.run.request, str(error), type(error).__name__, trace)

    def _tell(self, item: Item, text: str) -> None:
        self._say(f"[{self.items.index(item) + 1} of {len(self.items)}]", text)

    def _time_left(self, videos: int) -> str:
        times = [item.time_s for item in self.items if item.status == "done"]
        if not times or self._apart:
            return ""
        time_s = statistics.median(times[1:] or times)  # the first loads and compiles
        return f" (about {time_s:.0f} s a video, {duration(time_s * videos)} left for the batch)"


def write_error(
    folder: Path, line: Line, stage: Stage, request: GenerateRequest, error: str, kind: str, trace: list[str] | None
) -> None:
    """Leave an error.json in a line's folder, where it can be written. trace: of an error that nobody expected."""
    record = {
        "schema_version": _SCHEMA_VERSION,
        "created_at": utc_now(),
        "line": line.entry.line,
        "stage": stage,
        "error": error,
        "type": kind,
        "traceback": trace,
        "request": dataclasses.asdict(request),
    }
    with contextlib.suppress(OSError):  # e.g. a full disk, which may be what failed
        write_json(folder / _ERROR_NAME, record)


def duration(seconds: float) -> str:
    """Return seconds as "45 s", "12 min" or "3 h 5 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
