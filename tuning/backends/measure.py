"""Run on the device that is here, and time it."""

import time
from typing import Any

import jax

from splash_attn.api import Implementation
from splash_workbench.errors import UserError
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status, compile_error
from splash_workbench.workers import stages
from tuning.backends import device_times
from tuning.backends.base import Backend, Target, probe
from tuning.backends.jobs import Request, normal_arguments
from tuning.backends.numerics import check_numerics
from tuning.kernels import Kernel
from tuning.trials.bound import known_device

#: In no op's name.
NO_OP = "\0"


def _find_target(device: str) -> Target:
    found = probe("backend=measure: JAX finds no device here")
    kind = found["device_kind"]
    spec = known_device(kind)
    here = Target(spec.name if spec else found["platform"], kind, spec)
    if device not in ("local", here.name):
        raise UserError(
            f"device={device} backend=measure: the device here is {kind!r}; expected device=local, or backend=offline."
        )
    return here


MEASURE = Backend(
    name="measure",
    job="tuning.backends.measure:measure_candidate",
    side_by_side="tuning.backends.side_by_side:measure",
    sources=("tuning/backends/device_times.py", "splash_workbench/profiles/reader.py", "tuning/kernels/attention.py"),
    find_target=_find_target,
    cacheable=False,
    exclusive=True,
)


def implementation_of(kernel: Kernel[Any, Any]) -> Implementation:
    """Return how a kernel runs on the first device that JAX finds here: as it is, or interpreted."""
    return "pallas_tpu" if jax.devices()[0].platform == kernel.platform else "pallas_interpret"


def measure_candidate(payload: dict[str, Any]) -> dict[str, Any]:
    """Check the numerics and time the op on the first device that JAX finds here."""
    request = decode(payload, Request)
    device = jax.devices()[0]
    kernel = request.found
    implementation = implementation_of(kernel)
    stages.enter("check")
    try:
        checked = check_numerics(request, implementation)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        if implementation == "pallas_interpret":
            raise
        raise compile_error(error) from error
    if checked["status"] != Status.OK:
        return checked
    arguments = normal_arguments(request.arguments())
    stages.enter("compile")
    start = time.perf_counter()
    try:
        lowered = jax.jit(request.timed(implementation)).lower(*arguments)
        compiled = lowered.compile(compiler_options={**request.options_of_compiler} or None)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise compile_error(error) from error
    compile_time_s = time.perf_counter() - start
    stages.enter("measure")
    try:
        timed = device_times.measure(
            lambda: compiled(*arguments), request.measure, platform=device.platform, kernel=kernel.op_name or NO_OP
        )
    except jax.errors.JaxRuntimeError as error:
        if device.platform == "cpu":
            raise  # the host's memory, and no fact about a device
        raise compile_error(error) from error
    notes = [*kernel.notes, *timed.notes]
    if implementation == "pallas_interpret":
        notes.insert(0, f"interpret mode on {device.platform}: compares nothing but this host with itself")
    return checked | {
        "label": "measured",
        "time_samples_ms": timed.times_ms,
        "kernel_time_ms": timed.kernel_time_ms,
        "compile_time_s": compile_time_s,
        "notes": notes,
    }
