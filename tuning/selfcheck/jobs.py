"""The jobs of the self-check's workers. Each finds the chip by name, so that a test can play one, and returns JSON."""

import os
import pkgutil
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
import numpy as np

import splash_attn
from offline_tpu.machine import devices
from splash_attn.types import AttentionShape
from splash_workbench import provenance
from splash_workbench.program import Program
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status, TrialError, compile_error
from splash_workbench.workers.room import available_memory_bytes
from tuning.backends import numerics
from tuning.backends.jobs import Request
from tuning.selfcheck.chip import Chip, Prepared, chip_named
from tuning.validate import programs
from tuning.validate.rows import MeasuredRow

#: Rows of q whose results are compared with the reference: the last of a sequence, and others spread over it.
_LAST_ROWS, _SPREAD_ROWS = 8, 24
_PACKAGES = (*provenance.COMPILER_PACKAGES, "numpy", "torch", "torchax", "diffusers", "transformers", "tokamax")


def environment(payload: dict[str, Any]) -> dict[str, Any]:
    """Describe chips, memory, disk and versions. Nothing in it names the machine or its user."""
    chip = chip_named(payload["chip"])
    captured = provenance.capture(("tuning/selfcheck/*.py",), _PACKAGES)
    coordinates = [tuple(getattr(device, "coords", ())) for device in chip.devices]
    sizes = [1 + max(axis) - min(axis) for axis in zip(*coordinates, strict=True)]
    stats = chip.memory_stats()
    return {
        "platform": chip.platform,
        "device_kind": chip.device_kind,
        "num_devices": len(chip.devices),
        "num_processes": jax.process_count(),
        "topology": "x".join(map(str, sizes)) or None,
        "hbm_bytes": stats.get("bytes_limit"),
        "hbm_free_bytes": stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None,
        "memory_free_bytes": available_memory_bytes(),
        "disk_free_bytes": shutil.disk_usage(os.curdir).free,
        "runtime": chip.devices[0].client.platform_version,
        **msgspec.to_builtins(captured),
    }


def check_kernel(payload: dict[str, Any]) -> dict[str, Any]:
    """Compare the kernel with float64 at lengths that no block divides. Payload: chip and a Request."""
    chip, request = chip_named(payload["chip"]), decode(payload, Request)
    try:
        found = numerics.check(request, chip.checked, request.function(chip.checked))
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    limits = f"rms {found.tolerance:.2e}, worst row {found.row_tolerance:.2e}"
    says = f"rms {found.rms_error:.2e}, worst row {found.max_row_error:.2e} (limits: {limits})"
    if not found.passed:
        raise TrialError(Status.WRONG, says)
    return {"says": says}


def time_kernel(payload: dict[str, Any]) -> dict[str, Any]:
    """Time attention from the projections on, and compare rows of its result. Payload: chip and a Request."""
    chip, request = chip_named(payload["chip"]), decode(payload, Request)
    program = Program(jax.jit(request.timed(chip.timed)), tuple(request.arguments()))
    shape, (limit, _) = request.workload.shape, request.found.limits(request.config, request.workload)

    def check(prepared: Prepared) -> None:
        error = _rows_error(prepared, shape)
        if not error <= limit:
            raise TrialError(Status.WRONG, f"rms error {error:.2e} over rows of the result (limit {limit:.2e})")

    return _timed(chip, program, request.found.op_name, check)


def time_row(payload: dict[str, Any]) -> dict[str, Any]:
    """Time the program of a row of the validation sets. Payload: chip, and the row as `row`."""
    chip = chip_named(payload["chip"])
    row = msgspec.convert(payload["row"], MeasuredRow)
    try:
        made = programs.build(row, devices.by_name(row.device_kind))
    except programs.CannotMakeError as error:
        raise TrialError(Status.COMPILE_ERROR, str(error)) from error
    jitted = jax.jit(made.fn, compiler_options=dict(made.compiler_options) or None)
    return _timed(chip, Program(jitted, made.args))


def time_stage(payload: dict[str, Any]) -> dict[str, Any]:
    """Time one call of a stage of a model with random weights. Payload: chip, model, stage, and how to make it.

    `make` is "package.module:function" as `pipeline.stages.programs.model_program`: this package imports no pipeline.
    """
    chip = chip_named(payload["chip"])
    make = pkgutil.resolve_name(payload["make"])
    made = make(payload["model"], payload["stage"], chip.devices, chip.hbm_bytes)
    return {"arguments": made.arguments, "config": made.config} | _timed(chip, made.program, check=_check_finite)


def _timed(chip: Chip, program: Program, kernel: str = "", check: Any = None) -> dict[str, Any]:
    """Compile, check and time. A program that the chip cannot take ends in a TrialError that says why."""
    try:
        prepared = chip.prepare(program)
        if check is not None:
            check(prepared)
        found = chip.time(prepared.run, kernel)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    return {"times_ms": found.times_ms, "kernel_time_ms": found.kernel_time_ms, "notes": found.notes}


def _rows_error(prepared: Prepared, shape: AttentionShape) -> float:
    """Return ||actual - expected|| / ||expected|| over some rows of q, of all heads."""
    length = shape.q_seq_len
    last = range(max(0, length - _LAST_ROWS), length)
    rows = np.unique([*np.linspace(0, length - 1, _SPREAD_ROWS, dtype=int), *last])

    def by_head(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], shape.num_heads, -1).swapaxes(1, 2)

    q, k, v = prepared.arguments
    actual = np.asarray(by_head(prepared.run()[:, rows])).astype(np.float64)
    expected = splash_attn.attention_reference(by_head(q[:, rows]), by_head(k), by_head(v), dtype=np.float64)
    return float(np.linalg.norm(actual - np.asarray(expected)) / np.linalg.norm(expected))


def _check_finite(prepared: Prepared) -> None:
    """Raise TrialError where a result has NaN or infinity."""
    results = jax.tree.leaves(prepared.run())
    if not all(bool(jnp.isfinite(x).all()) for x in results if jnp.issubdtype(x.dtype, jnp.floating)):
        raise TrialError(Status.WRONG, "the result has NaN or infinity")
