"""Say how many workers a machine has room for."""

import contextlib
import os
from pathlib import Path

#: Most that a worker was seen to hold while it compiled.
WORKER_BYTES = int(3.7 * 2**30)
#: What timers of the operating system can count, rounded down.
_LONGEST_TIMEOUT_S = 10**9
#: Names of limit, usage, and cache that can be dropped, in version 2 and version 1 of cgroups.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def worker_count(requested: int | None) -> int:
    """Return the workers requested, at least 1, or for None as many as the cores and the free memory allow."""
    if requested is None:
        free = available_memory_bytes()
        return core_count() if free is None else max(1, min(core_count(), free // WORKER_BYTES))
    if requested < 1:
        raise ValueError(f"workers={requested}: expected at least 1, or null for what cores and memory allow.")
    return requested


def room_line() -> str:
    """Return what `worker_count` goes by, in words."""
    free = available_memory_bytes()
    memory = "" if free is None else f", {free / 2**30:.1f} GiB of memory free, {WORKER_BYTES / 2**30:.1f} for each"
    return f"{core_count()} cores{memory}"


def check_timeout_s(timeout_s: float) -> None:
    """Raise ValueError for a time limit that a process cannot be given."""
    if not 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        raise ValueError(f"timeout_s={timeout_s}: expected a positive number of seconds, at most {_LONGEST_TIMEOUT_S}.")


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the memory that this process can still take, in a cgroup too; None where nothing below `root` says."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        text = (root / "proc/meminfo").read_text()
        found.append(int(text.split("MemAvailable:")[1].split()[0]) * 1024)
    tops = {"": root / "sys/fs/cgroup", "memory": root / "sys/fs/cgroup/memory"}
    folders = set(tops.values())
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controller, path = line.split(":", 2)
            if controller in tops:
                own = tops[controller] / path.lstrip("/")
                folders |= {own, *own.parents}
    for folder in folders:
        for limit, usage, cache in _CGROUP_FILES:
            with contextlib.suppress(OSError, ValueError):  # absent, or "max"
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / usage).read_text()) - int(stat.get(cache, 0))
                found.append(int((folder / limit).read_text()) - used)
    return max(0, min(found)) if found else None
