"""Computes what XLA tells the matmul that it makes of `jax.lax.ragged_dot` about its groups.

The rows of a ragged matmul are cut into tiles; a tile that holds rows of several groups is visited once for each. On
v5p the kernel `ragged-dot-metadata` counts and lists these visits from the group sizes; its program stands in the HLO,
in base64 (MLIR). On v5e and v7x the matmul is a fusion, which writes the rows where groups start to SMEM.
"""

from collections.abc import Sequence

from offline_tpu.hlo import values
from offline_tpu.hlo.module import HloModule, HloOp, PrimitiveType

_NAME = "ragged-dot-metadata"
_STARTS = "group_starts_one_longer"


def is_metadata(op: HloOp) -> bool:
    """Return whether an op is the kernel that makes the metadata."""
    return op.opcode == "custom-call" and op.scope == _NAME


def is_matmul(module: HloModule, fusion: HloOp) -> bool:
    """Return whether a fusion multiplies groups of rows."""
    return _starts(module, fusion) is not None


def group_sizes(module: HloModule, computation: str, fusion: HloOp) -> HloOp | None:
    """Return the op that such a fusion has its group sizes from; None where it is not in the known form."""
    ends = _starts(module, fusion)
    if ends is None or ends.opcode != "parameter":
        return None
    operand = module.op(computation, fusion.operands[ends.proto.parameter_number])
    made = values.source(module, computation, operand)
    return module.op(computation, made.operands[0]) if made.opcode == "reduce-window" else None


def _starts(module: HloModule, fusion: HloOp) -> HloOp | None:
    """Return the op with the rows where groups end, which a ragged fusion makes its table from."""
    for called in fusion.called:
        for op in module.computations[called]:
            if op.name.startswith(_STARTS):
                return module.op(called, op.operands[0])
    return None


def metadata_words(
    module: HloModule, computation: str, metadata: HloOp, matmul: HloOp, group_sizes: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """Return the words of the metadata kernel's results; None where the rows are not whole tiles.

    Args:
      metadata, matmul: the two kernels, of `computation`.
      group_sizes: in rows.

    Returns: offsets of the groups [groups + 1], group of each visit [visits at most], its tile [visits at most], and
      the number of visits [1].
    """
    operands = (module.op(computation, name).shape for name in matmul.operands)
    rows = next(shape.dimensions[0] for shape in operands if shape.element_type != PrimitiveType.S32)
    most = metadata.shape.tuple_shapes[1].dimensions[0]
    tile_count = most - len(group_sizes) + 1
    if rows % tile_count:
        return None
    # An output [groups, k, n] has zeros for an empty group: one visit writes them.
    fewest = 1 if len(matmul.shape.dimensions) == 3 else 0
    return _visits(group_sizes, rows // tile_count, tile_count, most, fewest)


def _visits(
    group_sizes: Sequence[int], tile: int, tile_count: int, most: int, fewest: int
) -> tuple[tuple[int, ...], ...]:
    offsets, groups, tiles, current = [0], [], [], 0
    for group, size in enumerate(group_sizes):
        start, end = offsets[-1], offsets[-1] + size
        offsets.append(end)
        visits = -(-end // tile) - start // tile if size else 0
        for _ in range(max(visits, fewest)):
            groups.append(group)
            tiles.append(current)
            if end >= (current + 1) * tile and current != tile_count - 1:
                current += 1
    padding = most - len(groups)
    return (
        tuple(offsets),
        (*groups, *[len(group_sizes) - 1] * padding),
        (*tiles, *[tile_count - 1] * padding),
        (len(groups),),
    )
