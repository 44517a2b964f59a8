"""Predict a candidate by compiling less than all of it.

Of the op only the Pallas kernels that run are compiled. The rest of the op, which is the same for all candidates around
whose kernels JAX traces the same program, is compiled once. A kernel that says in which dimension its code is unrolled
is compiled at a shorter length, and what it takes more is extrapolated at the pace of the middle of that.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.extend import core

import offline_tpu
from offline_tpu.dump import UNKNOWN_TRIPS
from offline_tpu.machine.constants import FittedConstants
from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.prediction import Prediction
from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path, locked
from splash_workbench.provenance import COMPILER_PACKAGES, package_versions, source_hash, stable_hash
from splash_workbench.records.jsonl import decode
from tuning.backends.jobs import Request
from tuning.kernels.protocol import abstract, known_values

#: Of a dynamic grid size: its steps, one as long as the other, are counted one by one, which takes time. What a
#: kernel's start costs is multiplied with them: 3 us for each left out, for all candidates alike (predicted).
_FEW = 2
#: How long to wait for another worker to compile the same.
_PATIENCE_S = 120.0
#: The part of its time by which a kernel alone may differ from the same in the op.
_SAME = 0.02
_SOURCES = (*offline_tpu.SOURCES, "tuning/backends/quick.py", "tuning/kernels/*.py")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What kernels cost, or the op around them. Times in ms, of a call of the op.

    unknown_trips: integers that are not known decide how often a kernel's loops run. apart_ms: of the rest, by how much
    the time of the kernels alone differs from that in the op, for one of their steps; small operands that the op keeps
    in VMEM come from HBM alone.
    """

    time_ms: float
    cycles: int = 0
    steady_cycles: float = 0.0
    vmem_bytes: int = 0
    spill_count: int = 0
    fill_count: int = 0
    code_bytes: int = 0
    compile_time_s: float = 0.0
    code_load_ms: float = 0.0
    unknown_trips: bool = False
    apart_ms: float = 0.0


def predict(request: Request, device: DeviceSpec) -> dict[str, Any] | Prediction | None:
    """Return the fields of a Trial by a first pass, or the prediction of the whole op where that had to be compiled.

    None where nothing less than the whole op tells its time: among others, where a kernel alone takes another.
    """
    if known_values(request.arguments()):
        return None  # what a kernel does depends on integers that the op around it computes
    config, short = request.config, None
    unrolled = request.found.unrolled(config, request.workload)
    if request.compiled == "shorter" and unrolled and unrolled.shorter is not None:
        short = request.found.unrolled(unrolled.shorter, request.workload)
        if short is not None and 0 < short.length < unrolled.length:
            config = unrolled.shorter
        else:  # the preflight refuses this of the default configuration
            short = None
    op = _Op(request, config, device)
    if _read(op.rest_path) is None and not op.kernels:
        return None
    cost = op.kernel_cost()
    if short and not cost.steady_cycles:
        return None  # no work of which to tell the pace
    with _one_at_a_time(op.rest_path):
        rest = _read(op.rest_path)
        if rest is None:
            least = _Op(request, unrolled.least, device) if unrolled and unrolled.least is not None else op
            if least.around != op.around:
                least = op
            is_candidate = least is op and short is None
            whole, rest = least.compile_whole(few=not is_candidate)
            _keep(op.rest_path, rest)
            if is_candidate:
                return whole
    if cost.unknown_trips:
        return None
    steps = unrolled.steps if unrolled else 1
    fields = {
        "time_samples_ms": [rest.time_ms + cost.time_ms],
        "kernel_time_ms": cost.time_ms,
        **{name: getattr(cost, name) for name in ("cycles", "vmem_bytes", "spill_count", "fill_count", "code_bytes")},
        "compile_time_s": rest.compile_time_s + cost.compile_time_s,
        "compiled": "kernel",
        "notes": [],
    }
    if unrolled and short:
        growth = unrolled.length / short.length - 1
        cycles = steps * (cost.cycles + growth * cost.steady_cycles) / short.steps
        issue_hz = FittedConstants.of(device).issue_hz(device)
        # What a step waits for memory beside its work does not grow with it.
        waits_ms = (cost.time_ms - cost.cycles / issue_hz * 1e3) / short.steps
        time_ms = cycles / issue_hz * 1e3 + steps * max(0.0, waits_ms)
        fields |= {"time_samples_ms": [rest.time_ms + time_ms], "kernel_time_ms": time_ms, "cycles": round(cycles)}
        fields |= {"compiled": "shorter", **dict.fromkeys(("vmem_bytes", "spill_count", "fill_count", "code_bytes"))}
    elif cost.code_load_ms:
        loaded = f"loaded anew in every trip: {cost.code_load_ms:.3f} ms counted"
        fields["notes"] = [f"the kernel's loop spans pieces of code, {loaded}"]
    return None if steps * rest.apart_ms > _SAME * fields["kernel_time_ms"] else fields


class _Op:
    """The traced op of a configuration, and the Pallas kernels in it that run."""

    def __init__(self, request: Request, config: Any, device: DeviceSpec) -> None:
        self._request, self._config, self._device = request, config, device
        self._function = request.timed("pallas_tpu", config)
        self._grid_sizes, _ = request.found.assume(config, request.workload)
        self._arguments = abstract(request.arguments())

    @functools.cached_property
    def _traced(self) -> core.ClosedJaxpr:
        return offline_tpu.trace(self._function, *self._arguments, device=self._device)

    @functools.cached_property
    def kernels(self) -> list[core.JaxprEqn]:
        """The calls of kernels that run, once each."""
        found = _kernel_calls(self._traced.jaxpr)
        return [call for call in found if self._grid_sizes.get(_name(call)) != 0]

    def kernel_cost(self) -> Cost:
        """Return what the kernels cost alone, from the cache or compiled now."""

        def cost() -> Cost:
            return _sum([self._alone(call) for call in self.kernels], [self._repeats(call) for call in self.kernels])

        path = self._path("kernel", repr(self._config))
        found = _read(path)
        if found is None:
            found = cost()
            _keep(path, found)
        return found

    @property
    def _few_sizes(self) -> dict[str, int]:
        return {name: min(size, _FEW) for name, size in self._grid_sizes.items()}

    def _repeats(self, call: core.JaxprEqn) -> float:
        """Return how often what is predicted of a kernel runs: of a grid size that data decide, a few are enough."""
        return max(1.0, self._grid_sizes.get(_name(call), 0) / _FEW)

    @property
    def rest_path(self) -> Path:
        """Return where is kept what ops cost around their kernels that have the same around them."""
        return self._path("rest", self.around)

    @functools.cached_property
    def around(self) -> str:
        """The hash of the program around the kernels, from the cache or of a trace."""
        path = self._path("around", repr(self._config))
        with contextlib.suppress(OSError, ValueError):
            if len(found := path.read_text()) == len(stable_hash("")):
                return found
        found = stable_hash(_outline(self._traced.jaxpr))
        with contextlib.suppress(OSError), atomic_path(path) as temporary:
            temporary.write_text(found)
        return found

    def compile_whole(self, *, few: bool) -> tuple[Prediction, Cost]:
        """Return the prediction of the op, and what it costs around its kernels.

        few: of grid sizes that data decide, a few are enough: the prediction is not of the whole call.
        """
        sizes = self._few_sizes if few else self._grid_sizes
        slow = {} if few else self._request.found.assume_slow(self._config, self._request.workload)
        prediction = self._predict(self._function, *self._arguments, grid_sizes=sizes, slow_grid_sizes=slow)
        rest = [op for op in prediction.ops if op.category != "kernel"]
        # What the fallbacks cost that have nothing to do is part of the rest.
        rest += [op for op in prediction.ops if op.category == "kernel" and not self._runs(op.name)]
        rest_ms = sum(op.time_s for op in rest) * 1e3
        inside_ms = prediction.time_s * 1e3 - rest_ms
        repeats = max(map(self._repeats, self.kernels)) if few else 1.0
        alone_ms = self.kernel_cost().time_ms / repeats
        unrolled = self._request.found.unrolled(self._config, self._request.workload)
        apart_ms = abs(alone_ms - inside_ms) * repeats / (unrolled.steps if unrolled else 1)
        return prediction, Cost(rest_ms, compile_time_s=prediction.compile_time_s, apart_ms=apart_ms)

    def _alone(self, call: core.JaxprEqn) -> Prediction:
        def kernel(*operands: Any) -> Any:
            return call.primitive.bind(*operands, **call.params)

        kernel.__name__ = _name(call)  # the compiler names the op so
        operands = [jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in call.invars]  # type: ignore[attr-defined]
        # What surrounds the kernel in the op gives it these layouts. Copies to them would be compiled here once more,
        # and of int8 they take longer than a short kernel.
        return self._predict(kernel, *operands, grid_sizes=self._few_sizes, auto_layouts=True)

    def _runs(self, op_name: str) -> bool:
        return any(op_name.rsplit(".", 1)[0] == _name(call) for call in self.kernels)

    def _predict(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        grid_sizes: Mapping[str, int],
        slow_grid_sizes: Mapping[str, int] | None = None,
        auto_layouts: bool = False,
    ) -> Prediction:
        return offline_tpu.predict(
            function,
            *arguments,
            device=self._device,
            grid_sizes=grid_sizes,
            slow_grid_sizes=slow_grid_sizes,
            compiler_options=self._request.options_of_compiler,
            auto_layouts=auto_layouts,
        )

    def _path(self, what: str, about: str) -> Path:
        request = self._request
        key = [what, request.kernel, request.kernel_hash, repr(request.workload), request.device, _versions()]
        key += [about, json.dumps(request.options_of_compiler, sort_keys=True)]
        return Path(request.cache_dir) / f"{what}-{stable_hash(json.dumps(key))}.json"


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Wait until no other worker makes what will be at `path`: the first candidates all need the same.

    Where no lock can be had, as in a cache that cannot be written or while another worker hangs, each makes its own.
    """
    with contextlib.ExitStack() as stack:
        end = time.monotonic() + _PATIENCE_S
        with contextlib.suppress(OSError):
            while time.monotonic() < end:
                try:
                    stack.enter_context(locked(path.with_suffix(".lock"), "another worker compiles the same"))
                    break
                except UserError:
                    time.sleep(0.1)
        yield


def _read(path: Path) -> Cost | None:
    with contextlib.suppress(OSError, ValueError, RecursionError):  # absent, torn by a full disk, or not ours
        found = decode(json.loads(path.read_bytes()), Cost)
        if found.time_ms >= 0:
            return dataclasses.replace(found, compile_time_s=0.0)
    return None


def _keep(path: Path, cost: Cost) -> None:
    with contextlib.suppress(OSError), atomic_path(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(cost)))


@functools.cache
def _versions() -> str:
    return json.dumps([source_hash(_SOURCES), package_versions(COMPILER_PACKAGES)], sort_keys=True)


def _name(call: core.JaxprEqn) -> str:
    return str(call.params.get("name") or "kernel")


def _sum(predictions: list[Prediction], repeats: list[float]) -> Cost:
    kernels = zip(predictions, repeats, strict=True)
    ops = [
        (op, op.calls * repeat) for prediction, repeat in kernels for op in prediction.ops if op.category == "kernel"
    ]
    return Cost(
        time_ms=sum(op.time_s * runs / op.calls for op, runs in ops) * 1e3,
        cycles=round(sum(op.cycles * runs for op, runs in ops)),
        steady_cycles=sum(op.steady_cycles * runs for op, runs in ops),
        vmem_bytes=max((op.vmem_bytes for op, _ in ops), default=0),
        spill_count=round(sum(op.spill_count * runs for op, runs in ops)),
        fill_count=round(sum(op.fill_count * runs for op, runs in ops)),
        code_bytes=sum(op.code_bytes for op, _ in ops),
        compile_time_s=sum(prediction.compile_time_s for prediction in predictions),
        code_load_ms=sum(op.code_load_s * runs for op, runs in ops) * 1e3,
        unknown_trips=any(UNKNOWN_TRIPS in op.unresolved for op, _ in ops),
    )


def _jaxprs(params: Mapping[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _kernel_calls(jaxpr: core.Jaxpr) -> list[core.JaxprEqn]:
    """Return the calls of Pallas kernels of a program; none where one is in a loop or a branch, and may run often."""
    found: list[core.JaxprEqn] = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            found.append(eqn)
            continue
        inner = [call for body in _jaxprs(eqn.params) for call in _kernel_calls(body)]
        if inner and eqn.primitive.name in ("while", "scan", "cond"):
            return []
        found += inner
    return found


def _outline(jaxpr: core.Jaxpr) -> str:
    """Return a program as text, with kernels by their operands and results only."""
    numbers: dict[Any, int] = {}

    def atom(x: Any) -> str:
        if isinstance(x, core.Literal):
            return repr(x.val)
        return f"{numbers.setdefault(x, len(numbers))}:{x.aval}"

    lines = []
    for eqn in jaxpr.eqns:
        shown = f"{list(map(atom, eqn.invars))} -> {list(map(atom, eqn.outvars))}"
        if eqn.primitive.name == "pallas_call":
            lines.append(f"kernel {_name(eqn)} {shown}")
            continue
        bodies = [_outline(body) for body in _jaxprs(eqn.params)]
        kinds = int | float | str | tuple | np.dtype | None
        plain = {name: repr(value) for name, value in eqn.params.items() if isinstance(value, kinds)}
        plain = {name: v for name, v in plain.items() if "0x" not in v and "jaxpr" not in v.lower() and "{" not in v}
        lines.append(f"{eqn.primitive.name} {sorted(plain.items())} {shown} {bodies}")
    return "\n".join(lines)
