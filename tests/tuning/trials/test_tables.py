"""Tables of trials, whatever a kernel calls its tunables."""

from collections.abc import Callable
from typing import Any

from tuning.trials import tables
from tuning.trials.records import Trial


def test_a_tunable_may_have_the_name_of_a_column(make_trial: Callable[..., Trial]) -> None:
    names = ("vmem_mib", "wall_s", "status", "error", "block_q", "rms_error", "record_id")
    trials = [
        make_trial(variant={name: f"{name}-{i}" for name in names}, vmem_bytes=2**20, wall_time_s=2.0) for i in (1, 2)
    ]
    found = tables.table(trials)
    assert all(f"{name}-{i}" in found for name in names for i in (1, 2))
    assert " 2.0 " in found and " 1.0 " in found
    assert len(tables.rows(trials)) == 2


def test_a_long_text_of_a_tunable_is_cut(make_trial: Callable[..., Any]) -> None:
    found = tables.table([make_trial(variant={"flags": "a" * 3000}), make_trial(variant={"flags": "b"})])
    assert max(map(len, found.splitlines())) < 1000 and "aaa..." in found
