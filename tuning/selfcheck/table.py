"""A self-check as text."""

from collections.abc import Iterator

from splash_workbench import cli
from tuning.selfcheck.records import SelfCheck, TimedRow

_COLUMNS = ("part", "what", "measured ms", "predicted ms", "interval ms", "reported ms", "verdict")
_LEFT_ALIGNED = (0, 1, 6)
_VERSIONS = ("python", "jax", "jaxlib", "libtpu", "torch", "tokamax")


def lines(found: SelfCheck) -> Iterator[str]:
    """Yield the lines that say all of it."""
    yield from _environment(found)
    if found.checks:
        yield f"\nright, against float64: {len(found.checks)} checks of the kernel"
        yield from (f"  {check.name}: {check.says}" for check in found.checks)
    if found.rows:
        yield ""
        yield from cli.aligned([_COLUMNS, *map(_cells, found.rows)], _LEFT_ALIGNED)
        yield from (f"  {row.task}: {note}" for row in found.rows for note in row.notes)
    if found.failures:
        yield "\nfailed:"
        yield from (f"  {each.id}: {each.status}: {each.error}" for each in found.failures)
    if found.left_out:
        yield "\nleft out:"
        yield from (f"  {part}: {why}" for part, why in found.left_out.items())
    yield f"\n{summary(found)}"


def summary(found: SelfCheck) -> str:
    """Return what it comes to in one line."""
    judged = [row.inside for row in found.rows if row.inside is not None]
    inside = f"{sum(judged)} of {len(judged)} within their predicted intervals" if judged else "none judged"
    counts = f"{len(found.checks)} checks right, {len(found.rows)} programs timed ({inside})"
    return f"{counts}, {len(found.failures)} failed, {len(found.left_out)} parts left out"


def _environment(found: SelfCheck) -> Iterator[str]:
    about = found.environment
    if not about:
        yield "environment: not known, see below"
        return
    topology = f" ({about['topology']})" if about["topology"] else ""
    yield f"{about['num_devices']} x {found.device_kind}{topology}, {about['host']}, {about['cpu_count']} processors"
    yield ", ".join(f"{name} {about['versions'][name]}" for name in _VERSIONS if name in about["versions"])
    free = {"HBM of a chip": "hbm_free_bytes", "memory": "memory_free_bytes", "disk": "disk_free_bytes"}
    known = [f"{title} {about[name] / 2**30:.1f} GiB" for title, name in free.items() if about[name] is not None]
    yield f"free: {', '.join(known)}"
    yield from (f"{name}={value}" for name, value in about["flags"].items())


def _cells(row: TimedRow) -> tuple[str, ...]:
    interval = row.predicted.interval_ms
    return (
        row.part,
        row.name,
        _number(row.time_ms),
        _number(row.predicted.time_ms),
        f"{_number(interval[0])} to {_number(interval[1])}" if interval else "-",
        _number(row.reported_ms),
        row.verdict,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
