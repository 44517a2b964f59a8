"""Slices of a batch that make nothing, and are lost as real ones are."""

import dataclasses
import os
import threading
import time
from pathlib import Path

from helpers import PLENTY_S
from pipeline.requests.request import Stage
from pipeline.runs.messages import Done, Job, Ready


@dataclasses.dataclass(frozen=True)
class FakeResult:
    run_dir: Path
    video_path: Path | None
    record: dict[str, str] | None


class FakeSlice:
    """Does with a line what its prompt says; adds "line stages" to the file `log` for each piece of work."""

    def __init__(self, job: Job) -> None:
        self._job, self._stop, self._stopped = job, threading.Event(), threading.Event()

    def prepare(self) -> Ready:
        found = []
        for entry in self._job.entries:
            folder = self._job.output_dir / entry.name
            found.append(FakeResult(folder, folder / "video.mp4", None) if folder.exists() else None)
        return Ready("host", (), tuple(found), (0,) * len(found), "1 x fake", "the same")  # type: ignore[arg-type]

    def work(self, index: int, stages: tuple[Stage, ...]) -> Done:
        entry = self._job.entries[index]
        with (self._job.output_dir / "log").open("a") as log:
            log.write(f"{index} {','.join(stages)}\n")
        time.sleep(0.2)
        if stages == ("text",):
            return Done("waiting", None, None, 0.1)
        match entry.request.prompt:
            case "lost":
                os._exit(1)
            case "lost once" if not (self._job.output_dir / "was lost").exists():
                (self._job.output_dir / "was lost").touch()
                os._exit(1)
            case "long":
                assert self._stop.wait(PLENTY_S)
                (self._job.output_dir / "stopped").touch()
                self._stopped.set()
                return Done("interrupted", None, None, 0.1)
            case "fails":
                return Done("failed", "denoise: it holds NaN", None, 0.1)
        folder = self._job.output_dir / entry.name
        folder.mkdir()
        result = FakeResult(folder, folder / "video.mp4", {"made": entry.name})
        return Done("done", None, result, 0.1)  # type: ignore[arg-type]

    def where(self) -> str:
        return "denoise 1/2"

    def stop(self, signal_number: int) -> None:
        del signal_number
        self._stop.set()
        assert self._stopped.wait(PLENTY_S)
