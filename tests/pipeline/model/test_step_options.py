"""Which compiler options a denoising step is compiled with."""

import dataclasses
import json
import re

import pytest

from pipeline.model import step_options
from pipeline.model.step_options import Entry, StepCall
from pipeline.requests.errors import RequestError
from splash_workbench.provenance import package_versions

CALL = StepCall(
    device_kind="TPU v6 lite",
    num_devices=8,
    plan="ulysses dp=2 x model=4, weights replicated",
    tokens=39826,
    channels=3072,
    dtype="bfloat16",
    int8_linears=False,
    int8_attention=False,
    work="computed",
)


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    path = tmp_path / "shipped" / "step_options.json"
    monkeypatch.setattr(step_options, "SHIPPED", path)
    return path


def entry(call: StepCall = CALL, **changes) -> Entry:
    fields = {
        "options": {"xla_a": "1"},
        "label": "predicted",
        "time_s": 0.7,
        "default_time_s": 0.8,
        "versions": package_versions(("libtpu",)),
        "source": "abc",
        "created_at": "2026-01-01T00:00:00+00:00",
    }
    return Entry(call, **fields | changes)


def test_without_an_entry_it_is_the_default():
    assert step_options.choose(CALL) == step_options.DEFAULT
    int8 = dataclasses.replace(CALL, int8_linears=True)
    assert step_options.choose(int8) == step_options.INT8_DEFAULT != step_options.DEFAULT


def test_the_users_entry_comes_before_the_shipped_one(shipped):
    step_options.keep(shipped, entry())
    assert step_options.choose(CALL) == {"xla_a": "1"}
    step_options.keep(step_options.user_path(), entry(options={"xla_a": "2"}))
    assert step_options.choose(CALL) == {"xla_a": "2"}
    step_options.keep(step_options.user_path(), entry(options={"xla_a": "3"}))
    assert step_options.choose(CALL) == {"xla_a": "3"}
    assert len(step_options.read(step_options.user_path())) == 1


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(StepCall)])
def test_an_entry_is_for_exactly_its_step(shipped, field):
    step_options.keep(shipped, entry())
    value = getattr(CALL, field)
    other = not value if isinstance(value, bool) else value + value
    call = dataclasses.replace(CALL, **{field: other})
    assert step_options.choose(call) == step_options.default(call.int8_linears)


def test_an_entry_of_another_libtpu_is_left_out(shipped):
    step_options.keep(shipped, entry(versions={"libtpu": "0.0.1"}))
    assert step_options.choose(CALL) == step_options.DEFAULT


@pytest.mark.parametrize("content", ["{", json.dumps({"schema_version": 1, "entries": [{"call": {}}]}), "[]"])
def test_a_file_that_is_not_ours_is_named_in_one_line(shipped, content):
    shipped.parent.mkdir()
    shipped.write_text(content)
    with pytest.raises(RequestError, match=re.escape(f"{shipped}: unreadable compiler options")):
        step_options.choose(CALL)


def test_entries_are_kept_side_by_side(shipped):
    calls = [dataclasses.replace(CALL, num_devices=count) for count in (8, 4, 16)]
    for call in calls:
        step_options.keep(shipped, entry(call, options={"xla_a": str(call.num_devices)}))
    for call in calls:
        assert step_options.choose(call) == {"xla_a": str(call.num_devices)}


def test_hosts_see_that_their_entries_differ(shipped):
    before = step_options.entry_hashes()
    assert step_options.entry_hashes() == before
    step_options.keep(step_options.user_path(), entry())
    assert step_options.entry_hashes() != before
    assert step_options.entry_hashes(step=False) == before  # of the attention's blocks alone


def test_a_file_of_entries_that_is_no_text_has_a_hash_too(shipped):
    before = step_options.entry_hashes()
    step_options.user_path().parent.mkdir(parents=True, exist_ok=True)
    step_options.user_path().write_bytes(b"\xff\xfe\0")
    assert len(step_options.entry_hashes()) == len(before) + 1
