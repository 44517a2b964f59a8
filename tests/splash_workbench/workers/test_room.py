from pathlib import Path

import pytest

from splash_workbench.workers import room as module
from splash_workbench.workers.room import available_memory_bytes, check_timeout_s, worker_count


def _machine(root: Path, **files: str) -> Path:
    """Write files named by their paths, with __ for /."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


MEMINFO = "MemTotal:  16777216 kB\nMemAvailable:   8388608 kB\n"
CGROUP_2 = "sys__fs__cgroup__"


def test_free_memory_is_the_least_that_anything_allows(tmp_path: Path) -> None:
    assert available_memory_bytes(tmp_path) is None
    assert available_memory_bytes(_machine(tmp_path, proc__meminfo=MEMINFO)) == 8 * 2**30
    limits = {f"{CGROUP_2}a__memory.max": f"{6 * 2**30}", f"{CGROUP_2}a__memory.current": f"{3 * 2**30}"}
    cache = {f"{CGROUP_2}a__memory.stat": f"anon 5\ninactive_file {2**30}\n", "proc__self__cgroup": "0::/a/b\n"}
    assert available_memory_bytes(_machine(tmp_path, **limits, **cache)) == 4 * 2**30
    assert available_memory_bytes(_machine(tmp_path, **{f"{CGROUP_2}a__memory.max": "max\n"})) == 8 * 2**30


def test_an_old_cgroup_limits_memory_too(tmp_path: Path) -> None:
    folder = f"{CGROUP_2}memory__"
    files = {
        f"{folder}memory.limit_in_bytes": str(2 * 2**30),
        f"{folder}memory.usage_in_bytes": str(2**30),
        f"{folder}memory.stat": "total_inactive_file 0\n",
        "proc__meminfo": MEMINFO,
    }
    assert available_memory_bytes(_machine(tmp_path, **files)) == 2**30


@pytest.mark.parametrize(("free_gib", "workers"), [(0, 1), (7, 1), (8, 2), (100, 4), (None, 4)])
def test_workers_fit_cores_and_memory(monkeypatch: pytest.MonkeyPatch, free_gib: int | None, workers: int) -> None:
    monkeypatch.setattr(module, "core_count", lambda: 4)
    free = None if free_gib is None else free_gib * 2**30
    monkeypatch.setattr(module, "available_memory_bytes", lambda: free)
    assert worker_count(None) == workers
    assert worker_count(7) == 7
    assert (free is None) != (f"{free_gib}.0 GiB of memory free" in module.room_line())


@pytest.mark.parametrize("requested", [0, -1])
def test_no_workers_are_refused(requested: int) -> None:
    with pytest.raises(ValueError, match=f"workers={requested}: expected at least 1"):
        worker_count(requested)


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, float("inf"), float("nan"), 1e12])
def test_a_time_limit_that_no_timer_counts_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="expected a positive number of seconds"):
        check_timeout_s(timeout_s)
