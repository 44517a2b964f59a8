"""What is recorded of a run: where it ran, what was asked for, how long each stage took."""

import dataclasses
import datetime
import functools
import platform
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from pipeline.profiling import StageTimings
from pipeline.request import GenerateRequest

SCHEMA_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "libtpu", "torch", "torchax", "diffusers", "transformers")


def make_record(
    request: GenerateRequest, timings: Sequence[StageTimings], denoise: Mapping[str, Any]
) -> dict[str, Any]:
    """A JSON-able record of one run. Times are measured, on the device named; reused stages have none here.

    denoise: details of the denoise stage, with "attention" in it; empty where there is no output of it.
    """
    device = jax.devices()[0]
    return {
        "schema_version": SCHEMA_VERSION,
        "record_id": uuid.uuid4().hex,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "label": "measured",
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "host": f"{platform.machine()}-{platform.system().lower()}",
        "versions": package_versions(),
        "git": git_state(),
        "request": dataclasses.asdict(request),
        "attention": denoise.get("attention"),
        "parallel": denoise.get("parallel"),
        "stages": {
            timing.stage: {
                "load_time_s": timing.load_time_s,
                "compile_time_s": timing.compile_time_s,
                "run_time_s": timing.run_time_s,
                "step_times_s": timing.step_times_s,
            }
            for timing in timings
            if not timing.reused
        },
        "reused_stages": [timing.stage for timing in timings if timing.reused],
    }


@functools.cache
def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_state() -> dict[str, Any] | None:
    """Commit of this source tree and whether it was changed since; None where it is not a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no"))}
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
