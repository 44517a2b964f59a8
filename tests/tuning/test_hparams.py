"""Trials written for HParams, read back as TensorBoard reads them."""

import pytest

from splash_workbench.errors import UserError
from splash_workbench.profiles import sessions
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from tuning import hparams
from tuning.trials import records


@pytest.fixture
def trials(make_trial):
    failed = make_trial(status=Status.OUT_OF_MEMORY, error="too much")
    return [make_trial(kernel_time_ms=11.5, cycles=21_000_000, spill_count=0, vmem_bytes=3 * 2**20), failed]


def test_each_trial_has_its_parameters_and_only_ok_ones_figures(trials, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    folder = hparams.write(trials, tmp_path, "sweep-1")
    found = {}
    for run in folder.iterdir():
        events = EventAccumulator(str(run))
        events.Reload()
        content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
        start = metadata.parse_session_start_info_plugin_data(content)
        scalars = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
        found[start.group_name] = (start.hparams, scalars)
    assert set(found) == {trial.record_id for trial in trials}
    values, scalars = found[trials[0].record_id]
    assert (values["block_q"].number_value, values["block_kv"].number_value) == (256, 512)
    assert (values["softmax"].string_value, values["status"].string_value) == ("fixed_bound", "ok")
    assert scalars == {
        "attention ms (predicted)": 12.5,
        "kernel ms (predicted)": 11.5,
        "kernel Mcycles": 21,
        "spills": 0,
        "vmem MiB": 3,
    }
    values, scalars = found[trials[1].record_id]
    assert values["status"].string_value == "out_of_memory" and scalars == {}


def test_writing_again_replaces(trials, tmp_path):
    hparams.write(trials, tmp_path, "sweep-1")
    folder = hparams.write(trials[:1], tmp_path, "sweep-1")
    assert len(list(folder.glob("*/events.out.tfevents.*"))) == 1


def test_a_sweep_of_several_machines_is_one(trials, make_trial, tmp_path, monkeypatch, capsys):
    """Both have the same study's folder; some records are in both."""
    for machine, theirs in (("a", trials), ("b", [*trials[:1], make_trial()])):
        for trial in theirs:
            jsonl.append(tmp_path / "results" / machine / "sweeps" / "s" / records.TRIALS_FILE, trial)
    monkeypatch.setattr("sys.argv", ["hparams", f"results_dir={tmp_path / 'results'}", f"logdir={tmp_path / 'runs'}"])
    assert hparams.main() == 0
    assert "3 trials: " in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / "hparams" / "s").iterdir())) == 3


def test_command(trials, tmp_path, monkeypatch, capsys):
    for trial in trials:
        jsonl.append(tmp_path / "results" / "sweeps" / "s" / records.TRIALS_FILE, trial)
    arguments = [f"results_dir={tmp_path / 'results'}", f"logdir={tmp_path / 'runs'}"]
    monkeypatch.setattr("sys.argv", ["hparams", *arguments])
    assert hparams.main() == 0
    assert "2 trials" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["hparams", *arguments, "workload=wan_720p"])
    assert hparams.main() == 2
    assert "no trials of workload=wan_720p" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["hparams", arguments[0], f"logdir={tmp_path / 'file'}"])
    assert hparams.main() == 2
    assert f"logdir={tmp_path / 'file'}: cannot write" in capsys.readouterr().err


def test_without_tensorboard_the_error_names_the_extra(trials, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"cogvideox-splash\[trace\]"):
        hparams.write(trials, tmp_path, "sweep-1")
    assert not list(tmp_path.iterdir())
