"""The parts of XLA's xplane.proto and hlo.proto that this project reads and writes, as protobuf messages.

No package that the project needs brings these messages. `jax.profiler.ProfileData` reads an xplane too, but gives
neither the stats of event metadata, where a TPU's ops have their scope, nor the HLO of the programs; and it rounds to
whole nanoseconds. Field numbers are those of openxla/xla (xla/tsl/profiler/protobuf/xplane.proto,
xla/service/hlo.proto, xla/xla_data.proto); protobuf skips the fields that are not named here.
"""

import functools
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "cogvideox_splash"
_INT, _UINT, _STRING, _BYTES, _DOUBLE = "TYPE_INT64", "TYPE_UINT64", "TYPE_STRING", "TYPE_BYTES", "TYPE_DOUBLE"
#: Message -> {field: (number, type)}; a type in brackets is repeated, "{name}" a map from int64.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "XSpace": {"planes": (1, "[XPlane]"), "hostnames": (4, f"[{_STRING}]")},
    "XPlane": {
        "id": (1, _INT),
        "name": (2, _STRING),
        "lines": (3, "[XLine]"),
        "event_metadata": (4, "{XEventMetadata}"),
        "stat_metadata": (5, "{XStatMetadata}"),
        "stats": (6, "[XStat]"),
    },
    "XLine": {
        "id": (1, _INT),
        "display_id": (10, _INT),
        "name": (2, _STRING),
        "display_name": (11, _STRING),
        "timestamp_ns": (3, _INT),
        "duration_ps": (9, _INT),
        "events": (4, "[XEvent]"),
    },
    "XEvent": {
        "metadata_id": (1, _INT),
        "offset_ps": (2, _INT),
        "duration_ps": (3, _INT),
        "stats": (4, "[XStat]"),
    },
    "XStat": {
        "metadata_id": (1, _INT),
        "double_value": (2, _DOUBLE),
        "uint64_value": (3, _UINT),
        "int64_value": (4, _INT),
        "str_value": (5, _STRING),
        "bytes_value": (6, _BYTES),
        "ref_value": (7, _UINT),
    },
    "XEventMetadata": {
        "id": (1, _INT),
        "name": (2, _STRING),
        "display_name": (4, _STRING),
        "stats": (5, "[XStat]"),
    },
    "XStatMetadata": {"id": (1, _INT), "name": (2, _STRING)},
    # Value of the stat "memory_access_breakdown" (xprof's op_metrics.proto).
    "MemoryAccessBreakdown": {"memory_accessed": (1, "[MemoryAccessed]")},
    "MemoryAccessed": {"operation_type": (1, _INT), "memory_space": (2, _INT), "bytes_accessed": (3, _UINT)},
    "HloProto": {"hlo_module": (1, "HloModuleProto")},
    "HloModuleProto": {"name": (1, _STRING), "computations": (3, "[HloComputationProto]")},
    "HloComputationProto": {"name": (1, _STRING), "id": (5, _INT), "instructions": (2, "[HloInstructionProto]")},
    "HloInstructionProto": {
        "name": (1, _STRING),
        "opcode": (2, _STRING),
        "metadata": (7, "OpMetadata"),
        "called_computation_ids": (38, f"[{_INT}]"),
    },
    "OpMetadata": {"op_name": (2, _STRING)},
}
_ONE_OF = {"XStat": tuple(name for name in _MESSAGES["XStat"] if name.endswith("_value"))}


@functools.cache
def message(name: str) -> Any:
    """The class of a message, e.g. `message("XSpace").FromString(path.read_bytes())`."""
    return message_factory.GetMessageClass(_pool().FindMessageTypeByName(f"{_PACKAGE}.{name}"))


@functools.cache
def _pool() -> descriptor_pool.DescriptorPool:
    file = descriptor_pb2.FileDescriptorProto(name=f"{_PACKAGE}/xplane.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        described = file.message_type.add(name=name)
        if name in _ONE_OF:
            described.oneof_decl.add(name="value")
        for field_name, (number, kind) in fields.items():
            field = described.field.add(name=field_name, number=number)
            repeated = kind[0] in "[{"
            field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            if kind[0] == "{":
                kind = _map_entry(described, name, field_name, kind.strip("{}"))
            _set_type(field, kind.strip("[]"))
            if field_name in _ONE_OF.get(name, ()):
                field.oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool


def _map_entry(described: Any, name: str, field_name: str, value: str) -> str:
    """protobuf's maps are repeated messages of a key and a value. Returns that message's name."""
    entry = "".join(part.title() for part in field_name.split("_")) + "Entry"
    nested = described.nested_type.add(name=entry)
    nested.options.map_entry = True
    for number, (part, kind) in enumerate((("key", _INT), ("value", value)), start=1):
        field = nested.field.add(name=part, number=number)
        field.label = field.LABEL_OPTIONAL
        _set_type(field, kind)
    return f"{name}.{entry}"


def _set_type(field: Any, kind: str) -> None:
    if kind.startswith("TYPE_"):
        field.type = getattr(field, kind)
    else:
        field.type = field.TYPE_MESSAGE
        field.type_name = f".{_PACKAGE}.{kind}"
