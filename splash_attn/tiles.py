"""How the kernel cuts a block of keys by queries into tiles, and the scratch that it works in."""

import dataclasses
from typing import Any

import jax
from jax.experimental import pallas as pl

from splash_attn.types import LANES, BlockSizes, Variant

SUBLANES = 8
#: Rows that the shift adds to q: a whole bfloat16 tile.
SHIFT_ROWS = 16
#: Tiles unrolled where code need not be fast to the last cycle, but would take as long to compile as all the rest: in
#: the last block of keys, and in a kernel that seldom runs.
_LAST_BLOCK_TILES, _FALLBACK_TILES = 64, 32


@dataclasses.dataclass(frozen=True)
class Tile:
    """`num_keys` keys by the queries of one step; `keys` is rounded up to whole lanes."""

    index: int
    keys: slice
    num_keys: int
    q_start: int | jax.Array
    num_queries: int

    @property
    def queries(self) -> Any:
        return pl.ds(self.q_start, self.num_queries)

    @property
    def shape(self) -> tuple[int, int]:
        return self.keys.stop - self.keys.start, self.num_queries

    @property
    def ragged(self) -> bool:
        return self.num_keys < self.shape[0]


def cut_into_tiles(
    num_keys: int, q_start: int | jax.Array, num_queries: int, block_kv_compute: int, block_q_compute: int
) -> list[Tile]:
    """Return the tiles of `num_keys` keys by `num_queries` queries, queries innermost."""
    tiles: list[Tile] = []
    for k_start in range(0, num_keys, block_kv_compute):
        keys_left = min(block_kv_compute, num_keys - k_start)
        keys = slice(k_start, k_start + -(-keys_left // LANES) * LANES)
        for offset in range(0, num_queries, block_q_compute):
            queries_left = min(block_q_compute, num_queries - offset)
            tiles.append(Tile(len(tiles), keys, keys_left, q_start + offset, queries_left))
    return tiles


def last_block_unroll_q(num_keys: int, block_sizes: BlockSizes, variant: Variant) -> int:
    """Return how many queries of the last block, of `num_keys` keys, to unroll: filling the pipeline anew costs 6 %."""
    most = min(variant.unroll_q or block_sizes.block_q, block_sizes.block_q)
    return min(_unroll_q(_LAST_BLOCK_TILES, num_keys, block_sizes, variant), most)


def fallback_unroll_q(block_sizes: BlockSizes, variant: Variant) -> int:
    """Return how many queries of each block to unroll in a kernel that seldom runs.

    Twice as many are 7 % faster (cogvideox_720p on a v6e, predicted).
    """
    return _unroll_q(_FALLBACK_TILES, block_sizes.block_kv, block_sizes, variant)


def _unroll_q(tile_count: int, num_keys: int, block_sizes: BlockSizes, variant: Variant) -> int:
    """Return queries whose tiles, over `num_keys` keys, are some `tile_count`."""
    tiles_per_query_block = -(-num_keys // block_sizes.block_kv_compute)
    return min(variant.block_q_compute * max(1, tile_count // tiles_per_query_block), block_sizes.block_q)


def shifted(variant: Variant) -> bool:
    """Return whether a number is subtracted in the contraction."""
    return variant.softmax == "fixed_bound" and variant.qk_dtype == "bfloat16"


def side_scratch_shape(head_dim: int, block_sizes: BlockSizes, variant: Variant) -> tuple[int, int]:
    """ "online": v with rows of ones below; "fixed_bound": the rows below q; one idle tile with int8."""
    if variant.softmax == "online":
        return head_dim + SUBLANES, block_sizes.block_kv
    return SHIFT_ROWS, block_sizes.block_q if shifted(variant) else LANES


def key_scratch_shape(head_dim: int, block_sizes: BlockSizes, variant: Variant) -> tuple[int, int]:
    """Return a block of keys, with the ones beside them that meet a shift; one idle tile with int8."""
    if variant.qk_dtype == "int8":
        return SHIFT_ROWS, LANES
    return block_sizes.block_kv, head_dim + (SHIFT_ROWS if shifted(variant) else 0)


def score_scratch_shape(block_sizes: BlockSizes, variant: Variant) -> tuple[int, int, int]:
    """Tiles in flight, of which "online" keeps the scores in VMEM; one idle tile otherwise."""
    if variant.softmax != "online":
        return 1, SUBLANES, LANES
    return variant.lookahead + 1, block_sizes.block_kv_compute, min(variant.block_q_compute, block_sizes.block_q)


def row_scratch_rows(variant: Variant) -> int:
    """Rows for what the softmax needs for each query: a number, and with "online" also the scale of the scores."""
    return SUBLANES * (2 if variant.softmax == "online" else 1)
