"""Writes predictions as timelines that TensorBoard's profile tab opens, labelled so that none passes for a measurement.

Ops are laid out one after the other, as offline_tpu predicts them to run; loops are unrolled. An op's FLOPs are the
MXU slots that its schedule fills, at the bfloat16 peak: what the profile calls FLOPS utilization is MXU occupancy.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.prediction import OpCost
from splash_workbench.profiles.reader import PREDICTED_STAT
from splash_workbench.profiles.scopes import named_scope
from splash_workbench.profiles.xla_pb2 import MemoryAccessBreakdown, XPlane, XSpace

#: Before the names of runs, hosts and programs that were predicted.
PREFIX = "predicted-"
HOST = "predicted"
_HBM_READ = {"operation_type": 1, "memory_space": 1}


@dataclasses.dataclass(frozen=True)
class Program:
    """One predicted program. name: "denoise_step", say; ops: in the order of the program."""

    name: str
    ops: tuple[OpCost, ...]


def predicted_by(versions: Mapping[str, str]) -> str:
    """Return what a prediction was read from, by the versions of its environment."""
    return f"libtpu {versions.get('libtpu', 'of unknown version')}"


def unrolled(ops: Iterable[OpCost]) -> list[tuple[OpCost, float, float]]:
    """Return each run of each op, with its start and its time in seconds, in order of the starts.

    Raises:
      ValueError: an op runs several times, and its record is too old to say in which loops.
    """
    runs = []
    for op in ops:
        if math.prod(loop.trips for loop in op.loops) != op.calls:
            raise ValueError(f"op {op.name}: its loops are not in the record; predict again.")
        for trips in itertools.product(*(range(loop.trips) for loop in op.loops)):
            delay_s = sum(trip * loop.period_s for trip, loop in zip(trips, op.loops, strict=True))
            runs.append((op, op.start_s + delay_s, op.time_s / op.calls))
    return sorted(runs, key=lambda run: run[1])


def space_of(programs: Iterable[Program], device: DeviceSpec, made_by: str) -> XSpace:
    """Return an XSpace with one step for each program, one after the other on one core of a device that is not here.

    Args:
      programs: what runs.
      device: whose peaks the rooflines are.
      made_by: what predicted it, "libtpu 0.0.52".
    """
    space = XSpace()
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
        runs = unrolled(program.ops)
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


def _spans(runs: Iterable[tuple[OpCost, float, float]]) -> Iterator[tuple[str, float, float]]:
    """Return named scopes from where they begin to where they end, outer ones before those within them."""
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


def _op_stats(op: OpCost, program_id: int, device: DeviceSpec) -> dict[str, Any]:
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
    """Return it as xprof wants it, all as reads: an OpCost does not tell reads from writes."""
    breakdown = MemoryAccessBreakdown()
    breakdown.memory_accessed.add(**_HBM_READ, bytes_accessed=hbm_bytes)
    return breakdown.SerializeToString()


def _ps(seconds: float) -> int:
    return round(seconds * 1e12)


class _Plane:
    """Gives names of events and stats their numbers within one plane."""

    def __init__(self, proto: XPlane) -> None:
        self.proto = proto
        self._events: dict[str, int] = {}
        self._stats: dict[str, int] = {}

    def event(self, key: str, name: str, stats: Mapping[str, Any]) -> int:
        """Return the number of the event metadata of a key, made where it is new."""
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
