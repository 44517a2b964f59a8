"""The record of a run: where it ran, what was asked for, how long each stage took."""

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pipeline.requests.request import GenerateRequest
from pipeline.stages.progress import StageTimings
from splash_workbench import provenance
from splash_workbench.records import jsonl
from splash_workbench.records.base import Devices
from splash_workbench.records.generation import GenerationRecord, StageTimes
from splash_workbench.records.jsonl import decode, encode
from splash_workbench.trial_status import Label

logger = logging.getLogger(__name__)

_MAX_PROMPT = 4000  # characters, in the mp4; the sidecar has all
#: What a stage's result and time depend on.
PACKAGES = ("cogvideox-splash", "jax", "jaxlib", "libtpu", "torch", "torchax", "diffusers", "transformers")
_SOURCES = ("pipeline/model/**/*.py", "pipeline/stages/*.py", "pipeline/checkpoints/*.py", "splash_attn/*.py")


def keep(path: Path, record: GenerationRecord) -> None:
    """Append a record of timings to a file. Where that fails, as on a full disk, say so: the video is done."""
    try:
        jsonl.append(path, record)
    except OSError as error:
        logger.warning("results_path=%s: %s; video.json beside the video has the timings", path, error)


def make_record(
    request: GenerateRequest, timings: Sequence[StageTimings], denoise: Mapping[str, Any]
) -> GenerationRecord:
    """Return the record of one run. Times are measured, on the device named; reused stages have none here.

    denoise: details of the denoise stage, with "attention" in it; empty where there is no output of it. Where it was
    resumed after a step, its step times are those of all runs, and its load and compile times of the last.
    """
    return GenerationRecord(
        label=Label.MEASURED,
        device=devices(),
        environment=environment(),
        request=dataclasses.asdict(request),
        attention=denoise.get("attention"),
        compiler_options=denoise.get("compiler_options"),
        parallel=denoise.get("parallel"),
        resumed_at_step=denoise.get("resumed_at_step"),
        stages={timing.stage: decode(encode(timing), StageTimes) for timing in timings if not timing.reused},
        reused_stages=tuple(timing.stage for timing in timings if timing.reused),
    )


def video_tags(record: GenerationRecord, fingerprint: str) -> dict[str, str]:
    """Return what the mp4 itself says of a run: the prompt as its title, the rest as JSON in its comment.

    fingerprint: of the frames, as in the sidecar.
    """
    request = record.request
    # First, since some tools cut what they show.
    first = ("checkpoint", "seed", "num_inference_steps", "guidance_scale", "scheduler")
    said = {name: request[name] for name in first}
    said["environment"] = encode(record.environment)
    said |= {name: value for name, value in request.items() if name not in (*first, "attention")}
    for name in ("prompt", "negative_prompt"):
        said[name] = said[name][:_MAX_PROMPT]
    attention = record.attention or {}
    said["attention"] = {name: attention.get(name) for name in ("implementation", "block_sizes", "variant")}
    said["fingerprint"] = fingerprint
    return {"title": request["prompt"][:_MAX_PROMPT], "comment": json.dumps(said, ensure_ascii=False)}


def devices() -> Devices:
    """Return the devices that JAX has here."""
    device = jax.devices()[0]
    return Devices(device.platform, device.device_kind, jax.device_count())


def environment(sources: Iterable[str] = _SOURCES) -> provenance.Environment:
    """Describe this process, for a figure that the files matching `sources` make."""
    return provenance.capture(sources, PACKAGES)
