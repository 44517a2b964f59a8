"""Runs that were interrupted, and the state that the denoise stage saves."""

import dataclasses
import json

import numpy as np
import pytest

from pipeline.requests.options import RunOptions
from pipeline.runs.request_run import generate
from pipeline.stages import resume as denoise_state
from pipeline.stages.resume import STATE_NAME, DenoiseState, StateFile


@pytest.mark.compile
@pytest.mark.parametrize("changes", [{"scheduler": "dpm"}, {"dtype": "bfloat16"}], ids=str)
def test_an_interrupted_run_goes_on_with_the_step_it_was_in(changes, same, ran, tmp_path):
    """Also with a scheduler that draws noise: the generator's state comes back."""
    request, stages = same(**changes, num_inference_steps=5), ["text", "denoise"]

    def interrupt(event):
        if event.stage == "denoise" and event.step == 3:
            raise KeyboardInterrupt

    generate(request, stages=stages, run_dir=tmp_path / "whole")
    run_dir = tmp_path / "run"
    for every in (2, 0):  # saved after step 2, and after step 3 because of the interrupt
        with pytest.raises(KeyboardInterrupt):
            options = RunOptions(checkpoint_every=every)
            generate(request, stages=stages, run_dir=run_dir, run_options=options, progress=interrupt)
        assert sorted(path.name for path in run_dir.iterdir()) == [STATE_NAME, "text.json", "text.safetensors"]
    ran.clear()
    events = []
    result = generate(request, stages=stages, run_dir=run_dir, progress=events.append)
    assert ran == ["denoise"]
    steps = [event.step for event in events if event.phase == "run" and event.total_steps]
    assert steps == [3, 4, 5]
    assert len(result.timings[1].step_times_s) == 5
    assert (run_dir / "denoise.safetensors").read_bytes() == (tmp_path / "whole" / "denoise.safetensors").read_bytes()
    assert json.loads((run_dir / "denoise.json").read_text())["resumed_at_step"] == 3
    assert not (run_dir / STATE_NAME).exists()


@pytest.mark.compile
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("other request", "belongs to another request"),
        ("truncated", "is not readable"),
        ("other bytes", "is not readable (its checksum is of other content)"),
        ("no resume", ""),
    ],
)
def test_a_state_that_does_not_fit_is_not_taken(damage, message, same, tmp_path, caplog):
    def interrupt(event):
        if event.stage == "denoise" and event.step == 2:
            raise KeyboardInterrupt

    request, stages, resume = same(num_inference_steps=3), ["text", "denoise"], True
    with pytest.raises(KeyboardInterrupt):
        generate(request, stages=stages, run_dir=tmp_path, progress=interrupt)
    if damage == "other request":
        request = dataclasses.replace(request, seed=8)
    elif damage == "truncated":
        (tmp_path / STATE_NAME).write_bytes((tmp_path / STATE_NAME).read_bytes()[:300])
    elif damage == "other bytes":
        content = (tmp_path / STATE_NAME).read_bytes()
        (tmp_path / STATE_NAME).write_bytes(content[:-4] + b"\0\1\2\3")
    else:
        resume = False
    events = []
    options = RunOptions(resume=resume)
    generate(request, stages=stages, run_dir=tmp_path, run_options=options, progress=events.append)
    steps = [event.step for event in events if event.stage == "denoise" and event.total_steps]
    assert steps == [0, 1, 2, 3]
    assert message in caplog.text
    assert not (tmp_path / STATE_NAME).exists()


@pytest.mark.compile
def test_an_unwritable_state_is_a_warning(same, tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(denoise_state, "atomic_path", full)
    generate(same(), stages=["text", "denoise"], run_dir=tmp_path, run_options=RunOptions(checkpoint_every=1))
    assert "step 1 could not be saved" in caplog.text and "No space left" in caplog.text
    assert (tmp_path / "denoise.safetensors").exists()


def test_a_state_of_other_blocks_or_options_is_not_taken(tmp_path, caplog):
    """Where an entry was promoted between a kill and the same command."""
    one = np.zeros((1, 2), np.float32)

    def opened(**choices):
        state = StateFile(tmp_path, "x")
        state.depends_on(**choices)
        return state

    opened(attention={"block_sizes": 1}, options={}).save(DenoiseState(1, one, one, np.zeros(3, np.uint8), [1.0]))
    for changed in (
        {"attention": {"block_sizes": 2}, "options": {}},
        {"attention": {"block_sizes": 1}, "options": "a"},
    ):
        assert opened(**changed).load() is None
    assert opened(options={}, attention={"block_sizes": 1}).load().step == 1


@pytest.mark.parametrize(
    ("every", "step_times_s", "expected"),
    [
        (None, [90.0, 0.86], [35, 70]),  # the first step is not representative
        (None, [90.0], []),
        (None, [1.0, 45.0], list(range(1, 101))),
        (10, [1.0], list(range(10, 101, 10))),
        (0, [1.0, 100.0], []),
    ],
)
def test_when_the_state_is_saved(every, step_times_s, expected, tmp_path):
    state_file = StateFile(tmp_path, "x", every)
    assert [step for step in range(1, 101) if state_file.due(step, step_times_s)] == expected
