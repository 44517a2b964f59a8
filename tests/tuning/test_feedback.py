"""What a sweep says while it runs."""

import io
from collections.abc import Callable

from helpers import wait_until
from splash_attn.types import BlockSizes
from splash_workbench.trial_status import Status
from tuning import feedback
from tuning.feedback import Feedback
from tuning.trials.records import Trial


def test_a_line_for_each_trial_with_the_best_and_the_time_left(make_trial: Callable[..., Trial]) -> None:
    stream = io.StringIO()
    with Feedback(3, (), list, stream=stream) as lines:
        lines.finished(make_trial(time_samples_ms=(12.5,)))
        lines.finished(make_trial(status=Status.OUT_OF_MEMORY, error="RESOURCE_EXHAUSTED: vmem"))
        other = {"block_sizes": BlockSizes(512, 512, 128)}
        lines.finished(make_trial(time_samples_ms=(11.5,), compiled="shorter", **other))
        lines.finished(make_trial(time_samples_ms=(12.75,), compiled="whole", **other), refined=True)
        lines.finished(make_trial(time_samples_ms=(13.5,)))
    first, second, third, fourth, fifth = stream.getvalue().splitlines()
    assert first.startswith("1/3 256/512/128 softmax=fixed_bound") and "12.5 ms predicted (best so far); about" in first
    assert second.endswith("out_of_memory RESOURCE_EXHAUSTED: vmem (best 12.5 ms); about 0 s left")
    assert third.endswith("11.5 ms predicted, from a shorter kernel (best so far)")
    # What is refined takes its estimate's place, and a trial beside the budget adds to it.
    assert fourth.startswith("4/4") and fourth.endswith("12.75 ms predicted (best 12.5 ms)")
    assert fifth.startswith("5/5") and fifth.endswith("13.5 ms predicted (best 12.75 ms)")


def test_the_best_is_of_all_that_is_on_record(make_trial: Callable[..., Trial]) -> None:
    stream = io.StringIO()
    other = make_trial(time_samples_ms=(11.5,), block_sizes=BlockSizes(512, 512, 128))
    with Feedback(3, [make_trial(time_samples_ms=(10.5,))], list, stream=stream) as lines:
        lines.finished(other)
    assert stream.getvalue().startswith("2/3") and "(best 10.5 ms)" in stream.getvalue()


def test_a_file_is_told_what_the_workers_are_at(monkeypatch, make_trial: Callable[..., Trial]) -> None:
    monkeypatch.setattr(feedback, "_FILE_S", 0.01)
    stream = io.StringIO()
    with Feedback(3, [make_trial()], lambda: [("compile", 12.0), ("check", 90.0)], stream=stream):
        wait_until(stream.getvalue, "a line")
    assert stream.getvalue().startswith("1/3 workers: compile 12 s, check 2 min\n")


def test_nothing_is_said_where_nothing_is_asked_for(make_trial: Callable[..., Trial]) -> None:
    stream = io.StringIO()
    with Feedback(1, (), list, enabled=False, stream=stream) as lines:
        lines.finished(make_trial())
    assert stream.getvalue() == ""
