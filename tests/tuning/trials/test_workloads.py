"""A workload is its shape and dtype; its name is derived where it would be another's."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from splash_attn.types import AttentionShape
from tuning.trials import workloads
from tuning.trials.records import Trial
from tuning.trials.workloads import Workload

FIELDS: dict[str, Any] = {
    "name": "mine",
    "batch_size": 1,
    "num_heads": 2,
    "seq_len": 1021,
    "head_dim": 64,
    "dtype": "bfloat16",
}


def made(overridden: dict[str, Any], **file: Any) -> Workload:
    """Return the workload of a file whose fields are overridden on the command line."""
    return Workload.from_dict(FIELDS | file | overridden, overridden).under_its_own_name(overridden)


@pytest.mark.parametrize(
    ("overridden", "name"),
    [
        ({}, "mine"),
        ({"num_heads": 24}, "mine+1x24x1021x64"),
        ({"seq_len": 4680}, "mine+1x2x4680x64"),
        ({"q_seq_len": 1021, "kv_seq_len": 77}, "mine+1x2x1021-77x64"),
        ({"dtype": "float32"}, "mine+1x2x1021x64-float32"),
        ({"num_heads": 24, "name": "other"}, "other"),
        ({"num_heads": 24, "name": "wan_720p"}, "wan_720p+1x24x1021x64"),
        ({"name": "tiny"}, "tiny"),  # which is just this shape
    ],
)
def test_an_overridden_workload_has_a_name_of_its_own(overridden: dict[str, Any], name: str) -> None:
    assert made(overridden).name == name


@pytest.mark.parametrize("file", [{}, {"seq_len": None, "q_seq_len": 1021, "kv_seq_len": 1021}])
def test_a_length_is_never_half_given(file: dict[str, Any]) -> None:
    assert made({"seq_len": 4680}, **file).shape == AttentionShape(1, 2, 4680, 4680, 64)
    assert made({"q_seq_len": 4680, "kv_seq_len": 77}, **file).shape == AttentionShape(1, 2, 4680, 77, 64)
    for half in ({"q_seq_len": 4680}, {"kv_seq_len": 4680}, {"seq_len": 3, "q_seq_len": 3}, {"seq_len": None}):
        with pytest.raises(ValueError, match=r"expected workload\.seq_len for self-attention, or both"):
            made(half, **file)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a..b", ".a", "-a", "a b", "ä", "a" * 101, "a\n"])
def test_a_name_is_one_for_a_folder(name: str) -> None:
    with pytest.raises(ValueError, match=r"workload\.name="):
        made({"name": name})


def test_names_on_record_are_told_apart(make_trial: Callable[..., Trial]) -> None:
    shape = workloads.load("tiny").shape
    other = dataclasses.replace(shape, num_heads=24)
    trials = [
        make_trial(workload="tiny", shape=shape),
        make_trial(workload="tiny", shape=other),
        make_trial(workload="../x", shape=other),
        make_trial(workload="mine", shape=other),
        make_trial(workload="mine", shape=other, dtype="float32"),
    ]
    names = [trial.workload for trial in workloads.named_apart(trials)]
    suffix = "+1x24x1021x64"
    assert names == ["tiny", f"tiny{suffix}", "x.xx", f"mine{suffix}", f"mine{suffix}-float32"]
    Workload(names[2], other, "bfloat16")  # a name that can be one


def test_trials_with_compiler_options_have_names_of_their_own(make_trial: Callable[..., Trial]) -> None:
    options = {"xla_a": "1", "xla_b": "x/y"}
    trials = [make_trial(workload="mine"), make_trial(workload="mine", compiler_options=options)]
    trials.append(make_trial(workload="mine", compiler_options={f"xla_{'long' * 30}": "1"}))
    named = workloads.named_apart(trials)
    assert [trial.workload for trial in named[:2]] == ["mine", "mine+xla_a-1+xla_b-xxy"]
    assert named[2].workload.startswith("mine+options-")
    assert workloads.named_apart(named[:2])[1].workload == named[1].workload
