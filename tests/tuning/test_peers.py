import pytest

from splash_attn.types import AttentionShape
from tuning.peers import PeerSchema, entrants
from tuning.trials.workloads import Workload

PEERS = [
    PeerSchema("jax_splash", 2048, 2048, 1024, {"layout": "HEAD_DIM_MINOR"}),
    PeerSchema("jax_splash", 4096, 2048, 1024, {"layout": "HEAD_DIM_MINOR"}),
]


@pytest.mark.parametrize(
    ("q_seq_len", "kv_seq_len", "expected"),
    [
        (1021, 1021, ["1024/1024/1024"]),
        (300, 131, ["384/256/256"]),
        (1500, 5000, ["1536/2048/1024"]),
        (39826, 39826, ["2048/2048/1024", "4096/2048/1024"]),
    ],
)
def test_blocks_of_peers_are_no_longer_than_the_sequences(q_seq_len: int, kv_seq_len: int, expected: list[str]) -> None:
    workload = Workload("w", AttentionShape(1, 2, q_seq_len, kv_seq_len, 64), "bfloat16")
    found, lines = entrants(PEERS, workload, "TPU v6 lite")
    assert [str(entrant.block_sizes) for entrant in found if entrant.kernel == "jax_splash"] == expected
    assert len([line for line in lines if "shortened to the sequences" in line]) == 2 * (
        expected[0] != "2048/2048/1024"
    )
