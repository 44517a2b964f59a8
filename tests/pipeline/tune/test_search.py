"""How compiler options are searched, with a made-up compiler."""

from collections.abc import Mapping

import pytest

from pipeline.tune.search import SPACE, most_trials, search
from splash_workbench.records.step_search import TriedOptions

DEFAULT = {"memory": "4", "overlap": "true"}
FLAGS = {"memory": ("1", "2", "4", "8"), "overlap": ("true", "false"), "fuse": ("", "yes")}


class Compiler:
    """Steps take a second, more or less by what `seconds` says of a flag's value; None: it does not compile."""

    def __init__(self, seconds: Mapping[tuple[str, str], float | None]):
        self.seconds, self.asked = seconds, []

    def __call__(self, options: Mapping[str, str], short_attention: bool) -> TriedOptions:
        self.asked.append((dict(options), short_attention))
        parts = [self.seconds.get(pair, 0.0) for pair in options.items()]
        fields = {"options": dict(options), "short_attention": short_attention}
        if None in parts:
            return TriedOptions(**fields, error="does not fit")
        return TriedOptions(**fields, time_s=1.0 + sum(parts))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_best_value_of_each_flag_is_found(workers):
    compiler = Compiler(
        {("memory", "2"): -0.1, ("memory", "8"): -0.05, ("overlap", "false"): 0.1, ("fuse", "yes"): -0.2}
    )
    found = search(compiler, DEFAULT, FLAGS, workers)
    assert found.winner.options == {"memory": "2", "overlap": "true", "fuse": "yes"}
    assert (found.winner.time_s, found.default.time_s) == (pytest.approx(0.7), 1.0)
    assert not found.winner.short_attention and not found.default.short_attention
    assert len(compiler.asked) == len(found.tried) == most_trials(FLAGS)
    assert len({(str(sorted(options.items())), short) for options, short in compiler.asked}) == len(compiler.asked)


def test_where_nothing_beats_the_default_it_is_the_winner():
    compiler = Compiler({("memory", "4"): -0.1})
    found = search(compiler, DEFAULT, FLAGS)
    assert found.winner is found.default and found.winner.options == DEFAULT
    assert [short for _, short in compiler.asked].count(False) == 1


def test_what_does_not_compile_takes_no_part():
    compiler = Compiler({("memory", "2"): None, ("memory", "4"): None, ("memory", "8"): -0.3})
    found = search(compiler, DEFAULT, FLAGS)
    assert found.default.time_s is None and found.winner.options["memory"] == "8"
    assert [tried.error for tried in found.tried].count("does not fit") >= 2


def test_a_finalist_that_is_slower_whole_does_not_win():
    class Misleading(Compiler):
        def __call__(self, options, short_attention):
            tried = super().__call__(options, short_attention)
            if short_attention or options == DEFAULT:
                return tried
            return TriedOptions(options=tried.options, short_attention=False, time_s=2.0)

    found = search(Misleading({("memory", "2"): -0.1}), DEFAULT, FLAGS)
    assert found.winner is found.default


def test_where_nothing_compiles_there_is_no_winner():
    found = search(Compiler({("memory", value): None for value in FLAGS["memory"]}), DEFAULT, FLAGS)
    assert found.winner.time_s is None and found.winner is found.default


def test_the_space_has_the_defaults():
    from pipeline.model import step_options

    for options in (step_options.DEFAULT, step_options.INT8_DEFAULT):
        assert all(value in SPACE[flag] for flag, value in options.items())
