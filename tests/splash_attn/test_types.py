import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from offline_tpu.machine.devices import DEVICES, by_name
from splash_attn import SEED_BLOCK_SIZES, AttentionShape, BlockSizes, Variant


def test_shape_counts_flops() -> None:
    assert AttentionShape(2, 3, 5, 7, 8).flops == 4 * 2 * 3 * 5 * 7 * 8
    assert str(AttentionShape(2, 3, 5, 7, 8)) == "2x3x5:7x8"


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1, 8), (1, 1, 1, 1, 60), (1, 1, 1, 1, 512), (1, 1.5, 1, 1, 8)])
def test_shape_refuses(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a"):
        AttentionShape(*sizes)


def test_every_kind_of_integer_is_an_integer() -> None:
    sizes = BlockSizes(np.int64(128), np.uint16(256), jnp.int32(128))  # type: ignore[arg-type]
    assert sizes == BlockSizes(128, 256, 128) and all(type(x) is int for x in dataclasses.astuple(sizes))
    variant = Variant(block_q_compute=np.int32(256), lookahead=np.int8(0), unroll_q=np.int64(128))  # type: ignore[arg-type]
    assert json.loads(json.dumps(variant.to_dict())) == Variant(lookahead=0, unroll_q=128).to_dict()


@pytest.mark.parametrize("value", [True, np.True_, 128.0, np.float32(128), "128", None, np.array([128])])
def test_what_is_no_integer_is_refused_in_one_line(value: object) -> None:
    for make in (
        lambda: BlockSizes(value, 128, 128),  # type: ignore[arg-type]
        lambda: Variant(block_q_compute=value),  # type: ignore[arg-type]
        lambda: Variant(lookahead=value),  # type: ignore[arg-type]
        lambda: AttentionShape(value, 1, 1, 1, 8),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=r"^\w+=.*: expected an? (positive )?integer[^\n]*\.$"):
            make()


@pytest.mark.parametrize("sizes", [(100, 256, 128), (128, 256, 96), (128, 256, 384), (-128, 256, 128)])
def test_block_sizes_refuse(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected a"):
        BlockSizes(*sizes)


def test_the_published_kernels_blocks_are_a_named_configuration() -> None:
    assert str(SEED_BLOCK_SIZES) == "3328/2816/256"


@pytest.mark.parametrize(
    "fields",
    [
        {"softmax": "exact"},
        {"block_q_compute": 100},
        {"lookahead": -1},
        {"vmem_limit_bytes": 0},
        {"unroll_q": 128.0},
        {"lp_scheduler": 1},
    ],
)
def test_variant_refuses(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Variant(**fields)  # type: ignore[arg-type]


def test_variant_round_trips() -> None:
    variant = Variant(softmax="online", lookahead=3)
    assert Variant.from_dict(variant.to_dict()) == variant


def test_devices_are_found_by_either_name() -> None:
    for spec in DEVICES.values():
        assert by_name(spec.name) is by_name(spec.device_kind) is spec
    with pytest.raises(ValueError, match="device='v1': expected one of"):
        by_name("v1")
