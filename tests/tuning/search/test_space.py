import pytest

from splash_attn.types import AttentionShape, BlockSizes, Variant
from tuning.search.space import Candidate, Space
from tuning.trials.workloads import Workload

SHAPE = AttentionShape(batch_size=1, num_heads=2, q_seq_len=1021, kv_seq_len=509, head_dim=64)
WORKLOAD = Workload("test", SHAPE, "bfloat16")
UNROLLS = (None, 128, 256, 1024)
BLOCKS = {"block_q": (128, 1024), "block_kv": (256, 512, 640, 768), "block_kv_compute": (128, 256)}


def test_what_cannot_be_valid_is_left_out_and_counted() -> None:
    found = Space("test", BLOCKS).candidates(WORKLOAD)
    assert found.pruned == {
        "block_kv longer than the padded kv sequence": 6,  # 640/128, 768/128 and 768/256 for 509, two block_q each
        "block_kv_compute does not divide block_kv": 2,  # 640/256
    }
    assert len(found.valid) == 2 * 4 * 2 - sum(found.pruned.values()) == 8
    assert {candidate.block_sizes.block_kv for candidate in found.valid} == {256, 512}


def test_block_q_is_as_short_as_as_many_blocks_need() -> None:
    first = ({"block_q": 1152, "block_kv": 512}, {"block_kv": 256})
    space = Space("test", BLOCKS | {"block_q": (128, 640, 768, 1152)}, first=first)
    fitted = space.fitted_to(SHAPE)  # 1021 rows: 8 blocks, 2 (twice the same) and 1
    assert fitted.choices["block_q"] == (128, 512, 1024)
    assert fitted.choices["block_kv"] == BLOCKS["block_kv"]
    assert fitted.first == ({"block_q": 1024, "block_kv": 512}, {"block_kv": 256})
    assert fitted.fitted_to(SHAPE) == fitted
    assert not any("block_q" in reason for reason in fitted.candidates(WORKLOAD).pruned)


def test_blocks_that_unroll_into_too_much_code_are_left_out() -> None:
    found = Space("test", BLOCKS, max_block_scores=128 * 512).candidates(WORKLOAD)
    assert {str(candidate.block_sizes) for candidate in found.valid} == {
        f"128/{block_kv}/{compute}" for block_kv in (256, 512) for compute in (128, 256)
    }
    space = Space(
        "test",
        {"block_q": (1024,), "block_kv": (512,), "block_kv_compute": (256,), "variant.unroll_q": UNROLLS},
        max_block_scores=128 * 512,
    )
    found = space.candidates(WORKLOAD)
    assert [candidate.variant.unroll_q for candidate in found.valid] == [128]
    assert found.pruned == {
        "more scores unrolled than space.max_block_scores": 2,
        "unroll_q is all of block_q, as with null": 1,
    }
    with pytest.raises(ValueError, match="max_block_scores=0: expected a positive number"):
        Space("test", BLOCKS, max_block_scores=0)


def test_vmem_estimate_prunes(monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(shape: AttentionShape, block_sizes: BlockSizes, variant: Variant, itemsize: int) -> int:
        assert (shape, itemsize) == (SHAPE, 4)
        return block_sizes.block_kv * (2 if variant.lp_scheduler else 1)

    monkeypatch.setattr("tuning.search.space.vmem_bytes_estimate", estimate)
    space = Space("test", BLOCKS | {"block_q": (128,), "variant.lp_scheduler": (False, True)})
    found = space.candidates(Workload("test", SHAPE, "float32"), vmem_limit_bytes=512)
    assert found.pruned["VMEM estimate over the device's"] == 2  # 512 with lp_scheduler
    assert len(found.valid) == 6


def test_real_vmem_estimate_prunes_what_no_tpu_holds() -> None:
    from offline_tpu.machine import devices

    shape = AttentionShape(1, 12, 400_000, 400_000, 128)
    space = Space("test", {"block_q": (1024, 131072), "block_kv": (1024, 131072), "block_kv_compute": (1024,)})
    limit = devices.by_name("v6e").vmem_bytes
    found = space.candidates(Workload("test", shape, "bfloat16"), limit)
    assert [str(candidate.block_sizes) for candidate in found.valid] == ["1024/1024/1024"]


def test_parameters_and_candidates_convert_both_ways() -> None:
    space = Space("test", BLOCKS | {"variant.lp_scheduler": (False, True)})
    candidate = Candidate(BlockSizes(128, 512, 256), Variant(lp_scheduler=True))
    parameters = space.parameters_of(candidate)
    assert parameters == {"block_q": 128, "block_kv": 512, "block_kv_compute": 256, "variant.lp_scheduler": True}
    assert space.candidate_of(parameters) == candidate
    assert space.candidate_of(parameters).key == candidate.key
    assert candidate.key != Candidate(candidate.block_sizes, Variant(lp_scheduler=False)).key


@pytest.mark.parametrize(
    ("choices", "first", "message"),
    [
        ({"block_q": (100,)}, (), r"space.block_q=100: expected a positive multiple of 128"),
        ({"block_q": ()}, (), r"space.block_q=\[\]: expected one or more values"),
        ({"block_q": (128, 128)}, (), r"each once"),
        ({"variant.colour": (1,)}, (), r"space.variant.colour: expected one of block_q"),
        ({}, ({"block_q": 256},), r"space.first block_q=256: expected one of \[128, 1024\]"),
        ({}, ({"blok": 256},), r"space.first blok: expected block_q"),
    ],
)
def test_bad_spaces_are_refused(choices: dict, first: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space("test", BLOCKS | choices, first)
