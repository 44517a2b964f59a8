"""Costs the collectives of a scheduled program: which chips, how many bytes, how long on the links."""

import dataclasses
import math

import numpy as np

from offline_tpu.hlo.module import HloModule, HloOp, array_bytes
from offline_tpu.machine import links
from offline_tpu.machine.constants import ICI_EFFICIENCY, ICI_HOP_LATENCY_S
from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.machine.errors import UnknownDumpFormatError

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_UNMODELLED = ("collective-broadcast", "ragged-all-to-all", "send", "recv")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of every chip.

    Attributes:
      kind: all-reduce, all-gather, reduce-scatter, all-to-all or collective-permute.
      group_size: chips that take part together; of a permute, the number of pairs.
      group_count: such groups at once.
      size_bytes: per chip: gathered, reduced, or sent.
      link_bytes: over the busiest link, in one direction.
      hbm_bytes: read and written by one core.
      link_s: seconds on the links.
    """

    kind: str
    group_size: int
    group_count: int
    size_bytes: int
    link_bytes: float
    hbm_bytes: int
    link_s: float

    def __str__(self) -> str:
        return f"{self.kind} of {self.size_bytes / 1e6:.1f} MB over {self.group_size} chips"


def collective_kind(op: HloOp, module: HloModule) -> str | None:
    """Return which collective an op is (a start of one, or a fusion around one too); None where it is none.

    Raises:
      UnknownDumpFormatError: it communicates in a way that is not modelled.
    """
    opcode = op.opcode.removesuffix("-start")
    if opcode in _KINDS:
        return opcode
    if opcode in _UNMODELLED:
        of_host = "; jax.debug.print and callbacks are such: leave them out" if opcode in ("send", "recv") else ""
        kinds = ", ".join(_KINDS)
        raise UnknownDumpFormatError(f"{op.name}: {opcode} is not modelled, expected one of {kinds}{of_host}.")
    if op.opcode in ("fusion", "async-start"):
        inner = [o for o in module.inside(op) if o.opcode in _KINDS]
        if len(inner) > 1:
            raise UnknownDumpFormatError(f"{op.name}: expected one collective in a fusion, found {len(inner)}.")
        if inner:
            # A fused all-reduce keeps a chip's own slice of the sum: the compiler runs it as a reduce-scatter.
            return "reduce-scatter" if inner[0].opcode == "all-reduce" else inner[0].opcode
    return None


def cost_of(op: HloOp, computation: str, module: HloModule, grid: links.Grid, device: DeviceSpec) -> Collective | None:
    """Return the collective that an op is, or starts; None where it is none.

    Raises:
      UnknownDumpFormatError: its groups are not in a known form, or it is not modelled.
    """
    kind = collective_kind(op, module)
    if kind is None:
        return None
    source = next((inner for inner in module.inside(op) if inner.opcode in _KINDS), op)
    operands = [module.op(computation, name).shape for name in op.operands]
    operand_bytes = sum(map(array_bytes, operands))
    # Of a start op, the result is the second element of its tuple.
    result = op.shape.tuple_shapes[1] if op.opcode.endswith("-start") and op.shape.tuple_shapes else op.shape
    if kind == "collective-permute":
        pairs = [(pair.source, pair.target) for pair in source.proto.source_target_pairs]
        traffic = links.permute(grid, pairs, operand_bytes)
        size, group_size, group_count = operand_bytes, len(pairs), 1
    else:
        groups = _groups(source, len(grid.coords))
        group_size, group_count = len(groups[0]), len(groups)
        size = operand_bytes * group_size if kind == "all-gather" else operand_bytes
        if kind == "all-to-all":
            traffic = links.exchange(grid, groups, size)
        else:
            traffic = links.gather(grid, groups, size)
            if kind == "all-reduce":  # a reduce-scatter, then an all-gather
                traffic = links.Traffic(2 * traffic.link_bytes, 2 * traffic.hops)
    # Each core of a chip moves its part, as of an op.
    hbm_bytes = sum(array_bytes(shape, hbm_only=True) for shape in (*operands, result)) // device.cores
    return Collective(
        kind=kind,
        group_size=group_size,
        group_count=group_count,
        size_bytes=size,
        link_bytes=traffic.link_bytes,
        hbm_bytes=hbm_bytes,
        link_s=traffic.link_bytes / (ICI_EFFICIENCY * device.ici_link_bytes_per_s) + traffic.hops * ICI_HOP_LATENCY_S,
    )


def _groups(op: HloOp, device_count: int) -> list[list[int]]:
    """Return the replica groups, which are listed, reshapes of an iota, or axes of a mesh.

    Raises:
      UnknownDumpFormatError: they are parts of axes, or of a mesh in another order.
    """
    if op.proto.HasField("mesh_axes_replica_group_list"):
        return _mesh_groups(op)
    if op.proto.HasField("iota_collective_device_list"):
        iota = op.proto.iota_collective_device_list
        ids = np.arange(math.prod(iota.iota_reshape_dims)).reshape(iota.iota_reshape_dims)
        ids = ids.transpose(iota.iota_transpose_perm or None)
        return ids.reshape(iota.num_replica_groups, iota.num_devices_per_group).tolist()
    listed = op.proto.collective_device_list.replica_groups
    return [list(group.replica_ids) for group in listed] or [list(range(device_count))]


def _mesh_groups(op: HloOp) -> list[list[int]]:
    found = op.proto.mesh_axes_replica_group_list
    sub_axes = any(axis.HasField("sub_axis_info") for axis in found.axes)
    if sub_axes or found.mesh.device_ids or found.mesh.HasField("iota_transform"):
        raise UnknownDumpFormatError(f"{op.name}: its replica_groups are not in a known form: {found}.")
    sizes = [axis.size for axis in found.mesh.axes]
    wanted = [axis.mesh_axis_index for axis in found.axes]
    order = [i for i in range(len(sizes)) if i not in wanted] + wanted
    size = math.prod(sizes[i] for i in wanted)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(order).reshape(-1, size).tolist()
