"""What is recorded of a run: where it ran, what was asked for, how long each stage took."""

import dataclasses
import datetime
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from pipeline.requests.request import GenerateRequest
from pipeline.stages.progress import StageTimings
from splash_workbench import provenance

SCHEMA_VERSION = 1
_MAX_PROMPT = 4000  # characters, in the mp4; the sidecar has all
_PACKAGES = ("cogvideox-splash", "jax", "jaxlib", "libtpu", "torch", "torchax", "diffusers", "transformers")


def make_record(
    request: GenerateRequest, timings: Sequence[StageTimings], denoise: Mapping[str, Any]
) -> dict[str, Any]:
    """A JSON-able record of one run. Times are measured, on the device named; reused stages have none here.

    denoise: details of the denoise stage, with "attention" in it; empty where there is no output of it. Where it was
    resumed after a step, its step times are those of all runs, and its load and compile times of the last.
    """
    device = jax.devices()[0]
    return {
        "schema_version": SCHEMA_VERSION,
        "record_id": uuid.uuid4().hex,
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "label": "measured",
        "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count()},
        "host": provenance.host(),
        "versions": package_versions(),
        "git": git_state(),
        "request": dataclasses.asdict(request),
        "attention": denoise.get("attention"),
        "parallel": denoise.get("parallel"),
        "resumed_at_step": denoise.get("resumed_at_step"),
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


def video_tags(record: Mapping[str, Any], fingerprint: str) -> dict[str, str]:
    """What the mp4 itself says of a run: the prompt as its title, the rest as JSON in its comment.

    record: of `make_record`. fingerprint: of the frames, as in the sidecar.
    """
    request = record["request"]
    first = (
        "checkpoint",
        "seed",
        "num_inference_steps",
        "guidance_scale",
        "scheduler",
    )  # some tools cut what they show
    said = {name: request[name] for name in first}
    said |= {"git": record["git"], "versions": record["versions"]}
    said |= {name: value for name, value in request.items() if name not in (*first, "attention")}
    for name in ("prompt", "negative_prompt"):
        said[name] = said[name][:_MAX_PROMPT]
    attention = record["attention"] or {}
    said["attention"] = {name: attention.get(name) for name in ("implementation", "block_sizes", "variant")}
    said["fingerprint"] = fingerprint
    return {"title": request["prompt"][:_MAX_PROMPT], "comment": json.dumps(said, ensure_ascii=False)}


def package_versions() -> dict[str, str]:
    """Versions of what a stage's result and time depend on."""
    return provenance.package_versions(_PACKAGES)


def git_state() -> dict[str, Any] | None:
    """Commit of this source tree and whether it was changed since; None where it is not a git checkout."""
    commit, dirty = provenance.git_state()
    return None if commit is None else {"commit": commit, "dirty": dirty}
