from collections import Counter

import pytest

from tuning.validate.rows import MeasuredRow, read_shipped
from tuning.validate.sets import choose


def _rows(op: str, count: int) -> list[MeasuredRow]:
    return [
        MeasuredRow(id=f"{op}-{n}", source="s", device_kind="chip", op=op, arguments={}, times_ms=(count - n,))
        for n in range(count)
    ]


@pytest.mark.parametrize(("name", "size"), [("quick", 60), ("wide", 500), ("splash", 12), ("all", 1932)])
def test_sizes_of_the_sets(name: str, size: int) -> None:
    shipped = read_shipped()
    chosen = choose(shipped, name)
    assert len(chosen) == size
    assert chosen == choose(shipped[::-1], name)[::-1]  # fixed: the order of the files decides nothing


@pytest.mark.parametrize("name", ["quick", "wide"])
def test_every_program_on_every_chip_is_in_a_set(name: str) -> None:
    shipped = read_shipped()
    assert {(r.op, r.device_kind) for r in choose(shipped, name)} == {(r.op, r.device_kind) for r in shipped}


def test_places_follow_the_root_of_the_numbers_and_rows_are_spread_over_times() -> None:
    rows = [*_rows("many", 900), *_rows("few", 100), *_rows("one", 1)]
    chosen = choose(rows, "quick")
    counts = Counter(row.op for row in chosen)
    assert counts["one"] == 1
    assert counts["many"] == pytest.approx(3 * counts["few"], abs=3)
    times = sorted(row.time_ms for row in chosen if row.op == "many")
    assert times[0] < 30 and times[-1] > 870


def test_an_unknown_set_is_one_line() -> None:
    with pytest.raises(ValueError, match="set=most: expected one of splash, quick, wide, all"):
        choose([], "most")
