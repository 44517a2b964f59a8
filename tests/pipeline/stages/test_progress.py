"""Traces of the stages of a small model, on the CPU."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.options import RunOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.requests.reuse import CacheOptions
from pipeline.runs.request_run import generate
from pipeline.stages import progress
from pipeline.stages.progress import StageClock, recorder_of, tracing
from splash_attn.types import BlockSizes
from splash_workbench.profiles import reader, sessions
from tuning.compare.inputs import resolve
from tuning.compare.table import rows_of


@pytest.fixture(scope="module")
def traced(tmp_path_factory, tiny_folder):
    """Result, sessions and logdir of one traced run."""
    folder = tmp_path_factory.mktemp("traced")
    request = GenerateRequest(
        prompt="a red circle",
        checkpoint=str(tiny_folder),
        height=48,
        width=80,
        num_frames=9,
        num_inference_steps=3,
        seed=7,
    )
    settings = GenerateConfig(profile=True, profile_run="small", logdir=str(folder / "runs"))
    with tracing(recorder_of(settings, request)):
        result = generate(request, run_dir=folder / "video", run_options=RunOptions(resume=False))
    profiles = {}
    for path, session in sessions.sessions(folder / "runs"):
        (plane,) = path.glob(f"*{reader.SUFFIX}")
        profiles[session.part] = (session, reader.read(plane))
    return result, profiles, folder / "runs"


@pytest.mark.compile
def test_each_stage_has_a_session_with_what_ran(traced):
    result, profiles, _ = traced
    assert set(profiles) == {"text", "denoise", "vae"}
    for part, (session, profile) in profiles.items():
        assert session.name == f"small-{part}" and session.label == "measured"
        assert session.config["num_inference_steps"] == 3
        assert profile.ops and {step.name for step in profile.steps} == {part}
    assert all(timings.profiled for timings in result.timings)


@pytest.mark.compile
def test_steps_are_numbered_and_their_ops_have_scopes(traced):
    _, profiles, _ = traced
    denoise = profiles["denoise"][1]
    assert [step.number for step in denoise.steps] == [1, 2, 3]
    for _, ops in denoise.ops_by_step():
        scopes = {op.scope for op in ops}
        for part in ("blocks/attention", "blocks/qkv", "blocks/norm1", "blocks/feed_forward", "embed", "project_out"):
            assert any(scope.startswith(f"denoise/{part}") for scope in scopes), (part, scopes)
        assert sum(bool(op.scope) for op in ops) > 0.8 * len(ops)  # counted: their times are the machine's
    assert any(scope.startswith("vae/level_0") for scope in profiles["vae"][1].seconds_by_scope())
    assert any(scope.startswith("text/encoder/block.0") for scope in profiles["text"][1].seconds_by_scope())


def compiler_events(logdir: Path) -> set[str]:
    names = set()
    for path in logdir.glob(f"plugins/profile/*/*{reader.SUFFIX}"):
        space = reader.parse(path)
        names |= {event.name for plane in space.planes for event in plane.event_metadata.values()}
    return {name for name in names if "compile" in name.lower()}


@pytest.mark.compile
def test_nothing_is_compiled_within_a_trace(traced, tmp_path):
    assert compiler_events(traced[2]) == set()
    with jax.profiler.trace(tmp_path):
        jax.jit(lambda x: x + 7)(np.ones(3)).block_until_ready()
    assert compiler_events(tmp_path)  # which would be seen


def test_without_profile_there_is_no_recorder(request_of):
    assert recorder_of(GenerateConfig(), request_of()) is None


def test_a_run_is_named_after_what_decides_its_time(request_of, tmp_path):
    request = request_of(attention=dataclasses.replace(request_of().attention, implementation="xla"))
    recorder = recorder_of(GenerateConfig(profile=True, logdir=str(tmp_path)), request)
    assert recorder.run == f"{Path(request.checkpoint).name}-80x48x{request.num_frames}-float32-xla"
    faster = request_of(quality="fast", quantization="int8", cache=CacheOptions("first_block"))
    recorder = recorder_of(GenerateConfig(profile=True, logdir=str(tmp_path)), faster)
    assert recorder.run.endswith("-float32-fast-int8-first_block")
    with pytest.raises(RequestError, match=r"profile_run=.*expected a run's name"):
        recorder_of(GenerateConfig(profile=True, profile_run="../x", logdir=str(tmp_path)), request)


def test_the_recorder_is_of_the_block_only():
    with tracing(None):
        assert progress._recorder.get() is None
    clock = StageClock("denoise")
    with clock.measure("run"):
        clock.start(2)
        clock.tick()
        clock.tick()
    assert not clock.timings.profiled and len(clock.timings.step_times_s) == 2


@pytest.mark.slow("1 min")
def test_a_planted_difference_is_found_in_its_scope(request_of, tmp_path):
    """The kernel interpreted instead of XLA's attention, on this machine: by far the slowest, and in attention only."""
    runs = {"xla": request_of(num_inference_steps=8), "kernel": request_of(num_inference_steps=8)}
    runs["kernel"] = dataclasses.replace(
        runs["kernel"],
        attention=AttentionOptions(implementation="pallas_interpret", block_sizes=BlockSizes(128, 128, 128)),
    )
    for run, request in runs.items():
        settings = GenerateConfig(profile=True, profile_run=run, logdir=str(tmp_path / "runs"))
        with tracing(recorder_of(settings, request)):
            generate(request, run_dir=tmp_path / run, stages=("text", "denoise"), run_options=RunOptions(resume=False))
    compared = [resolve(run, tmp_path / "runs", tmp_path) for run in runs]
    rows = {row.scope: row for row in rows_of(compared, depth=3)}
    attention = rows["denoise/blocks/attention"]
    assert attention.verdicts == ("slower",)
    more_s = {
        scope: row.cells[1].median_s - row.cells[0].median_s
        for scope, row in rows.items()
        if scope.startswith("denoise/") and None not in row.cells
    }
    assert more_s["denoise/blocks/attention"] > 0.8 * sum(map(abs, more_s.values())), more_s
    assert rows["denoise (step)"].verdicts == ("slower",)
