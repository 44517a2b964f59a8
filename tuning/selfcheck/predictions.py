"""Predictions beside the timings: made on the host's processors meanwhile, or shipped.

A process that holds the chips cannot predict, and need not: these workers have JAX_PLATFORMS=cpu.
"""

import concurrent.futures
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import msgspec

import offline_tpu
from offline_tpu import libtpu
from offline_tpu.machine import devices, residuals
from splash_attn import tuned
from splash_attn.types import AttentionShape, BlockSizes, Variant
from splash_workbench.errors import UserError
from splash_workbench.provenance import REPO_ROOT
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import PredictionRecord
from splash_workbench.trial_status import Status, compile_error
from splash_workbench.workers.pool import JOBS_PER_WORKER, CancelledError, Runner
from tuning.backends.jobs import Request
from tuning.selfcheck.records import Predicted, failure_text
from tuning.selfcheck.tasks import Task, topology_of
from tuning.validate.rows import MeasuredRow

#: Predictions of whole videos on record; where the package is installed there are none.
SHIPPED = REPO_ROOT / "results" / "predict.jsonl"
_KERNEL_JOB = "tuning.selfcheck.predictions:predict_kernel"
_ROW_JOB = "tuning.validate.job:predict_row"
_STAGE_JOB = "pipeline.predict.jobs:predict_model"
_STAGES = ("text", "denoise", "vae")


class Predictions:
    """Predictions of tasks, made in worker processes while the tasks run. Close it in the end."""

    def __init__(self, found: Mapping[str, Any], work_dir: Path, workers: int, timeout_s: float):
        self._found, self._timeout_s = found, timeout_s
        self._why_not = _why_not(found)
        self._runner = Runner(work_dir, jobs_per_worker=JOBS_PER_WORKER)
        self._pool = concurrent.futures.ThreadPoolExecutor(workers)
        self._made: dict[str, concurrent.futures.Future[Predicted]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runner.cancel()
        self._pool.shutdown(cancel_futures=True)

    def start(self, task: Task) -> None:
        """Begin to predict a task, unless a shipped prediction says all there is to say."""
        if task.op is None or self._why_not is not None:
            return
        shipped = self._shipped(task)
        if shipped is None or shipped.interval_ms is None:
            self._made[task.id] = self._pool.submit(self._make, task)

    def of(self, task: Task, deadline: float) -> Predicted:
        """Return the prediction of a task that was started, waiting until then (of `time.monotonic`) at most."""
        if self._why_not is not None:
            return Predicted(says=self._why_not)
        shipped, made = self._shipped(task), Predicted(says="not asked for")
        if task.id in self._made:
            try:
                made = self._made[task.id].result(max(0.0, deadline - time.monotonic()))
            except (TimeoutError, concurrent.futures.CancelledError):
                made = Predicted(says="not ready in the time that there was")
        return made if made.time_ms is not None or shipped is None else shipped

    def _make(self, task: Task) -> Predicted:
        device = devices.by_name(self._found["device_kind"])
        job, payload = _job_of(task, self._found)
        try:
            outcome = self._runner.run(
                job,
                payload,
                timeout_s=self._timeout_s,
                variables=lambda folder: offline_tpu.worker_environment(device, folder / "dump"),
            )
        except CancelledError:
            return Predicted(says="not ready in the time that there was")
        if outcome.status is not Status.OK:
            return Predicted(says=failure_text(f"{outcome.status}: {outcome.error}"))
        says, result = f"here, libtpu {offline_tpu.SUPPORTED_LIBTPU}", outcome.result
        if "unmade" in result:
            return Predicted(says=failure_text(result["unmade"]))
        if "predicted_ms" in result:
            time_ms, (low, high) = result["predicted_ms"], residuals.factors(device.name, result["shares"])
            return Predicted(time_ms=time_ms, interval_ms=(low * time_ms, high * time_ms), says=says)
        return _predicted(result["time_s"], result["interval_s"], says)

    def _shipped(self, task: Task) -> Predicted | None:
        """Return the prediction on record for the libtpu that predicts here, None without one."""
        version = libtpu.compiler_version()
        if task.part == "kernels":
            asked = task.payload
            blocks, variant = BlockSizes(**asked["block_sizes"]), Variant.from_dict(asked["options"])
            call = (AttentionShape(**asked["shape"]), blocks, variant)
            for entry in tuned.load(self._found["device_kind"], tuned.TUNED_DIR):
                if (entry.shape, entry.block_sizes, entry.variant) == call:
                    origin = entry.provenance
                    if (origin.label, origin.versions.get("libtpu")) == ("predicted", version):
                        return Predicted(time_ms=origin.time_ms, says=f"tuned entry of {origin.created_at[:10]}")
        if task.part in _STAGES:
            return _recorded(SHIPPED, task, topology_of(self._found), version)
        return None


def predict_kernel(payload: dict[str, Any]) -> dict[str, Any]:
    """Predict what `jobs.time_kernel` times on the chip. Payload: a Request, its device a known name."""
    request = jsonl.decode(payload, Request)
    grid_sizes, _ = request.found.assume(request.config, request.workload)
    device = devices.by_name(request.device)
    try:
        prediction = offline_tpu.predict(
            request.timed("pallas_tpu"), *request.arguments(), device=device, grid_sizes=grid_sizes
        )
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    return {"time_s": prediction.time_s, "interval_s": prediction.interval_s}


def _job_of(task: Task, found: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if task.part in _STAGES:
        wanted = {name: task.payload[name] for name in ("model", "stage")}
        return _STAGE_JOB, wanted | {"topology": topology_of(found), "hbm_bytes": found["hbm_bytes"]}
    if task.part == "kernels":
        return _KERNEL_JOB, task.payload | {"device": found["device_kind"]}
    row = msgspec.convert(task.payload["row"], MeasuredRow)
    return _ROW_JOB, {"call": row.call, "device": found["device_kind"], "kept": None}


def _predicted(time_s: float, interval_s: Sequence[float] | None, says: str) -> Predicted:
    interval_ms = (interval_s[0] * 1e3, interval_s[1] * 1e3) if interval_s else None
    return Predicted(time_ms=time_s * 1e3, interval_ms=interval_ms, says=says)


def _why_not(found: Mapping[str, Any]) -> str | None:
    """Return why nothing can be predicted for these devices on this host; None where it can."""
    if found["platform"] != "tpu":
        return "predictions are for TPUs"
    try:
        devices.by_name(found["device_kind"])
        libtpu.check_setup()
    except (ValueError, UserError) as error:
        return str(error)
    return None


def _recorded(path: Path, task: Task, topology: str | None, version: str | None) -> Predicted | None:
    """Return the newest prediction of `python -m pipeline.predict` for the call that a task has made."""
    for record in reversed(jsonl.read(path, PredictionRecord)):
        sizes = {name: record.request.get(name) for name in task.arguments}
        plan = msgspec.to_builtins(record.plan)
        stage = record.stages.get(task.part)
        same_plan = task.part != "denoise" or all(task.config.get(name) == value for name, value in plan.items())
        same_call = (record.topology, sizes, record.compiler_options) == (topology, task.arguments, {})
        if stage is None or not (same_call and same_plan):
            continue
        if record.environment.versions.get("libtpu") == version:
            program = stage.programs[-1] if task.part == "vae" else stage
            return _predicted(program.time_s, program.interval_s, f"record of {record.created_at[:10]}")
    return None
