import itertools

import pytest

from offline_tpu.schedule.pace import steady_cycles


def code(*bundles: tuple[int, int, float]) -> tuple[list[int], list[float]]:
    """Return what `steady_cycles` takes: (bundles, runs, work of each bundle) of stretches of code."""
    counts = [runs for length, runs, _ in bundles for _ in range(length)]
    return counts, [0.0, *itertools.accumulate(work for length, _, work in bundles for _ in range(length))]


def test_filling_and_draining_are_left_out() -> None:
    counts, work = code((30, 5, 0), (400, 5, 0.5), (30, 5, 0))
    assert steady_cycles(counts, work) == pytest.approx(5 * 400, rel=0.01)


def test_the_pace_is_of_the_stretch_with_the_most_work() -> None:
    counts, work = code((200, 1, 1), (400, 10, 0.5), (3, 2, 0))
    assert steady_cycles(counts, work) == pytest.approx(200 * 2 + 400 * 10, rel=0.01)


def test_two_pipelines_one_after_the_other_have_the_pace_of_either() -> None:
    counts, work = code((40, 1, 0), (800, 1, 0.5), (60, 1, 0), (400, 1, 0.5), (20, 1, 0))
    assert steady_cycles(counts, work) == pytest.approx(1200, rel=0.01)


@pytest.mark.parametrize("bundles", [(), ((20, 3, 0),), ((20, 0, 1),)])
def test_there_is_none_where_no_such_work_is_done(bundles: tuple[tuple[int, int, float], ...]) -> None:
    assert steady_cycles(*code(*bundles)) == 0
