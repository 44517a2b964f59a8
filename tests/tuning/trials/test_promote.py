import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from splash_attn import tuned
from splash_attn.types import BlockSizes, Variant
from splash_workbench.status import Label, Status
from tuning.trials.promote import promote
from tuning.trials.records import Trial

MakeTrial = Callable[..., Trial]


def test_a_winner_becomes_what_attention_chooses(make_trial: MakeTrial, tmp_path: Path) -> None:
    trial = make_trial(variant=Variant(softmax="online").to_dict())
    promotion = promote(trial, tmp_path)
    assert promotion.written and promotion.path.name == "tpu_v6_lite.json"
    choice = tuned.choose("TPU v6 lite", trial.shape, "bfloat16", directory=tmp_path)
    assert choice.entry is not None
    assert (choice.block_sizes, choice.variant) == (trial.block_sizes, Variant(softmax="online"))
    assert choice.entry.provenance.record_id == trial.record_id
    assert choice.entry.provenance.label == "predicted"


def test_only_a_better_time_replaces_an_entry(make_trial: MakeTrial, tmp_path: Path) -> None:
    assert promote(make_trial(time_samples_ms=(10.0,)), tmp_path).written
    worse = promote(make_trial(time_samples_ms=(11.0,)), tmp_path)
    assert not worse.written and "not better than the 10.000 ms" in worse.reason
    better = promote(make_trial(time_samples_ms=(9.0,), block_sizes=BlockSizes(128, 256, 128)), tmp_path)
    assert better.written and "9.000 ms beats 10.000 ms" in better.reason
    (entry,) = tuned.load("TPU v6 lite", tmp_path)
    assert entry.block_sizes == BlockSizes(128, 256, 128)


@pytest.mark.parametrize("variant", [Variant(lookahead=1), Variant("online")], ids=str)
@pytest.mark.parametrize("change", [{"kernel_hash": "k2"}, {"backend_hash": "b2"}, {"versions": {"jax": "0.11"}}])
def test_times_of_another_kernel_or_compiler_are_not_compared(
    make_trial: MakeTrial, tmp_path: Path, change: dict, variant: Variant
) -> None:
    promote(make_trial(time_samples_ms=(10.0,)), tmp_path)
    environment = dataclasses.replace(make_trial().environment, **change)
    worse = make_trial(time_samples_ms=(11.0,), environment=environment, variant=variant.to_dict())
    assert promote(worse, tmp_path).written
    (entry,) = tuned.load("TPU v6 lite", tmp_path)
    assert entry.variant == variant


def test_other_shapes_softmaxes_and_labels_stand_beside(make_trial: MakeTrial, tmp_path: Path) -> None:
    shape = dataclasses.replace(make_trial().shape, q_seq_len=2039)
    for changes in ({}, {"shape": shape}, {"variant": Variant("online").to_dict()}, {"label": Label.MEASURED}):
        assert promote(make_trial(**changes), tmp_path).written
    assert len(tuned.load("TPU v6 lite", tmp_path)) == 4
    content = json.loads((tmp_path / "tpu_v6_lite.json").read_text())
    assert content["device_kind"] == "TPU v6 lite"


def test_only_a_tpu_has_entries(make_trial: MakeTrial, tmp_path: Path) -> None:
    promotion = promote(make_trial(device="cpu", device_kind="cpu", label=Label.MEASURED), tmp_path)
    assert not promotion.written
    assert promotion.reason == "'cpu' is not a TPU"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"status": Status.WRONG}, {"numerics": None}, {"kernel": "jax_splash"}, {"time_samples_ms": ()}]
)
def test_what_is_not_ours_and_checked_is_refused(make_trial: MakeTrial, tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        promote(make_trial(**changes), tmp_path)
