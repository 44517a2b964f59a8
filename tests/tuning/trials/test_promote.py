import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splash_attn import tuned
from splash_attn.types import BlockSizes, Variant
from splash_workbench.trial_status import Label, Status
from tuning.trials.promote import Promotion, promote
from tuning.trials.records import Trial

MakeTrial = Callable[..., Trial]
SMALL, LARGE = BlockSizes(128, 256, 128), BlockSizes(512, 512, 256)


@pytest.fixture
def win(make_trial: MakeTrial, todays: MakeTrial, tmp_path: Path) -> Callable[..., Promotion]:
    """Promote a trial in a folder of the test's own. today: the fields of what would run today; None: it has no trial.

    Unless told otherwise, what would run today is slower by far.
    """

    def win(today: dict[str, Any] | None = None, known: bool = True, **changes: Any) -> Promotion:
        winner = make_trial(**changes)
        rivals = [todays(winner, tmp_path, **{"time_samples_ms": (99.0,)} | (today or {}))] if known else []
        return promote(winner, [winner, *rivals], tmp_path)

    return win


def entries(tmp_path: Path) -> list[BlockSizes]:
    return [entry.block_sizes for entry in tuned.load("TPU v6 lite", tmp_path)]


def test_a_winner_becomes_what_attention_chooses(
    win: Callable[..., Promotion], make_trial: MakeTrial, tmp_path: Path
) -> None:
    promotion = win(variant=Variant(softmax="online").to_dict(), record_id="r7")
    assert promotion.written and promotion.path == tmp_path / "tpu_v6_lite.json"
    trial = make_trial()
    choice = tuned.choose("TPU v6 lite", trial.shape, "bfloat16", directory=tmp_path)
    assert choice.entry is not None
    assert (choice.block_sizes, choice.variant) == (trial.block_sizes, Variant(softmax="online"))
    assert choice.entry.provenance.record_id == "r7"
    assert choice.entry.provenance.label == "predicted"


def test_only_what_beats_todays_choice_is_promoted(win: Callable[..., Promotion], tmp_path: Path) -> None:
    worse = win({"time_samples_ms": (0.013,)}, time_samples_ms=(0.015,), block_sizes=SMALL)
    assert not worse.written and "0.015 ms does not beat the 0.013 ms of what runs today" in worse.reason
    same = win({"time_samples_ms": (0.015,)}, time_samples_ms=(0.015,), block_sizes=SMALL)
    assert not same.written
    assert entries(tmp_path) == []
    better = win({"time_samples_ms": (0.013,)}, time_samples_ms=(0.012,), block_sizes=SMALL)
    assert better.written and "0.012 ms beats the 0.013 ms of what runs today (1024/" in better.reason
    # Now that entry is what runs today.
    assert not win({"time_samples_ms": (0.012,)}, time_samples_ms=(0.0125,), block_sizes=LARGE).written
    assert win({"time_samples_ms": (0.012,)}, time_samples_ms=(0.011,), block_sizes=LARGE).written
    assert entries(tmp_path) == [LARGE]


def test_a_neighbours_entry_is_what_a_winner_must_beat(
    win: Callable[..., Promotion], make_trial: MakeTrial, tmp_path: Path
) -> None:
    longer = dataclasses.replace(make_trial().shape, q_seq_len=15076, kv_seq_len=15076)
    assert win(shape=longer, block_sizes=LARGE).written
    promotion = win({"time_samples_ms": (1.0,)}, time_samples_ms=(2.0,), block_sizes=SMALL)
    assert not promotion.written and "what runs today (512/512/256" in promotion.reason


@pytest.mark.parametrize("fate", [Status.CRASHED, Status.TIMEOUT, None])
def test_what_cannot_be_compared_is_not_promoted(win: Callable[..., Promotion], tmp_path: Path, fate: Status) -> None:
    failed = {"status": fate, "time_samples_ms": (), "label": None, "numerics": None}
    promotion = win(failed, known=fate is not None)
    assert not promotion.written and "no time is known of what runs today" in promotion.reason
    other_context = win({"context": "c2"})
    assert not other_context.written and "no time is known" in other_context.reason
    assert entries(tmp_path) == []


@pytest.mark.parametrize("fate", [Status.OUT_OF_MEMORY, Status.COMPILE_ERROR, Status.WRONG])
def test_what_cannot_run_is_beaten(win: Callable[..., Promotion], fate: Status) -> None:
    promotion = win({"status": fate, "time_samples_ms": (), "label": None, "numerics": None})
    assert promotion.written and promotion.reason.endswith(f" is {fate}")


@pytest.mark.parametrize("variant", [Variant(lookahead=1), Variant("online")], ids=str)
@pytest.mark.parametrize("change", [{"kernel_hash": "k2"}, {"backend_hash": "b2"}, {"versions": {"jax": "0.11"}}])
def test_times_of_another_kernel_or_compiler_are_not_compared(
    win: Callable[..., Promotion], make_trial: MakeTrial, tmp_path: Path, change: dict, variant: Variant
) -> None:
    assert win(time_samples_ms=(10.0,)).written
    environment = dataclasses.replace(make_trial().environment, **change)
    # The entry's blocks take 12 ms now.
    promotion = win(
        {"time_samples_ms": (12.0,)}, time_samples_ms=(11.0,), environment=environment, variant=variant.to_dict()
    )
    assert promotion.written
    (entry,) = tuned.load("TPU v6 lite", tmp_path)
    assert entry.variant == variant


def test_the_same_winner_renews_an_entry_of_another_source_only(
    win: Callable[..., Promotion], make_trial: MakeTrial, tmp_path: Path
) -> None:
    assert win(time_samples_ms=(10.0,)).written
    again = win({"time_samples_ms": (10.0,)}, time_samples_ms=(10.0,))
    assert not again.written and again.reason.startswith("the same as what runs today (256/512/128")
    environment = dataclasses.replace(make_trial().environment, kernel_hash="k2")
    renewed = win({"time_samples_ms": (12.0,)}, time_samples_ms=(12.0,), environment=environment)
    assert renewed.written and "of another kernel source" in renewed.reason
    (entry,) = tuned.load("TPU v6 lite", tmp_path)
    assert entry.provenance.kernel_hash == "k2"


def test_a_users_winner_goes_to_the_users_file_and_stands_before_the_shipped(
    make_trial: MakeTrial, todays: MakeTrial
) -> None:
    shape = next(entry.shape for entry in tuned.load("TPU v6 lite", tuned.TUNED_DIR))
    shipped = tuned.path_for("TPU v6 lite").read_bytes()
    winner = make_trial(shape=shape, block_sizes=SMALL, time_samples_ms=(99.0,))
    promotion = promote(winner, [todays(winner, time_samples_ms=(100.0,))])
    assert promotion.written and promotion.path == tuned.path_for("TPU v6 lite", tuned.user_dir())
    assert tuned.path_for("TPU v6 lite").read_bytes() == shipped
    # Another kernel source: the times cannot be compared, and the user's is the later one.
    assert tuned.choose("TPU v6 lite", shape, "bfloat16").block_sizes == SMALL
    assert tuned.choose("TPU v6 lite", shape, "bfloat16", directory=tuned.TUNED_DIR).block_sizes != SMALL
    older = dataclasses.replace(winner, created_at="2020-01-01T00:00:00+00:00")
    promotion.path.unlink()
    promote(older, [todays(older, time_samples_ms=(100.0,))])
    assert tuned.choose("TPU v6 lite", shape, "bfloat16").block_sizes != SMALL


def test_other_shapes_softmaxes_and_labels_stand_beside(
    win: Callable[..., Promotion], make_trial: MakeTrial, tmp_path: Path
) -> None:
    shape = dataclasses.replace(make_trial().shape, q_seq_len=2039)
    for changes in (
        {},
        {"shape": shape},
        {"variant": Variant("online").to_dict(), "time_samples_ms": (2.0,)},
        {"label": Label.MEASURED, "block_sizes": LARGE},
    ):
        assert win(**changes).written, changes
    assert len(tuned.load("TPU v6 lite", tmp_path)) == 4
    content = json.loads((tmp_path / "tpu_v6_lite.json").read_text())
    assert content["device_kind"] == "TPU v6 lite"


def test_a_folder_that_cannot_be_written_is_said(win: Callable[..., Promotion], tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    promotion = win()
    assert not promotion.written and promotion.reason.startswith("cannot be written (")
    assert tuned.USER_VARIABLE in promotion.reason


def test_what_attention_would_run_without_is_not_promoted(win: Callable[..., Promotion], tmp_path: Path) -> None:
    promotion = win(compiler_options={"xla_a": "1"})
    assert not promotion.written and promotion.reason == "attention() runs without xla_a=1"
    assert entries(tmp_path) == []


def test_only_a_tpu_has_entries(make_trial: MakeTrial, tmp_path: Path) -> None:
    promotion = promote(make_trial(device="cpu", device_kind="cpu", label=Label.MEASURED), [], tmp_path)
    assert not promotion.written
    assert promotion.reason == "'cpu' is not a TPU"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"status": Status.WRONG}, {"numerics": None}, {"kernel": "jax_splash"}, {"time_samples_ms": ()}]
)
def test_what_is_not_ours_and_checked_is_refused(make_trial: MakeTrial, tmp_path: Path, changes: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        promote(make_trial(**changes), [], tmp_path)
