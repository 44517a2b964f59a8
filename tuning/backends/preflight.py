"""Look at a user's kernel before its sweep: what is wrong with it is one line, and no trial."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

import offline_tpu
from offline_tpu.machine import devices
from splash_workbench.errors import OF_USERS_CODE, line_of
from splash_workbench.records.jsonl import decode
from splash_workbench.trial_status import Status, TrialError
from splash_workbench.workers import stages
from tuning.backends.jobs import Request
from tuning.backends.measure import implementation_of
from tuning.backends.numerics import check_numerics
from tuning.kernels import loading
from tuning.kernels.protocol import Unrolled, abstract

#: Of objects in the text of a traced program: another one each time.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def look(payload: dict[str, Any]) -> dict[str, Any]:
    """Check the default configuration against the reference, and that each tunable changes something.

    Payload: the Request of the default configuration; `space`, the values of each tunable; `traces`, whether programs
    can be traced for the device; `device_checks`, whether the device is here, so that the check runs on it. Raises
    TrialError with one line for the user.
    """
    stages.enter("look at the kernel")
    request = decode(payload, Request)
    name = request.found.name
    try:
        arguments = abstract(request.found.arguments(request.workload))
    except OF_USERS_CODE as error:
        raise _refusal(request, f"{name}.arguments", error) from error
    for position, x in enumerate(arguments):
        if min(x.shape, default=1) < 1:
            raise _wrong(
                f"{name}.arguments({request.workload}): the one at {position} is {x.dtype}{list(x.shape)}, expected "
                "sizes of 1 or more."
            )
    on_device = payload["device_checks"]
    implementation = implementation_of(request.found) if on_device else "pallas_interpret"
    stages.enter("reference")
    expected = _shapes(request, f"{name}.reference", request.found.reference, arguments)
    if not expected:
        raise _wrong(f"{name}.reference returns no array: expected what build makes returns.")
    stages.enter("build")
    _look_at_what_it_says(request)
    _refuse_what_cannot_be_called(request)
    actual = _shapes(request, f"{name}.build", lambda *x: request.function(implementation)(*x), arguments)
    if expected != actual:
        ours, theirs = (" and ".join(shapes) or "nothing" for shapes in (actual, expected))
        raise _wrong(f"{name}: what build makes returns {ours}, and the reference {theirs}.")
    if request.found.platform == "tpu" or on_device:
        for title, baseline in _baselines(request).items():
            try:
                jax.eval_shape(baseline, *arguments)
            except NotImplementedError:
                continue  # not for this device, which is said beside the winner
            except OF_USERS_CODE as error:
                raise _refusal(request, f"{name}.baselines: {title}", error) from error
    if payload["traces"]:
        stages.enter("trace")
        for tunable, values in payload["space"].items():
            _refuse_idle(request, tunable, values)
    stages.enter("check")
    try:
        checked = check_numerics(request, implementation)
    except OF_USERS_CODE as error:
        raise _refusal(request, f"{name} on this machine's {'device' if on_device else 'CPU'}", error) from error
    if checked["status"] != Status.OK:
        how = "disagrees with the reference: " if "numerics" in checked else ""
        raise _wrong(f"{name}: the default configuration {request.config} {how}{checked['error']}.")
    return {}


def _wrong(text: str) -> TrialError:
    return TrialError(Status.WRONG, text)


def _refusal(request: Request, what: str, error: BaseException) -> TrialError:
    if isinstance(error, TrialError) and error.__cause__ is not None:
        error = error.__cause__  # see Request.function
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    path = loading.file_of(request.kernel)
    at = f"{line_of(error, path)}: " if path is not None else ""
    return _wrong(f"{at}{what}: {type(error).__name__}: {lines[0]}")


def _look_at_what_it_says(request: Request) -> None:
    """Refuse what `unrolled` and `assume` must not return: every candidate would end by it."""
    found, about = request.found, (request.config, request.workload)
    for method, is_right, expected in (
        (found.unrolled, lambda x: x is None or isinstance(x, Unrolled), "an Unrolled, or None"),
        (
            found.assume,
            lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], Mapping),
            "grid sizes, notes",
        ),
        (found.assume_slow, lambda x: isinstance(x, Mapping), "grid sizes by name of the kernel"),
    ):
        what = f"{found.name}.{method.__name__}"
        try:
            said = method(*about)
        except OF_USERS_CODE as error:
            raise _refusal(request, what, error) from error
        if not is_right(said):
            raise _wrong(f"{what}({request.config}, {request.workload}) returns {said!r}: expected {expected}.")
    _look_at_shorter(request)


def _look_at_shorter(request: Request) -> None:
    unrolled, what = request.found.unrolled, f"{request.found.name}.unrolled"
    said = unrolled(request.config, request.workload)
    if said is None or said.shorter is None:
        return
    try:
        short = unrolled(said.shorter, request.workload)
    except OF_USERS_CODE as error:
        raise _refusal(request, f"{what}, of its `shorter` configuration", error) from error
    if not isinstance(short, Unrolled) or not 0 < short.length < said.length:
        raise _wrong(
            f"{what}({said.shorter}, {request.workload}) returns {short!r}: expected a length below {said.length}."
        )


def _baselines(request: Request) -> Mapping[str, Callable[..., Any]]:
    what = f"{request.found.name}.baselines"
    try:
        found = request.found.baselines()
    except OF_USERS_CODE as error:
        raise _refusal(request, what, error) from error
    if not isinstance(found, Mapping):
        raise _wrong(f"{what}() returns {found!r}: expected functions by name.")
    return found


def _shapes(request: Request, what: str, function: Any, arguments: list[Any]) -> list[str]:
    try:
        found = jax.eval_shape(function, *arguments)
    except OF_USERS_CODE as error:
        raise _refusal(request, what, error) from error
    return [f"{list(x.shape)}" for x in jax.tree.leaves(found)]


def _refuse_what_cannot_be_called(request: Request) -> None:
    try:
        built = request.found.build(request.config)
    except OF_USERS_CODE:
        return  # told where it is called, with its line
    if not callable(built):
        called = f"{request.found.name}.build({request.config})"
        raise _wrong(f"{called} returns {built!r}: expected a function of the arguments.")


def _refuse_idle(request: Request, tunable: str, values: list[Any]) -> None:
    """Raise TrialError for a tunable with whose values the program stays the same."""
    seen, traced = set(), []
    for value in values:
        try:
            config = request.found.config_of(None, request.options | {tunable: value})
            verdict = request.found.is_valid(config, request.workload)
            if isinstance(verdict, str) or not verdict:
                continue
            text = _program(request, config)
        except OF_USERS_CODE:
            continue  # what cannot be traced is a trial of its own
        seen.add((text, str(request.found.compiler_options(config))))
        traced.append(value)
        if len(seen) > 1:
            return
    if len(traced) > 1:
        listed = ", ".join(map(str, traced))
        raise _wrong(
            f"{request.found.name}.Config.{tunable} changes nothing: JAX traces the same program for {listed}; use it "
            "in build, or leave it out."
        )


def _program(request: Request, config: Any) -> str:
    function = request.timed("pallas_tpu", config)
    arguments = abstract(request.arguments())
    if request.found.platform == "tpu" and request.device in devices.DEVICES:
        traced = offline_tpu.trace(function, *arguments, device=devices.by_name(request.device))
    else:
        traced = jax.make_jaxpr(function)(*arguments)
    return _ADDRESS.sub("", str(traced))
