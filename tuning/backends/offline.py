"""Compile for a device that is not here, and read the compiler's schedule."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

import offline_tpu
from offline_tpu import dump, libtpu
from offline_tpu.machine import devices
from offline_tpu.options import check_with_compiler
from splash_workbench.errors import from_config
from splash_workbench.files import require_writable
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status, compile_error
from splash_workbench.workers import stages
from tuning.backends import quick
from tuning.backends.base import Backend, Target, named_device
from tuning.backends.jobs import Request
from tuning.backends.numerics import check_numerics
from tuning.kernels.protocol import abstract, known_values

#: More than the dumps of one candidate take: two together took 93 MiB.
_DUMP_BYTES = 64 * 2**20


def _worker_env(target: Target, worker_dir: Path) -> Mapping[str, str]:
    assert target.spec is not None
    return offline_tpu.worker_environment(target.spec, worker_dir / "dump")


def _find_target(device: str) -> Target:
    offline_tpu.check_setup()  # once, before a candidate fails for it
    return named_device(device)


def _check_options(target: Target, options: Mapping[str, str]) -> None:
    assert target.spec is not None
    spec = target.spec
    from_config(lambda: check_with_compiler(spec, [options]))


OFFLINE = Backend(
    name="offline",
    job="tuning.backends.offline:predict_candidate",
    side_by_side="tuning.backends.side_by_side:predict",
    sources=(*offline_tpu.SOURCES, "tuning/backends/quick.py", "tuning/kernels/attention.py"),
    find_target=_find_target,
    worker_env=_worker_env,
    check_options=_check_options,
    capture=offline_tpu.capture,
    quick=True,
    scratch_bytes=_DUMP_BYTES,
)


def predict_candidate(payload: dict[str, Any]) -> dict[str, Any]:
    """Compile for the device that is not here, read the schedule, then check the numerics in interpret mode."""
    request = decode(payload, Request)
    kernel = request.found
    grid_sizes, assumptions = kernel.assume(request.config, request.workload)
    device = devices.by_name(request.device)
    # Outside of the try: what libtpu says against its own start is not the candidate's fault.
    libtpu.describe_topology(device.topology)
    require_writable("dumps", libtpu.find_dump_dir().parent, _DUMP_BYTES)  # a torn dump may be a shorter schedule
    fields: dict[str, Any]
    stages.enter("compile")
    try:
        found = quick.predict(request, device) if request.compiled != "whole" else None
        if isinstance(found, dict):
            fields = found
        elif found is not None:
            fields = _fields(found, kernel.op_name)
        else:
            prediction = offline_tpu.predict(
                request.timed("pallas_tpu"),
                *abstract(request.arguments()),
                device=device,
                grid_sizes=grid_sizes,
                slow_grid_sizes=kernel.assume_slow(request.config, request.workload),
                values=known_values(request.arguments()),
                compiler_options=request.options_of_compiler,
            )
            fields = _fields(prediction, kernel.op_name)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        if any(frame.f_globals["__name__"] == dump.__name__ for frame, _ in traceback.walk_tb(error.__traceback__)):
            raise  # a dump that a full disk tore
        raise compile_error(error) from error
    stages.enter("check")
    checked = check_numerics(request, "pallas_interpret")
    if checked["status"] != Status.OK:
        return checked
    notes = [*kernel.notes, *assumptions, *fields["notes"]]
    return checked | {"label": "predicted"} | fields | {"notes": notes}


def _fields(prediction: offline_tpu.Prediction, op_name: str) -> dict[str, Any]:
    """Return the fields of a Trial of a whole op; those of its kernels are left out where it has none."""
    kernel_ops = [op for op in prediction.matching(op_name) if op_name or op.category == "kernel"]
    assert kernel_ops or not op_name, f"no op named {op_name} in the prediction"
    whole = {
        "time_samples_ms": [prediction.time_s * 1e3],
        "slow_time_ms": prediction.slow_time_s * 1e3 if prediction.slow_time_s is not None else None,
        "peak_hbm_bytes": prediction.peak_hbm_bytes,
        "compile_time_s": prediction.compile_time_s,
        "ops": prediction.to_dict()["ops"],
        "compiled": "whole",
        "notes": [f"not known: {text}" for text in prediction.unresolved] if not op_name else [],
    }
    if not kernel_ops:
        return whole
    notes = []
    if loading_ms := sum(op.code_load_s * op.calls for op in kernel_ops) * 1e3:
        notes.append(f"the kernel's loop spans pieces of code, loaded anew in every trip: {loading_ms:.3f} ms counted")
    if any(op.resting_cores for op in kernel_ops):
        notes.append("one TensorCore of the chip runs the kernel, the other rests")
    if unresolved_count := sum(len(op.unresolved) - (op.code_load_s > 0) for op in kernel_ops):
        notes.append(f"{unresolved_count} spots of the kernel's schedule depend on data: see `ops`")
    return whole | {
        "kernel_time_ms": sum(op.time_s for op in kernel_ops) * 1e3,
        "cycles": sum(op.cycles * op.calls for op in kernel_ops),
        "vmem_bytes": max(op.vmem_bytes for op in kernel_ops),
        "spill_count": sum(op.spill_count * op.calls for op in kernel_ops),
        "fill_count": sum(op.fill_count * op.calls for op in kernel_ops),
        "code_bytes": sum(op.code_bytes for op in kernel_ops),
        "notes": [*whole["notes"], *notes],
    }
