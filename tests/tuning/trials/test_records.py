import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from splash_workbench.records import jsonl
from splash_workbench.trial_status import Label, Status
from tuning.trials import records, tables
from tuning.trials.records import Trial

MakeTrial = Callable[..., Trial]


def test_a_trial_survives_the_disk(make_trial: MakeTrial, tmp_path: Path) -> None:
    trials = [
        make_trial(ops=({"name": "splash", "cycles": 7},), notes=("note",)),
        make_trial(status=Status.TIMEOUT, error="killed", log_tail="...", numerics=None),
        make_trial(compiler_options={"xla_a": "1"}),
        make_trial(block_sizes=None, label=Label.REPORTED, numerics=None),
    ]
    for trial in trials:
        jsonl.append(tmp_path / "new" / "trials.jsonl", trial)
    assert records.read(tmp_path / "new" / "trials.jsonl") == trials
    assert records.read_all(tmp_path) == trials


def test_a_record_from_before_there_were_compiler_options_is_read(make_trial: MakeTrial) -> None:
    fields = jsonl.encode(make_trial())
    del fields["compiler_options"]
    assert jsonl.decode(fields, Trial).compiler_options == {}
    assert make_trial(compiler_options={"xla_a": "1"}).config.endswith(" xla_a=1")


@pytest.mark.parametrize("status", [status for status in Status if status is not Status.OK])
def test_only_an_ok_trial_has_a_time(make_trial: MakeTrial, status: Status) -> None:
    with pytest.raises(ValueError, match="only an ok trial has one"):
        make_trial(status=status, time_samples_ms=(1.0,), label=Label.PREDICTED)


def test_a_time_says_how_it_was_got(make_trial: MakeTrial) -> None:
    with pytest.raises(ValueError, match="label=None"):
        make_trial(label=None)


def test_a_failed_check_is_not_ok(make_trial: MakeTrial) -> None:
    numerics = make_trial().numerics
    assert numerics is not None
    for error in (1.0, float("nan")):
        with pytest.raises(ValueError, match="expected 'wrong'"):
            make_trial(numerics=dataclasses.replace(numerics, rms_error=error))


def test_the_time_is_the_median_of_the_samples(make_trial: MakeTrial) -> None:
    assert make_trial(time_samples_ms=(5.0, 1.0, 100.0)).time_ms == 5.0


def test_a_torn_line_costs_only_itself(make_trial: MakeTrial, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    first, second = make_trial(), make_trial()
    jsonl.append(path, first)
    with path.open("a") as file:
        file.write(json.dumps(jsonl.encode(make_trial()))[:100])  # killed in mid-write
    with pytest.warns(UserWarning, match=r"trials.jsonl:2: skipped a torn line of 100 bytes"):
        assert records.read(path) == [first]
    jsonl.append(path, second)
    with pytest.warns(UserWarning, match="torn"):
        assert records.read(path) == [first, second]


def test_another_schema_is_refused(make_trial: MakeTrial, tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    path.write_text(json.dumps(jsonl.encode(make_trial()) | {"schema_version": 99}) + "\n")
    with pytest.raises(ValueError, match=r"trials.jsonl:1: .*schema_version=99: expected 1"):
        records.read(path)


def test_measured_and_predicted_times_have_columns_of_their_own(make_trial: MakeTrial) -> None:
    frame = tables.frame([make_trial(), make_trial(label=Label.MEASURED, time_samples_ms=(20.0,))])
    assert frame["predicted_ms"].tolist()[0] == 12.5
    assert frame["measured_ms"].tolist()[1] == 20.0
    assert frame["predicted_ms"].isna().tolist() == [False, True]
    assert frame["measured_ms"].isna().tolist() == [True, False]


@pytest.mark.parametrize("status", list(Status))
def test_a_record_says_whether_it_is_conclusive(make_trial: Callable[..., Trial], status: Status) -> None:
    trial = make_trial(status=status, numerics=None)
    conclusive = status not in (Status.CRASHED, Status.TIMEOUT)
    fields = jsonl.encode(trial)
    assert fields["conclusive"] is conclusive
    del fields["conclusive"]  # as in older records
    assert jsonl.decode(fields, Trial) == trial
    assert records.reusable([trial], timeout_s=1.0) == ([trial] if conclusive else [])
