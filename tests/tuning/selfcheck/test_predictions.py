import time
from pathlib import Path
from typing import Any

import pytest

from fake_jobs import RAISES_AT
from helpers import PLENTY_S
from offline_tpu import SUPPORTED_LIBTPU, libtpu
from offline_tpu.machine.topology import parse_topology
from splash_attn.types import AttentionShape, BlockSizes, Variant
from tuning.selfcheck import predictions as module
from tuning.selfcheck.predictions import Predictions
from tuning.selfcheck.tasks import Task, kernel_request, kernel_tasks, row_tasks, topology_of

V6E = {
    "platform": "tpu",
    "device_kind": "TPU v6 lite",
    "num_devices": 8,
    "hbm_bytes": 32 * 2**30,
    "versions": {"libtpu": SUPPORTED_LIBTPU},
}
REQUEST = {
    "checkpoint": "zai-org/CogVideoX1.5-5B",
    "height": 720,
    "width": 1280,
    "num_frames": 81,
    "dtype": "bfloat16",
}
PLAN = {"num_devices": 8, "plan": "ulysses", "dp": 2, "model": 4, "weights": "replicated", "kv": 1}


@pytest.fixture
def predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The prediction of one task, as a worker that runs this job makes it."""

    def of(task: Task, found: dict[str, Any], job: str) -> Any:
        monkeypatch.setattr(module, "_job_of", lambda task, found: (job, {}))
        with Predictions(found, tmp_path, 1, PLENTY_S) as made:
            made.start(task)
            return made.of(task, time.monotonic() + PLENTY_S)

    return of


def test_made_here_it_has_an_interval(predicted: Any) -> None:
    (task, *_) = kernel_tasks(V6E)
    found = predicted(task, V6E, "fake_jobs:predicts")
    assert (found.time_ms, found.interval_ms) == (12.0, (11.0, 13.0))
    assert found.says == f"here, libtpu {SUPPORTED_LIBTPU}"


def test_what_cannot_be_made_here_is_taken_from_the_tuned_entry(predicted: Any) -> None:
    (task, *_) = kernel_tasks(V6E)
    found = predicted(task, V6E, "fake_jobs:raises")
    assert found.time_ms > 1 and found.interval_ms is None and found.says.startswith("tuned entry of ")


@pytest.mark.parametrize("stage", ["text", "vae", "denoise"])
def test_a_stage_is_found_in_the_shipped_records(stage: str, predicted: Any) -> None:
    task = Task(stage, "any", "job", {}, "op", REQUEST, PLAN)
    found = predicted(task, V6E, "fake_jobs:raises")
    assert found.says.startswith("record of ") and found.time_ms > 1
    other = Task(stage, "any", "job", {}, "op", REQUEST | {"num_frames": 49}, PLAN)
    assert (
        predicted(other, V6E, "fake_jobs:raises").says
        == f"crashed: RuntimeError at {RAISES_AT}: first line ... last line"
    )


def test_another_libtpu_has_no_prediction_and_says_why(predicted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"libtpu": "0.0.1", "jaxlib": libtpu.SUPPORTED_JAXLIB}
    monkeypatch.setattr(libtpu, "installed_version", versions.get)
    (task, *_) = kernel_tasks(V6E)
    found = predicted(task, V6E, "fake_jobs:predicts")
    assert found.time_ms is None
    assert f"libtpu 0.0.1 is installed, and predictions need libtpu {libtpu.SUPPORTED_LIBTPU}" in found.says


def test_other_devices_have_none(predicted: Any) -> None:
    (task, *_) = kernel_tasks(V6E)
    assert predicted(task, V6E | {"platform": "gpu"}, "fake_jobs:predicts").says == "predictions are for TPUs"
    assert "TPU v9" in predicted(task, V6E | {"device_kind": "TPU v9"}, "fake_jobs:predicts").says


def test_the_topology_counts_cores() -> None:
    assert topology_of(V6E) == "v6e-8"
    hosts = {"TPU7x": ("v7x-8", 8), "TPU v5": ("v5p-8", 4)}  # four chips: of two devices each, and of two cores each
    for device_kind, (topology, num_devices) in hosts.items():
        assert topology_of({"device_kind": device_kind, "num_devices": num_devices}) == topology
        assert parse_topology(topology)[1].endswith("2x2x1")
    assert topology_of(V6E | {"device_kind": "TPU v9"}) is None


@pytest.mark.compile
def test_a_kernel_is_predicted_in_a_worker(tmp_path: Path) -> None:
    payload = kernel_request(AttentionShape(1, 1, 203, 331, 64), "bfloat16", BlockSizes(128, 256, 128), Variant())
    with Predictions(V6E, tmp_path, 1, PLENTY_S) as made:
        task = Task("kernels", "small", "job", payload, "splash_attn")
        made.start(task)
        found = made.of(task, time.monotonic() + PLENTY_S)
    assert found.time_ms is not None and 0 < found.time_ms < 1, found


@pytest.mark.compile
def test_a_row_of_the_validation_is_predicted_in_a_worker(tmp_path: Path) -> None:
    task = next(task for task in row_tasks(V6E) if task.op == "copy")
    with Predictions(V6E, tmp_path, 1, PLENTY_S) as made:
        made.start(task)
        found = made.of(task, time.monotonic() + PLENTY_S)
    assert found.time_ms is not None and found.interval_ms is not None, found
    assert found.interval_ms[0] < found.time_ms < found.interval_ms[1]
