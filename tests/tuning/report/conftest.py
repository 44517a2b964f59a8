"""Records that a report is made of, for its tests: small, made up, and of the form that the commands write."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

GIT = {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False}
VERSIONS = {"python": "3.11.7", "jax": "0.10.2", "libtpu": "0.0.52"}
REQUEST = {
    "prompt": "any",
    "checkpoint": "zai-org/CogVideoX1.5-5B",
    "height": 720,
    "width": 1280,
    "num_frames": 81,
    "num_inference_steps": 50,
}
STAGE = {
    "time_s": 0.5,
    "breakdown_s": {"attention_kernel": 0.3, "matmul": 0.2},
    "peak_hbm_bytes": 8 * 2**30,
    "hbm_bytes": 32 * 2**30,
    "mfu_fraction": 0.38,
}


def predicted(**changes: Any) -> dict[str, Any]:
    """A line of predict.jsonl: all stages, without anything reported."""
    record: dict[str, Any] = {
        "created_at": "2026-11-23T10:00:00+00:00",
        "label": "predicted",
        "topology": "v6e-8",
        "request": REQUEST,
        "plan": {"plan": "ulysses", "dp": 2, "model": 4, "weights": "replicated"},
        "step_time_s": 0.5,
        "stages": {stage: copy.deepcopy(STAGE) for stage in ("text", "denoise", "vae")},
        "reported": None,
        "notes": [],
        "versions": VERSIONS,
        "git": GIT,
    }
    return record | changes


def generated(**changes: Any) -> dict[str, Any]:
    """A line of generate.jsonl."""
    stage = {"load_time_s": 0.25, "compile_time_s": 2.0, "run_time_s": 1.5, "step_times_s": [0.5, 0.25, 0.75]}
    record: dict[str, Any] = {
        "created_at": "2026-11-23T10:00:00+00:00",
        "label": "measured",
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "request": REQUEST,
        "stages": {stage_name: dict(stage) for stage_name in ("vae", "text", "denoise")},
        "versions": VERSIONS,
        "git": GIT,
    }
    return record | changes


def validated(**changes: Any) -> dict[str, Any]:
    """What `tuning.validate` keeps, of one row."""
    row = {
        "id": "x-0000",
        "device_kind": "TPU v6 lite",
        "op": "splash_attention",
        "shape": "1x16384x32x64",
        "config": "2048/2048/512 sss lp",
        "status": "predicted",
        "reported_ms": 10.0,
        "predicted_ms": 9.5,
        "ratio": 0.95,
        "abs_error": 0.05,
        "bound": "compute",
        "bottleneck": "MXU",
        "error": None,
    }
    content: dict[str, Any] = {
        "name": "splash",
        "sources": ["somebody"],
        "versions": {"libtpu": "0.0.52"},
        "row_count": 1,
        "median_abs_error": 0.05,
        "p95_abs_error": 0.05,
        "max_abs_error": 0.05,
        "spearman": None,
        "rows": [row],
    }
    return content | changes


def judged(**changes: Any) -> dict[str, Any]:
    """A line of quality.jsonl, of three videos."""
    record: dict[str, Any] = {
        "created_at": "2026-11-23T10:00:00+00:00",
        "label": "measured",
        "device": {"platform": "cpu", "kind": "cpu", "count": 1},
        "request": REQUEST,
        "candidate": "online",
        "psnr_db": [41.25, None, 50.0],
        "ssim": [0.9875, 1.0, 0.999],
        "lpips": [0.0125, 0.0, 0.001],
        "read_back": {"colour": 1.0, "all": 0.75},
        "failures": [],
        "versions": VERSIONS,
        "git": GIT,
    }
    return record | changes


def write_lines(path: Path, *lines: dict[str, Any] | str) -> None:
    """JSON lines; a string as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))


@pytest.fixture
def samples() -> SimpleNamespace:
    """The functions above."""
    return SimpleNamespace(
        predicted=predicted,
        generated=generated,
        validated=validated,
        judged=judged,
        write_lines=write_lines,
        stage=STAGE,
    )
