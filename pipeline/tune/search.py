"""Search compiler options, one flag after the other, each value with the best of the flags before."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from splash_workbench.records.step_search import TriedOptions

#: What is tried of each flag, the ones that matter most first. "" leaves a flag to libtpu.
SPACE: Mapping[str, tuple[str, ...]] = {
    "xla_tpu_scoped_vmem_limit_kib": ("32768", "40960", "45056", "49152", "57344", "65536"),
    "xla_tpu_enable_async_all_to_all": ("true", "false"),
}
#: The best so many by their times with a short attention kernel are compiled whole, beside the default.
_FINALISTS = 2

#: (options, whether with a short attention kernel) -> what became of them.
Try = Callable[[Mapping[str, str], bool], TriedOptions]


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found. default, winner: compiled whole; tried: everything, in order."""

    default: TriedOptions
    winner: TriedOptions
    tried: tuple[TriedOptions, ...]


def most_trials(space: Mapping[str, Sequence[str]]) -> int:
    """Return how many programs are compiled at most, whole ones included."""
    return 1 + sum(max(0, len(values) - 1) for values in space.values()) + _FINALISTS + 1


def search(
    try_options: Try,
    default: Mapping[str, str],
    space: Mapping[str, Sequence[str]] = SPACE,
    workers: int = 1,
    cancel: Callable[[], object] = lambda: None,
) -> Found:
    """Return the fastest options that are found, and the default beside them, each compiled whole.

    A candidate without a time takes no part. workers: values of one flag that are compiled at a time. cancel: ends
    what is being tried, where the search is interrupted.
    """
    tried: dict[tuple[tuple[str, str], ...], TriedOptions] = {}
    best = dict(default)

    def time_s(options: Mapping[str, str]) -> float:
        found = tried[_key(options)].time_s
        return float("inf") if found is None else found

    pool = ThreadPoolExecutor(workers)
    try:

        def try_all(candidates: Sequence[Mapping[str, str]]) -> None:
            new = [options for options in candidates if _key(options) not in tried]
            for options, outcome in zip(new, pool.map(lambda options: try_options(options, True), new), strict=True):
                tried[_key(options)] = outcome

        try_all([best])
        for flag, values in space.items():
            changed = [{**best, flag: value} for value in values]
            candidates = [best, *({name: value for name, value in one.items() if value} for one in changed)]
            try_all(candidates)
            best = min(candidates, key=time_s)  # the first of equal ones, so the default where nothing beats it
        ranked = [dict(options) for options in sorted(tried, key=lambda key: time_s(dict(key)))]
        finalists = [options for options in ranked if time_s(options) < time_s(default)][:_FINALISTS]
        whole = list(pool.map(lambda options: try_options(options, False), [dict(default), *finalists]))
    except BaseException:
        cancel()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    winner = min(whole, key=lambda outcome: float("inf") if outcome.time_s is None else outcome.time_s)
    return Found(whole[0], winner, (*tried.values(), *whole))


def _key(options: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(options.items()))
