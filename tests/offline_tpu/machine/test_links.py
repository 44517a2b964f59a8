import pytest

from offline_tpu.machine.links import Grid, exchange, gather, permute

LINE = Grid.around([(i, 0, 0) for i in range(4)], wrap_length=16)
RING = Grid.around([(i, 0, 0) for i in range(16)], wrap_length=16)
MESH = Grid.around([(x, y, 0) for y in range(4) for x in range(2)], wrap_length=16)
SIZE = 1600


def test_gather_on_a_line_brings_everything_over_one_link() -> None:
    actual = gather(LINE, [[0, 1, 2, 3]], SIZE)
    assert actual.link_bytes == pytest.approx(SIZE * 3 / 4)
    assert actual.hops == 3


def test_gather_on_a_ring_uses_both_ways() -> None:
    actual = gather(RING, [list(range(16))], SIZE)
    assert actual.link_bytes == pytest.approx(SIZE * 15 / 16 / 2)
    assert actual.hops == 8


def test_gather_on_a_block_uses_both_axes() -> None:
    actual = gather(MESH, [[0, 1, 2, 3], [4, 5, 6, 7]], SIZE)
    assert actual.link_bytes == pytest.approx(SIZE * 3 / 4 / 2)


def test_gather_of_chips_that_are_no_block_passes_along_routes() -> None:
    # Rows 0 and 2, and rows 1 and 3: both groups cross the links between rows 1 and 2.
    actual = gather(MESH, [[0, 4], [2, 6]], SIZE)
    assert actual.link_bytes == pytest.approx(2 * SIZE / 2)


def test_exchange_is_bound_by_the_middle_of_the_longest_axis() -> None:
    assert exchange(LINE, [[0, 1, 2, 3]], SIZE).link_bytes == pytest.approx(SIZE)
    assert exchange(RING, [list(range(16))], SIZE).link_bytes == pytest.approx(SIZE * 16 / 8)
    assert exchange(MESH, [list(range(8))], SIZE).link_bytes == pytest.approx(SIZE)


def test_exchange_on_a_line_agrees_with_routing_every_message() -> None:
    load, _ = LINE.busiest([(a, b) for a in range(4) for b in range(4) if a != b])
    assert exchange(LINE, [[0, 1, 2, 3]], SIZE).link_bytes == pytest.approx(load * SIZE / 4)


def test_permute_goes_the_shorter_way_round_a_ring() -> None:
    assert permute(RING, [(0, 15)], SIZE).hops == 1
    assert permute(LINE, [(0, 3)], SIZE).hops == 3


def test_chips_that_send_to_themselves_use_no_link() -> None:
    assert permute(LINE, [(0, 0)], SIZE).link_bytes == 0


def test_devices_of_one_chip_use_no_link() -> None:
    cores = Grid.around([(0, 0, 0), (0, 0, 0)], wrap_length=4)
    assert gather(cores, [[0, 1]], SIZE).link_bytes == 0
    assert exchange(cores, [[0, 1]], SIZE).link_bytes == 0


def test_groups_on_the_same_chips_share_their_links() -> None:
    two_cores_a_chip = Grid.around([(x, 0, 0) for x in (0, 0, 1, 1)], wrap_length=4)
    for collective in (gather, exchange):
        alone = collective(two_cores_a_chip, [[0, 2]], SIZE).link_bytes
        assert alone > 0
        assert collective(two_cores_a_chip, [[0, 2], [1, 3]], SIZE).link_bytes == 2 * alone
