"""What is compiled whole after a first pass, with times that are made up."""

import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from splash_attn.types import BlockSizes, Variant
from tuning.passes import Passes
from tuning.search.space import Candidate
from tuning.trials.records import Trial, best_of

#: block_q, LP scheduler: what a first pass says, what a whole compile says; ms.
TIMES = {
    (1024, False): (10.20, 10.25),
    (2048, False): (10.10, 10.16),
    (1024, True): (10.00, 10.50),
    (2048, True): (10.01, 10.52),
    (3072, True): (10.02, 10.53),
    (4096, False): (12.00, 12.01),
}


@pytest.fixture
def settled(make_trial: Callable[..., Trial], tmp_path: Path) -> Callable[..., tuple[Trial | None, list[str]]]:
    """Run the passes over such times; return the winner, and what was compiled in the order of the calls."""

    def run(
        workers: int, times: dict[tuple[int, bool], tuple[float, float]], recorded: Sequence[Trial] = ()
    ) -> tuple[Trial | None, list[str]]:
        calls: list[str] = []
        told: dict[str, Trial] = {trial.key: trial for trial in recorded}
        of_times = () if recorded else times
        left = [Candidate(BlockSizes(q, 512, 256), Variant(lp_scheduler=lp)) for q, lp in of_times]

        def evaluate(
            block_sizes: BlockSizes, variant: dict[str, Any], kernel: str, *, compiled: str, estimate_ms: float | None
        ) -> Trial:
            del kernel
            estimated, whole = times[block_sizes.block_q, variant["lp_scheduler"]]
            calls.append(f"{compiled} {block_sizes.block_q} {variant['lp_scheduler']}")
            time_ms = estimated if compiled == "shorter" else whole
            fields = {"block_sizes": block_sizes, "variant": variant, "compiled": compiled, "estimate_ms": estimate_ms}
            return make_trial(**fields, time_samples_ms=(time_ms,))

        search = types.SimpleNamespace(
            told=told,
            budget=len(times),
            ask=lambda: left.pop(0) if left else None,
            tell=lambda candidate, trial: told.update({candidate.key: trial}),
        )
        backend = types.SimpleNamespace(quick=True)
        settings = types.SimpleNamespace(
            workers=workers, quick=True, backend=backend, progress=False, promote=False, kernel_name="splash_attn"
        )
        runner = types.SimpleNamespace(stages=dict, cancel=lambda: None)
        evaluator = types.SimpleNamespace(evaluate=evaluate, runner=runner)
        passes: Any = Passes
        passes(settings, search, evaluator, {}, tmp_path / "trials.jsonl", recorded).run()
        return best_of(told.values()), calls[0 if recorded else len(times) :]

    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_the_winner_is_compiled_whole_and_few_others_are_settled(workers: int, settled) -> None:
    winner, calls = settled(workers, TIMES)
    assert winner is not None and winner.block_sizes is not None
    assert (winner.block_sizes.block_q, winner.time_ms, winner.estimate_ms) == (2048, 10.16, 10.10)
    assert [call for call in calls if call.startswith("whole")] == ["whole 2048 False"]
    # Of the LP scheduler's, one or two tell how far the others are off.
    assert sum("True" in call for call in calls) <= workers
    assert not any("4096" in call for call in calls)


def test_one_that_is_alone_near_the_best_is_compiled_once_more(settled) -> None:
    """Not by itself and then whole, which tells the same."""
    winner, calls = settled(2, {(1024, False): (10.0, 10.1), (2048, False): (11.0, 11.0)})
    assert calls == ["whole 1024 False"]
    assert winner is not None and (winner.time_ms, winner.estimate_ms) == (10.1, 10.0)


@pytest.mark.parametrize(("second_ms", "calls_after"), [(10.3, []), (10.15, ["whole 2048 True"])])
def test_of_two_near_the_best_is_compiled_whole_beside_the_kernel_of_the_other(
    second_ms: float, calls_after: list[str], settled
) -> None:
    winner, calls = settled(2, {(1024, False): (10.0, 10.2), (2048, True): (10.1, second_ms)})
    assert sorted(calls[:2]) == ["kernel 2048 True", "whole 1024 False"]
    assert calls[2:] == calls_after
    assert winner is not None and winner.time_ms == min(10.2, second_ms)


def test_what_kernels_alone_said_too_much_is_known_when_the_run_goes_on(settled, make_trial) -> None:
    """The whole compile of the best crashed: another is whole, and by itself the best one looked slower."""

    def trial(block_q: int, compiled: str, time_ms: float) -> Trial:
        variant = Variant(lp_scheduler=False).to_dict()
        fields = {"block_sizes": BlockSizes(block_q, 512, 256), "variant": variant, "compiled": compiled}
        return make_trial(**fields, estimate_ms=9.8, time_samples_ms=(time_ms,))

    recorded = [trial(2048, "kernel", 9.74), trial(1024, "kernel", 9.75), trial(1024, "whole", 9.615)]
    winner, calls = settled(1, {(1024, False): (9.8, 9.615), (2048, False): (9.8, 9.6)}, recorded)
    assert calls == ["whole 2048 False"]
    assert winner is not None and winner.time_ms == 9.6
