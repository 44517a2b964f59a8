"""A prediction as a timeline that TensorBoard's profile tab opens, labelled so that nobody takes it for a measurement.

Ops are laid out one after the other, as offline_tpu predicts them to run; loops are unrolled. An op's FLOPs are the
MXU slots that its schedule fills, at the bfloat16 peak: what the profile calls FLOPS utilization is MXU occupancy.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from offline_tpu.machine.devices import DeviceSpec
from splash_workbench.profiles.messages import message
from splash_workbench.profiles.reader import PREDICTED_STAT, named_scope

#: Before the names of runs, hosts and programs that were predicted.
PREFIX = "predicted-"
HOST = "predicted"
_HBM_READ = {"operation_type": 1, "memory_space": 1}


@dataclasses.dataclass(frozen=True)
class PredictedOp:
    """What a timeline shows of a offline_tpu.OpCost, which has the meaning of the fields. time_s: over all calls."""

    name: str
    scope: str
    category: str
    time_s: float
    start_s: float
    calls: int
    cycles: int = 0
    hbm_bytes: int = 0
    bound: str = ""
    vmem_bytes: int = 0
    spill_count: int = 0
    fill_count: int = 0
    utilization: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "PredictedOp":
        """From an OpCost as a dict, as trials keep them.

        Raises:
          KeyError: a time is missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        required = ("name", "scope", "category", "time_s", "start_s", "calls")
        return cls(**{name: fields[name] for name in required} | {n: fields[n] for n in names & set(fields)})


@dataclasses.dataclass(frozen=True)
class Program:
    """One predicted program. name: "denoise_step", say; ops: in the order of the program."""

    name: str
    ops: tuple[PredictedOp, ...]


def predicted_by(versions: Mapping[str, str]) -> str:
    """What a prediction was read from, by the versions of its environment."""
    return f"libtpu {versions.get('libtpu', 'of unknown version')}"


@dataclasses.dataclass(frozen=True)
class _Loop:
    """Ops and loops that run `trips` times, one after the other, `period_s` a time."""

    body: tuple["PredictedOp | _Loop", ...]
    calls: int
    trips: int
    period_s: float


def unrolled(ops: Sequence[PredictedOp]) -> Iterator[tuple[PredictedOp, float, float]]:
    """Each run of each op, with its start and its time in seconds, in order.

    An op says how often it runs and when it first starts, and nothing is between two ops: the loops follow from that.

    Raises:
      ValueError: an op does not start where the ops before it end, in whatever loops.
    """
    ops = [op for op in ops if op.calls > 0]
    items, stop, end_s = _parse(ops, 0, 1, 0.0)
    if stop < len(ops):
        raise ValueError(
            f"{ops[stop].name}: starts at {ops[stop].start_s} s; expected {end_s} s, after the ops before it."
        )
    yield from _runs(items, 1, 0.0)


def _parse(
    ops: Sequence[PredictedOp], index: int, calls: int, now: float
) -> tuple[tuple[PredictedOp | _Loop, ...], int, float]:
    """What runs `calls` times from `ops[index]` on: ops and loops, the index after them, and when they first end."""
    items: list[PredictedOp | _Loop] = []
    while index < len(ops) and ops[index].calls >= calls and _same(ops[index].start_s, now):
        op = ops[index]
        if op.calls == calls:
            items.append(op)
            index, now = index + 1, now + op.time_s / calls
            continue
        found = _parse_loop(ops, index, calls, now)
        if found is None:
            break
        loop, index = found
        items.append(loop)
        now += loop.trips * loop.period_s
    return tuple(items), index, now


def _parse_loop(ops: Sequence[PredictedOp], index: int, calls: int, now: float) -> tuple[_Loop, int] | None:
    """The loop that begins at an op, and the index after it. The op may be in a loop within it that comes first."""
    for inside in sorted({op.calls for op in ops[index:] if calls < op.calls <= ops[index].calls}):
        if inside % calls:
            continue
        body, stop, end_s = _parse(ops, index, inside, now)
        loop = _Loop(body, inside, inside // calls, end_s - now)
        after_s = now + loop.trips * loop.period_s
        # Where an outer loop ends too, the next op starts later: `_parse` of that one checks it.
        if body and (stop == len(ops) or ops[stop].calls < calls or _same(ops[stop].start_s, after_s)):
            return loop, stop
        if body and ops[stop].calls >= calls and ops[stop].start_s > after_s and calls > 1:
            return loop, stop
    return None


def _runs(
    items: Sequence[PredictedOp | _Loop], calls: int, shift_s: float
) -> Iterator[tuple[PredictedOp, float, float]]:
    for item in items:
        if isinstance(item, PredictedOp):
            yield item, item.start_s + shift_s, item.time_s / calls
        else:
            for trip in range(item.trips):
                yield from _runs(item.body, item.calls, shift_s + trip * item.period_s)


def _same(start_s: float, expected_s: float) -> bool:
    return math.isclose(start_s, expected_s, rel_tol=1e-9, abs_tol=1e-12)


def space_of(programs: Iterable[Program], device: DeviceSpec, made_by: str) -> Any:
    """An XSpace with one step for each program, one after the other on one core of a device that is not here.

    Args:
      programs: what runs.
      device: whose peaks the rooflines are.
      made_by: what predicted it, "libtpu 0.0.52".
    """
    space = message("XSpace")()
    space.hostnames.append(HOST)
    plane = _Plane(space.planes.add(id=1, name="/device:TPU:0"))
    plane.stats(plane.proto.stats, _device_stats(device, made_by))
    steps, modules, ops_line, scopes = (
        plane.proto.lines.add(id=number, display_id=number, name=name, display_name=f"{name} ({HOST})")
        for number, name in enumerate(("Steps", "XLA Modules", "XLA Ops", "Framework Name Scope"), start=1)
    )
    now = 0
    for number, program in enumerate(programs):
        end = now
        runs = list(unrolled(program.ops))
        program_id = number + 1
        group = {"group_id": number}
        for op, start_s, time_s in runs:
            start, stop = now + _ps(start_s), now + _ps(start_s + time_s)
            if stop > start:
                metadata = plane.event(f"{program_id}:{op.name}", op.name, _op_stats(op, program_id, device))
                event = ops_line.events.add(metadata_id=metadata, offset_ps=start, duration_ps=stop - start)
                plane.stats(event.stats, group)
            end = max(end, stop)
        for scope, start_s, stop_s in _spans(runs):
            metadata = plane.event(f"scope {scope}", scope, {})
            start, stop = now + _ps(start_s), now + _ps(stop_s)
            scopes.events.add(metadata_id=metadata, offset_ps=start, duration_ps=stop - start)
        whole = {"offset_ps": now, "duration_ps": end - now}
        step = steps.events.add(metadata_id=plane.event(f"step {number}", str(number), {}), **whole)
        plane.stats(step.stats, group)
        module = modules.events.add(
            metadata_id=plane.event(f"module {number}", f"{PREFIX}{program.name}({program_id})", {}), **whole
        )
        plane.stats(module.stats, group | {"program_id": program_id, "run_id": number})
        now = end
    return space


def _spans(runs: Iterable[tuple[PredictedOp, float, float]]) -> Iterator[tuple[str, float, float]]:
    """Named scopes from where they begin to where they end, outer ones before those within them."""
    spans: list[list[Any]] = []
    opened: list[list[Any]] = []
    for op, start_s, time_s in runs:
        if not time_s:
            continue
        parts = [part for part in named_scope(op.scope).split("/") if part]
        same = 0
        while same < min(len(parts), len(opened)) and opened[same][0] == parts[same]:
            same += 1
        del opened[same:]
        for part in parts[same:]:
            opened.append([part, start_s, start_s])
            spans.append(opened[-1])
        for span in opened:
            span[2] = start_s + time_s
    return ((name, start_s, stop_s) for name, start_s, stop_s in spans)


def _device_stats(device: DeviceSpec, made_by: str) -> dict[str, Any]:
    hbm_gb = device.hbm_bytes_per_s / 1e9
    return {
        PREDICTED_STAT: f"nothing ran: read from the schedule of {made_by}",
        "device_vendor": "Google",
        "device_type_string": f"{device.device_kind} ({HOST} by {made_by})",
        "peak_teraflops_per_second": device.peak_bf16_flops_per_s / 1e12,
        "peak_hbm_bw_gigabytes_per_second": hbm_gb,
    }


def _op_stats(op: PredictedOp, program_id: int, device: DeviceSpec) -> dict[str, Any]:
    flops = round(op.utilization.get("MATMUL", 0.0) * op.cycles * device.flops_per_cycle)
    return {
        "tf_op": op.scope,
        "hlo_category": op.category,
        "program_id": program_id,
        "flops": flops,
        "model_flops": flops,
        "bytes_accessed": op.hbm_bytes,
        "raw_bytes_accessed": op.hbm_bytes,
        "memory_access_breakdown": _hbm_traffic(op.hbm_bytes),
        "long_name": f"{op.name} ({HOST}): {op.category}, bound by {op.bound}",
        "cycles": op.cycles,
        "vmem_bytes": op.vmem_bytes,
        "spills": op.spill_count,
        "fills": op.fill_count,
        **{f"{unit} utilization": fraction for unit, fraction in op.utilization.items() if fraction},
    }


def _hbm_traffic(hbm_bytes: int) -> bytes:
    """As xprof wants it, all of it as reads: a schedule's DMAs are not told apart in an OpCost."""
    breakdown = message("MemoryAccessBreakdown")()
    breakdown.memory_accessed.add(**_HBM_READ, bytes_accessed=hbm_bytes)
    return breakdown.SerializeToString()


def _ps(seconds: float) -> int:
    return round(seconds * 1e12)


class _Plane:
    """Gives names of events and stats their numbers within one plane."""

    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self._events: dict[str, int] = {}
        self._stats: dict[str, int] = {}

    def event(self, key: str, name: str, stats: Mapping[str, Any]) -> int:
        """The number of the event metadata of a key, made where it is new."""
        if key not in self._events:
            number = self._events[key] = len(self._events) + 1
            metadata = self.proto.event_metadata[number]
            metadata.id, metadata.name, metadata.display_name = number, name, name
            self.stats(metadata.stats, {"symbol_id": number, **stats} if stats else {})
        return self._events[key]

    def stats(self, target: Any, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            stat = target.add(metadata_id=self._stat(name))
            if isinstance(value, str):
                stat.str_value = value
            elif isinstance(value, bytes):
                stat.bytes_value = value
            elif isinstance(value, float):
                stat.double_value = value
            else:
                stat.int64_value = value

    def _stat(self, name: str) -> int:
        if name not in self._stats:
            number = self._stats[name] = len(self._stats) + 1
            metadata = self.proto.stat_metadata[number]
            metadata.id, metadata.name = number, name
        return self._stats[name]
