"""Time the winner of a sweep, the default configuration and what else computes the same, in one process.

Candidates are timed minutes apart, on a device that may change its clock meanwhile; these in turn, several times over.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

import offline_tpu
from offline_tpu.machine import devices
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Label
from splash_workbench.workers import stages
from tuning.backends import device_times
from tuning.backends.jobs import Request, normal_arguments
from tuning.backends.measure import NO_OP
from tuning.backends.numerics import check
from tuning.kernels.protocol import abstract, known_values
from tuning.trials.contenders import Contender

#: How often the turn comes to each. A device that warms up or throttles does so to all of them.
ROUNDS = 5


class _Way(NamedTuple):
    """One way to compute the op: its function on the device, and the compiler's flags."""

    name: str
    config: str
    function: Callable[..., Any]
    options: Mapping[str, str]
    is_baseline: bool


def measure(payload: dict[str, Any]) -> dict[str, Any]:
    """Time all ways on the first device that JAX finds here, in turn. Payload: the winner's Request; `default`."""
    request = decode(payload, Request)
    platform = jax.devices()[0].platform
    if platform != request.found.platform:
        return {"contenders": []}  # interpreted: the times compare nothing
    arguments = normal_arguments(request.arguments())
    runs: dict[str, Callable[[], Any]] = {}
    rivals: dict[str, Contender] = {}
    for way in _ways(request, payload["default"]):
        stages.enter(f"compile {way.name}")
        rivals[way.name] = Contender(way.name, way.config, Label.MEASURED)
        try:
            _require_right(request, way)
            lowered = jax.jit(way.function).lower(*arguments)
            compiled = lowered.compile(compiler_options=dict(way.options) or None)
            runs[way.name] = functools.partial(compiled, *arguments)
            jax.block_until_ready(runs[way.name]())
        except Exception as error:  # a library that is not for this device costs only its own line
            runs.pop(way.name, None)
            rivals[way.name] = dataclasses.replace(rivals[way.name], error=_line(error))
    for turn in range(ROUNDS):
        for name, run in runs.items():
            stages.enter(f"round {turn + 1} of {ROUNDS}")
            found = device_times.measure(run, request.measure, platform=platform, kernel=NO_OP)
            before = rivals[name]
            rivals[name] = dataclasses.replace(
                before,
                time_samples_ms=(*before.time_samples_ms, *found.times_ms),
                notes=tuple(dict.fromkeys((*before.notes, *found.notes))),
            )
    return {"contenders": [dataclasses.asdict(rival) for rival in rivals.values()]}


def predict(payload: dict[str, Any]) -> dict[str, Any]:
    """Predict the baselines for a device that is not here. Payload: as of `measure`."""
    request = decode(payload, Request)
    rivals = []
    for way in _ways(request, payload["default"]):
        if not way.is_baseline:
            continue  # it was compiled as a candidate
        stages.enter(f"compile {way.name}")
        rival = Contender(way.name, way.config, Label.PREDICTED)
        try:
            _require_right(request, way)
            prediction = offline_tpu.predict(
                way.function,
                *abstract(request.arguments()),
                device=devices.by_name(request.device),
                values=known_values(request.arguments()),
                compiler_options=way.options,
            )
            rival = dataclasses.replace(rival, time_samples_ms=(prediction.time_s * 1e3,))
        except Exception as error:  # likewise
            rival = dataclasses.replace(rival, error=_line(error))
        rivals.append(dataclasses.asdict(rival))
    return {"contenders": rivals}


def _ways(request: Request, default: Mapping[str, Any]) -> Iterator[_Way]:
    for name, options in {"winner": request.options, "default": dict(default)}.items():
        if name == "winner" or options != request.options:
            of = dataclasses.replace(request, options=options)
            shown = " ".join(f"{key}={value}" for key, value in options.items())
            yield _Way(name, shown, of.function("pallas_tpu"), of.options_of_compiler, False)
    for name, function in request.found.baselines().items():
        yield _Way(name, "", function, request.compiler_options, True)


def _require_right(request: Request, way: _Way) -> None:
    """Raise ValueError for a baseline that computes something else; candidates were checked in the sweep."""
    if way.is_baseline:
        is_here = jax.devices()[0].platform == request.found.platform
        found = check(request, "xla", way.function if is_here else request.found.on_cpu(way.function))
        if not found.passed:
            raise ValueError(f"wrong: rms_error={found.rms_error:.2e} (limit {found.tolerance:.2e})")


def _line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
