"""Check a candidate: the same tunables on a small workload, against the reference."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from splash_attn.api import Implementation
from splash_workbench.files import atomic_path
from splash_workbench.provenance import COMPILER_PACKAGES, package_versions, source_hash, stable_hash
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status, compile_error
from tuning.backends.jobs import Request
from tuning.kernels import coverage
from tuning.kernels.attention import AttentionKernel
from tuning.kernels.protocol import abstract
from tuning.trials.records import Numerics

_SOURCES = ("tuning/backends/numerics.py", "tuning/kernels/*.py", "splash_attn/reference.py")
#: XLA computes the same without its optimisations, and an interpreted kernel is a long program that runs once. The
#: older emitters compile it in two thirds of the CPU seconds.
_CPU_OPTIONS: Any = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def check_numerics(request: Request, implementation: Implementation) -> dict[str, Any]:
    """Check the candidate against the reference. Return status, numerics and, where it is wrong, an error.

    Of a user's kernel also that it writes all of its results at the sizes of the workload, which the reference may not
    have been compared at. Raises TrialError where it cannot be traced at these.
    """
    config, _ = request.checked()
    if not isinstance(request.found, AttentionKernel) and (partly := _unwritten(request, implementation)):
        sizes = ", ".join(f"{name}={value}" for name, value in request.sizes.items())
        return {"status": Status.WRONG, "error": f"writes only {'; '.join(partly)} ({sizes})"}
    found = check_once(request, implementation, request.function(implementation, config))
    fields = {"numerics": dataclasses.asdict(found)}
    if found.passed:
        return fields | {"status": Status.OK}
    error = (
        f"rms_error={found.rms_error:.2e} (limit {found.tolerance:.2e}), "
        f"max_row_error={found.max_row_error:.2e} (limit {found.row_tolerance:.2e})"
    )
    return fields | {"status": Status.WRONG, "error": error}


def _unwritten(request: Request, implementation: Implementation) -> list[str]:
    try:
        traced = jax.make_jaxpr(request.function(implementation))(*abstract(request.arguments()))
    except (ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    return coverage.unwritten(traced)


def check_path(request: Request, implementation: Implementation) -> Path:
    """Return where a check is kept, named by everything that its outcome depends on."""
    config, workload = request.checked()
    shown = repr(config)
    if implementation == "pallas_interpret" and isinstance(request.found, AttentionKernel):
        # What only the TPU compiler sees changes nothing here: such candidates share one check.
        options = [pair for pair in config.options if pair[0] not in request.found.compile_only]
        shown = repr((config.block_sizes, options))
    call = [request.kernel, request.kernel_hash, repr(workload), shown, implementation]
    return Path(request.cache_dir) / f"{stable_hash(json.dumps([*call, _checker()], sort_keys=True))}.json"


@functools.cache
def _checker() -> str:
    """Return what a check depends on besides the candidate: this file, the reference, versions."""
    return json.dumps([source_hash(_SOURCES), package_versions(COMPILER_PACKAGES)], sort_keys=True)


def check_once(request: Request, implementation: Implementation, function: Callable[..., Any]) -> Numerics:
    """Return the check from the cache, or made now and put there if that can be written."""
    path = check_path(request, implementation)
    with contextlib.suppress(OSError, ValueError, RecursionError):  # absent, torn by a full disk, or not ours
        found = decode(json.loads(path.read_bytes()), Numerics)
        ran = {"implementation": implementation} | _about(request)
        negative = min(found.rms_error, found.max_row_error, found.max_abs_error) < 0
        if all(getattr(found, name) == value for name, value in ran.items()) and not negative:
            return found
    numerics = check(request, implementation, function)
    with contextlib.suppress(OSError), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(numerics)))
    return numerics


def _about(request: Request) -> dict[str, Any]:
    """Return the fields of a check that say what ran."""
    config, workload = request.checked()
    tolerance, row_tolerance = request.found.limits(config, request.workload)
    limits = {"tolerance": tolerance, "row_tolerance": row_tolerance}
    if not isinstance(request.found, AttentionKernel):
        return limits | {"config": str(config), "sizes": str(workload)}
    lengths = {name: getattr(workload.shape, name) for name in ("q_seq_len", "kv_seq_len", "num_heads")}
    return limits | lengths | {"block_sizes": str(config.block_sizes)}


def check(request: Request, implementation: Implementation, function: Callable[..., Any]) -> Numerics:
    """Run `function` on the kernel's inputs for a check, and compare with its reference."""
    arguments = request.found.inputs(request.checked()[1])
    # On the device the program that will be timed; a CPU takes no flags of libtpu.
    options: Any = _CPU_OPTIONS if jax.devices()[0].platform == "cpu" else request.options_of_compiler or None
    actual_tree = jax.jit(function).lower(*arguments).compile(compiler_options=options)(*arguments)
    expected_tree = request.found.reference(*arguments)
    actual_leaves, expected_leaves = jax.tree.leaves(actual_tree), jax.tree.leaves(expected_tree)
    if len(actual_leaves) != len(expected_leaves):
        raise ValueError(f"{len(actual_leaves)} results: expected {len(expected_leaves)}, as the reference returns.")
    errors = [_errors(*pair) for pair in zip(actual_leaves, expected_leaves, strict=True)]
    worst = [float(np.max(column)) for column in zip(*errors, strict=True)]  # np.max keeps NaN
    return Numerics(
        implementation=implementation,
        rms_error=worst[0],
        max_row_error=worst[1],
        max_abs_error=worst[2],
        **_about(request),
    )


def _errors(actual_array: Any, expected_array: Any) -> tuple[float, float, float]:
    """Return the relative error over all of a result, that of its worst row, and the largest difference."""
    actual = np.asarray(actual_array).astype(np.float32)
    expected = np.asarray(expected_array).astype(np.float32)
    if actual.shape != expected.shape:
        raise ValueError(f"output shape {actual.shape}: expected {expected.shape}.")
    difference = actual - expected
    norm = float(np.linalg.norm(expected))
    row_count = max(1, expected.size // max(1, expected.shape[-1] if expected.ndim else 1))
    least = max(norm / row_count**0.5, 1e-30) * 1e-3  # a row of nearly nothing is compared with the others
    rows = np.linalg.norm(np.atleast_1d(difference), axis=-1)
    row_norms = np.maximum(np.linalg.norm(np.atleast_1d(expected), axis=-1), least)
    total = float(np.linalg.norm(difference) / max(norm, 1e-30))
    return total, float((rows / row_norms).max(initial=0.0)), float(np.abs(difference).max(initial=0.0))
