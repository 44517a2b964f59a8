"""What a sweep writes for TensorBoard."""

import jax
import pytest

from splash_attn.types import AttentionShape, BlockSizes
from splash_workbench.errors import UserError
from splash_workbench.profiles import reader, sessions
from splash_workbench.trial_status import Label, Status
from tuning.traces import of_sweep

OPS = (
    {"name": "copy.1", "scope": "k", "category": "layout", "time_s": 1e-3, "start_s": 0.0, "calls": 1},
    {"name": "kernel.1", "scope": "", "category": "kernel", "time_s": 11.5e-3, "start_s": 1e-3, "calls": 1},
)


def test_the_best_predicted_trials_get_a_timeline_that_says_so(make_trial, tmp_path):
    blocks = [BlockSizes(128 * n, 512, 128) for n in (1, 2, 3)]
    trials = [make_trial(ops=OPS, block_sizes=block, time_samples_ms=(12.5 + n,)) for n, block in enumerate(blocks)]
    failed = make_trial(status=Status.WRONG)
    lines = list(of_sweep.write([*trials, failed], tmp_path, top=2))
    found = sessions.sessions(tmp_path)
    assert [session.run for _, session in found] == [
        "predicted-tiny-v6e-128-512-128-fixed_bound-bfloat16-256-4",
        "predicted-tiny-v6e-256-512-128-fixed_bound-bfloat16-256-4",
    ]
    for folder, session in found:
        assert session.label is Label.PREDICTED
        assert session.config["record_id"] in {trial.record_id for trial in trials[:2]}
        profile = reader.read(folder / "predicted.xplane.pb")
        assert profile.predicted and [step.duration_ps for step in profile.steps] == [12_500_000_000]
    assert any("--host 127.0.0.1" in line for line in lines)
    list(of_sweep.write(trials, tmp_path, top=2))
    assert len(sessions.sessions(tmp_path)) == 2  # the same prediction is no repeat


@pytest.mark.compile
def test_a_measured_trial_is_run_and_traced(make_trial, tmp_path):
    shape = AttentionShape(batch_size=1, num_heads=1, q_seq_len=131, kv_seq_len=137, head_dim=64)
    trial = make_trial(
        label=Label.MEASURED,
        device="cpu",
        device_kind="cpu",
        backend="measure",
        shape=shape,
        block_sizes=BlockSizes(128, 256, 128),
    )
    list(of_sweep.write([trial], tmp_path, top=1))
    ((folder, session),) = sessions.sessions(tmp_path)
    assert (session.run, session.label) == ("tiny-cpu-128-256-128-fixed_bound-bfloat16-256-4", Label.MEASURED)
    assert session.device == jax.devices()[0].device_kind
    (path,) = folder.glob("*.xplane.pb")
    profile = reader.read(path)
    assert [step.number for step in profile.steps] == list(range(1, of_sweep.TRACED_RUNS + 1))
    assert all(any("splash_attention" in op.scope for op in ops) for _, ops in profile.ops_by_step())


def test_top_is_checked(make_trial, tmp_path):
    with pytest.raises(UserError, match="profile_top=-1: expected 0 or more"):
        list(of_sweep.write([make_trial()], tmp_path, top=-1))


@pytest.mark.parametrize("name", ["", "../x", "a b", "-x"])
def test_names_of_runs_are_checked(name):
    with pytest.raises(UserError, match="expected a run's name"):
        sessions.check_name(name)


def test_repeats_are_numbered(tmp_path):
    recorder = sessions.Recorder(tmp_path, "run", {})
    with recorder.record("denoise"):
        pass
    with recorder.record("vae"):
        pass
    with sessions.Recorder(tmp_path, "run", {}).record("denoise"):
        pass
    assert [folder.name for folder, _ in sessions.sessions(tmp_path)] == ["run-denoise", "run-denoise.2", "run-vae"]
    with pytest.raises(RuntimeError, match="stop"), sessions.Recorder(tmp_path, "broken", {}).record():
        raise RuntimeError("stop")
    assert sessions.Recorder(tmp_path, "broken", {}).repeat == 1  # a session that did not end is none


def test_only_a_prediction_has_a_predicted_timeline(make_trial):
    with pytest.raises(ValueError, match="expected a prediction with ops"):
        of_sweep.space_of_trial(make_trial())
