"""Collectives of a scheduled program: which chips, how many bytes, how long on the links."""

import dataclasses
import re

import numpy as np

from offline_tpu.hlo.module import HloModule, HloOp, array_bytes, tuple_elements
from offline_tpu.machine import links
from offline_tpu.machine.constants import ICI_EFFICIENCY, ICI_HOP_LATENCY_S
from offline_tpu.machine.devices import DeviceSpec
from offline_tpu.machine.errors import UnknownDumpFormatError

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_GROUPS = re.compile(
    r"\breplica_groups=(\{\}|\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|mesh\[.*?\] ?\{[^}]*\})"
)
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
      hbm_bytes: read and written by one chip.
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
    """Which collective an op is (a start of one, or a fusion around one too); None where it is none.

    Raises:
      UnknownDumpFormatError: it communicates in a way that is not modelled.
    """
    opcode = op.opcode.removesuffix("-start")
    if opcode in _KINDS:
        return opcode
    if opcode in _UNMODELLED:
        raise UnknownDumpFormatError(f"{op.name}: {opcode} is not modelled, expected one of {', '.join(_KINDS)}.")
    if op.opcode in ("fusion", "async-start"):
        inner = [o for o in module.inside(op) if o.opcode in _KINDS]
        if len(inner) > 1:
            raise UnknownDumpFormatError(f"{op.name}: expected one collective in a fusion, found {len(inner)}.")
        if inner:
            # A fused all-reduce keeps a chip's own slice of the sum: the compiler runs it as a reduce-scatter.
            return "reduce-scatter" if inner[0].opcode == "all-reduce" else inner[0].opcode
    return None


def cost_of(op: HloOp, computation: str, module: HloModule, grid: links.Grid, device: DeviceSpec) -> Collective | None:
    """The collective that an op is, or starts; None where it is none.

    Raises:
      UnknownDumpFormatError: its groups are not in a known form, or it is not modelled.
    """
    kind = collective_kind(op, module)
    if kind is None:
        return None
    source = (
        op if op.opcode.removesuffix("-start") in _KINDS else next(o for o in module.inside(op) if o.opcode in _KINDS)
    )
    operands = [module.op(computation, name).shape for name in op.operands]
    operand_bytes = sum(map(array_bytes, operands))
    # Of a start op, the result is the second element of its tuple.
    result = tuple_elements(op.shape)[1] if op.opcode.endswith("-start") and op.shape.startswith("(") else op.shape
    if kind == "collective-permute":
        pairs = _pairs(source)
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
    hbm_bytes = sum(array_bytes(shape, hbm_only=True) for shape in (*operands, result))
    return Collective(
        kind=kind,
        group_size=group_size,
        group_count=group_count,
        size_bytes=size,
        link_bytes=traffic.link_bytes,
        hbm_bytes=hbm_bytes,
        link_s=traffic.link_bytes / (ICI_EFFICIENCY * device.ici_link_bytes_per_s) + traffic.hops * ICI_HOP_LATENCY_S,
    )


def _pairs(op: HloOp) -> list[tuple[int, int]]:
    text = op.attribute("source_target_pairs") or ""
    return [(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", text)]


def _groups(op: HloOp, device_count: int) -> list[list[int]]:
    """Replica groups: listed, as reshapes of an iota, or as axes of a mesh.

    Raises:
      UnknownDumpFormatError: they are in none of these forms.
    """
    match = _GROUPS.search(op.attributes)
    if match is None:
        raise UnknownDumpFormatError(f"{op.name}: its replica_groups are not in a known form: {op.attributes[:120]!r}.")
    text = match[1]
    if text == "{}":
        return [list(range(device_count))]
    if text.startswith("{"):
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", text)]
    if text.startswith("mesh"):
        return _mesh_groups(op, text)
    target, source, order = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()  # type: ignore[union-attr]
    ids = np.arange(device_count).reshape([int(n) for n in source.split(",")])
    if order:
        ids = ids.transpose([int(n) for n in order.split(",")])
    shape = [int(n) for n in target.split(",")]
    return ids.reshape(-1, shape[-1]).tolist()


def _mesh_groups(op: HloOp, text: str) -> list[list[int]]:
    axes, members = re.fullmatch(r"mesh\[(.*?)\] ?\{(.*)\}", text).groups()  # type: ignore[union-attr]
    sizes = re.findall(r"'([^']+)'=(\d+)", axes)
    wanted = re.findall(r"'([^']+)'", members)
    if ":" in members or not wanted or not set(wanted) <= {name for name, _ in sizes} or "device_ids" in axes:
        raise UnknownDumpFormatError(f"{op.name}: its replica_groups are not in a known form: {text!r}.")
    names = [name for name, _ in sizes]
    ids = np.arange(int(np.prod([int(n) for _, n in sizes]))).reshape([int(n) for _, n in sizes])
    order = [i for i, name in enumerate(names) if name not in wanted] + [names.index(name) for name in wanted]
    size = int(np.prod([ids.shape[names.index(name)] for name in wanted]))
    return ids.transpose(order).reshape(-1, size).tolist()
