"""Reads a profile: the time of each op and named scope, of each step, on a device plane or on the host's.

A TPU writes a plane for each core, "/device:TPU:0", whose ops carry their scope. XLA's CPU backend writes its ops among
the host's threads, with the names of program and HLO op; the scope is in the HLO that the profiler saves beside them.
There an op may go on in other threads after its own event: it lasts to the event "end: <op>". Such ops overlap, and
each moment is shared equally among those that run, so that sums over scopes are seconds in which something ran.
"""

import collections
import dataclasses
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

from splash_workbench.profiles.scopes import Programs, named_scope, read_stats
from splash_workbench.profiles.xla_pb2 import XEvent, XLine, XPlane, XSpace

SUFFIX = ".xplane.pb"
_DEVICE_PLANE = "/device:"
_CORE_PLANE = re.compile(r"^/device:[A-Za-z]+:\d+$")  # not "/device:TPU:0 SparseCore 1", nor "/device:CUSTOM:..."
_HOST_PLANE = "/host:CPU"
_OPS_LINE, _STEPS_LINE, _MODULES_LINE = "XLA Ops", "Steps", "XLA Modules"
#: Stat of a device plane that no device wrote.
PREDICTED_STAT = "predicted"
_ENDED = "end: "
#: Ops whose time is that of the ops that they run.
_CONTROL_FLOW = frozenset(("while", "conditional", "call"))
_NUMBER = re.compile(r"\.\d+$")


@dataclasses.dataclass(frozen=True)
class Op:
    """One run of an HLO op.

    Attributes:
      name: of the HLO op, e.g. "fusion.3".
      scope: named scopes around it, "denoise/blocks/attention"; "" where the compiler made it or it has none.
      opcode: of HLO ("fusion"), or the profiler's category on a device plane; "" where neither is known.
      program: the HLO module, "jit_step".
      plane: where it ran: "/device:TPU:0", or "/host:CPU".
      start_ps: from the plane's own zero.
      self_ps: duration without the ops within it (on the host: its share where ops overlap); 0 for control flow, whose
        ops have the time.
    """

    name: str
    scope: str
    opcode: str
    program: str
    plane: str
    start_ps: int
    duration_ps: int
    self_ps: int

    @property
    def end_ps(self) -> int:
        return self.start_ps + self.duration_ps

    @property
    def is_control_flow(self) -> bool:
        return self.opcode in _CONTROL_FLOW or (not self.opcode and _NUMBER.sub("", self.name) in _CONTROL_FLOW)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step: what `jax.profiler.StepTraceAnnotation` enclosed on the host, or the device's own for it.

    name: of the annotation; the step's number on a device plane. number: `step_num`.
    """

    name: str
    number: int
    plane: str
    start_ps: int
    duration_ps: int


@dataclasses.dataclass(frozen=True)
class Profile:
    """One host's part of a profile.

    Attributes:
      host: the file's name without its suffix.
      ops: of every plane that has ops; those of different planes ran at the same time.
      steps: by the device's clock on device planes, by the host's on "/host:CPU".
      modules: runs of whole programs on device planes, as Ops of their own (scope and opcode empty).
      predicted: written by offline_tpu.timeline: nothing ran.
    """

    host: str
    ops: tuple[Op, ...]
    steps: tuple[Step, ...]
    modules: tuple[Op, ...]
    predicted: bool

    @property
    def planes(self) -> tuple[str, ...]:
        """Return the names of the planes that have ops; device planes where there are any."""
        return tuple(sorted({op.plane for op in self.ops}))

    @property
    def on_device(self) -> bool:
        """Return whether the times are a device's (or predicted for one), not those of XLA's CPU backend."""
        return any(plane.startswith(_DEVICE_PLANE) for plane in self.planes)

    def matching(self, text: str) -> tuple[Op, ...]:
        """Return the ops whose name or scope contains `text`, in the order of their start."""
        return tuple(op for op in self.ops if text in op.name or text in op.scope)

    def seconds_by_scope(self, ops: Iterable[Op] | None = None) -> dict[str, float]:
        """Return self seconds by scope, longest first; the mean over planes, as they run the same at the same time."""
        sums: collections.Counter[str] = collections.Counter()
        for op in self.ops if ops is None else ops:
            sums[op.scope] += op.self_ps
        planes = max(len(self.planes), 1)
        return {scope: ps / planes / 1e12 for scope, ps in sums.most_common()}

    def ops_by_step(self) -> list[tuple[Step, tuple[Op, ...]]]:
        """Return each step with the ops that started within it, on every plane. Its time is the mean over planes."""
        planes: dict[tuple[str, int], list[Step]] = collections.defaultdict(list)
        for step in self.steps:
            planes[step.name, step.number].append(step)
        found = []
        for steps in planes.values():
            spans = [(step.plane, range(step.start_ps, step.start_ps + step.duration_ps)) for step in steps]
            inside = [op for plane, span in spans for op in self.ops if op.plane == plane and op.start_ps in span]
            mean_ps = round(statistics.mean(step.duration_ps for step in steps))
            found.append((dataclasses.replace(steps[0], duration_ps=mean_ps), tuple(inside)))
        return found


def read(path: Path) -> Profile:
    """Return the Profile of an .xplane.pb. Raises as `parse`."""
    return from_space(parse(path), path.name.removesuffix(SUFFIX))


def parse(path: Path) -> XSpace:
    """Return the message of an .xplane.pb. Raises OSError without such a file, ValueError where it is not an xplane."""
    try:
        space = XSpace.FromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: expected an xplane written by the JAX profiler ({error}).") from error
    if not space.planes:  # no profile is without one: it was cut off
        raise ValueError(f"{path}: expected an xplane written by the JAX profiler, and it holds nothing.")
    return space


def from_space(space: XSpace, host: str) -> Profile:
    """Return the Profile of a message. The host's ops count only where there is no device plane."""
    programs = Programs(space)
    found: dict[str, list[Any]] = {_OPS_LINE: [], _STEPS_LINE: [], _MODULES_LINE: []}
    cores = [
        plane
        for plane in space.planes
        if _CORE_PLANE.match(plane.name) and any(line.name == _OPS_LINE for line in plane.lines)
    ]
    for plane in cores:
        for line in plane.lines:
            if line.name == _OPS_LINE:
                found[_OPS_LINE] += _nested(_device_op(plane, line, event, programs) for event in line.events)
            elif line.name in found:
                make = _device_step if line.name == _STEPS_LINE else _module
                found[line.name] += filter(None, (make(plane, line, event) for event in line.events))
    for plane in space.planes if not cores else ():
        if plane.name == _HOST_PLANE:
            found[_OPS_LINE] += _shared(_host_ops(plane, programs))
            found[_STEPS_LINE] += _host_steps(plane)
    ops, steps, modules = (tuple(sorted(x, key=lambda item: (item.plane, item.start_ps))) for x in found.values())
    predicted = any(PREDICTED_STAT in read_stats(plane, plane.stats) for plane in cores)
    return Profile(host, ops, steps, modules, predicted)


def _nested(ops: Iterable[Op]) -> list[Op]:
    """Return the ops of one line with the time of those within them taken away."""
    ordered = sorted(ops, key=lambda op: (op.start_ps, -op.duration_ps))
    self_ps = [op.duration_ps for op in ordered]
    open_ops: list[int] = []
    for index, op in enumerate(ordered):
        while open_ops and ordered[open_ops[-1]].end_ps < max(op.end_ps, op.start_ps + 1):
            open_ops.pop()  # over, or only overlapping by what clocks are off
        if open_ops:
            self_ps[open_ops[-1]] -= op.duration_ps
        open_ops.append(index)
    return [
        dataclasses.replace(op, self_ps=0 if op.is_control_flow else max(left, 0))
        for op, left in zip(ordered, self_ps, strict=True)
    ]


def _shared(ops: Sequence[Op]) -> list[Op]:
    """Return ops that overlap, with each moment shared equally among those that run."""
    running: dict[int, float] = {}
    shares = [0.0] * len(ops)
    moments = sorted(
        (moment, begins, index)
        for index, op in enumerate(ops)
        if not op.is_control_flow
        for moment, begins in ((op.start_ps, True), (op.end_ps, False))
    )
    before = 0
    for moment, begins, index in moments:
        for other in running:
            shares[other] += (moment - before) / len(running)
        before = moment
        if begins:
            running[index] = moment
        else:
            running.pop(index, None)
    return [dataclasses.replace(op, self_ps=round(share)) for op, share in zip(ops, shares, strict=True)]


def _device_op(plane: XPlane, line: XLine, event: XEvent, programs: Programs) -> Op:
    metadata = plane.event_metadata[event.metadata_id]
    stats = read_stats(plane, metadata.stats) | read_stats(plane, event.stats)
    name = metadata.display_name or metadata.name.split(" = ")[0].lstrip("%")
    known = programs.find(stats, name)
    op_name = stats.get("tf_op")
    scope = named_scope(str(op_name)) if op_name else known.scope
    opcode = known.opcode or str(stats.get("hlo_category", ""))
    program = str(stats.get("hlo_module") or stats.get("program_id", ""))
    return _op(plane, line, event, name=name, scope=scope, opcode=opcode, program=program)


def _host_ops(plane: XPlane, programs: Programs) -> list[Op]:
    """Return XLA's CPU ops, each from its event to the one that says that it has ended."""
    begun: list[tuple[Op, Any]] = []
    ended: dict[Any, int] = {}
    for line in plane.lines:
        for event in line.events:
            if not event.stats:
                continue
            stats = read_stats(plane, event.stats)
            if "hlo_op" in stats:
                name = str(stats["hlo_op"])
                known = programs.find(stats, name)
                program = str(stats.get("hlo_module", ""))
                op = _op(plane, line, event, name=name, scope=known.scope, opcode=known.opcode, program=program)
                begun.append((op, stats.get("_p")))
            elif "_c" in stats and plane.event_metadata[event.metadata_id].name.startswith(_ENDED):
                ended[stats["_c"]] = _start_ps(line, event)
    return [
        dataclasses.replace(op, duration_ps=max(op.duration_ps, ended.get(flow, 0) - op.start_ps)) for op, flow in begun
    ]


def _module(plane: XPlane, line: XLine, event: XEvent) -> Op:
    name = plane.event_metadata[event.metadata_id].name
    return _op(plane, line, event, name=name, scope="", opcode="", program=name.split("(")[0])


def _op(plane: XPlane, line: XLine, event: XEvent, **fields: str) -> Op:
    start = _start_ps(line, event)
    return Op(plane=plane.name, start_ps=start, duration_ps=event.duration_ps, self_ps=event.duration_ps, **fields)


def _device_step(plane: XPlane, line: XLine, event: XEvent) -> Step | None:
    name = plane.event_metadata[event.metadata_id].name
    return Step(name, int(name), plane.name, _start_ps(line, event), event.duration_ps) if name.isdigit() else None


def _host_steps(plane: XPlane) -> Iterator[Step]:
    for line in plane.lines:
        for event in line.events:
            number = read_stats(plane, event.stats).get("step_num")
            if number is not None:
                name = plane.event_metadata[event.metadata_id].name
                yield Step(name, int(number), plane.name, _start_ps(line, event), event.duration_ps)


def _start_ps(line: XLine, event: XEvent) -> int:
    return line.timestamp_ns * 1000 + event.offset_ps
