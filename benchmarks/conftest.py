"""Benchmarks that stand side by side: in each group one is the baseline, and the run ends with ratios to it.

A time here means something beside another of the same run, and beside the same one of another commit on the same quiet
machine (`make bench` says how). It says nothing about a TPU, and interpreted kernels are not timed at all.

All run on one core. Where others use the machine, two threads of torch that wait for each other take 20 times as long,
and two of XLA do not: that would be a figure of the load and not of the libraries.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 10
#: A ratio of medians says little where the quartiles are further apart than this share of the median.
_NOISY = 0.25
_ROWS = pytest.StashKey[list["Row"]]()


@dataclasses.dataclass(frozen=True)
class Row:
    """A benchmark that ran. amount, unit: what one call gets through, for a rate; None without."""

    group: str
    name: str
    baseline: bool
    median_s: float
    iqr_s: float
    rounds: int
    amount: float | None
    unit: str


@pytest.fixture(scope="session", autouse=True)
def _one_core() -> Iterator[None]:
    """Before JAX starts its CPU client, which makes as many threads as it may use cores."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):  # not on Linux
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture
def beside(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Times a call in a group, and keeps it for the table of ratios. Returns what the call returned."""

    def run(
        call: Callable[[], Any],
        *,
        group: str,
        name: str,
        baseline: bool = False,
        rounds: int = ROUNDS,
        amount: float | None = None,
        unit: str = "",
    ) -> Any:
        benchmark.group = group
        benchmark.extra_info |= {"baseline": baseline}
        result = benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        if benchmark.stats is not None:  # None with --benchmark-disable
            stats = benchmark.stats.stats
            if amount is not None:
                benchmark.extra_info[f"{unit} a second"] = round(amount / stats.median)
            rows = request.config.stash.setdefault(_ROWS, [])
            rows.append(Row(group, name, baseline, stats.median, stats.iqr, stats.rounds, amount, unit))
        return result

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Medians, their noise, and the ratio of each to the baseline of its group."""
    rows = config.stash.get(_ROWS, [])
    if not rows:
        return
    terminalreporter.section("side by side, on one core")
    width = max(len(row.name) for row in rows) + 2
    for group in dict.fromkeys(row.group for row in rows):
        members = sorted((row for row in rows if row.group == group), key=lambda row: not row.baseline)
        baselines = [row for row in members if row.baseline]
        terminalreporter.write_line(group)
        for row in members:
            ratio = f"{row.median_s / baselines[0].median_s:5.2f} x" if baselines else f"{'-':>7}"
            noisy = row.iqr_s > _NOISY * row.median_s
            rate = f"  {row.amount / row.median_s:,.0f} {row.unit}/s" if row.amount is not None else ""
            terminalreporter.write_line(
                f"  {row.name:<{width}}{row.median_s * 1e3:10.2f} ms  IQR {row.iqr_s / row.median_s:4.0%}  {ratio}"
                f"{'  baseline' if row.baseline else ''}{rate}{'  noisy' if noisy else ''}"
            )
    terminalreporter.write_line("ratio: median over the baseline's, less is faster; IQR: its share of the median")
