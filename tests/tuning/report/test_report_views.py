"""What is chosen of the records, without the command around it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from splash_attn.types import BlockSizes, Variant
from splash_workbench.records.jsonl import decode
from splash_workbench.records.prediction import PredictionRecord
from splash_workbench.records.quality import QualityRecord
from splash_workbench.trial_status import Label
from tuning.report import charts, kernels, parts, pipeline
from tuning.report.inputs import TrialFile
from tuning.trials.bound import bf16_bound_ms
from tuning.trials.figures import LIGHT
from tuning.trials.records import Trial
from tuning.validate.agreement import Pair, parity

MakeTrial = Callable[..., Trial]


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (14.6331, 4, "14.63"),
        (0.0123456, 3, "0.0123"),
        (106.47, 3, "106"),
        (39826.0, 3, "39,826"),
        (9.9996, 4, "10.000"),
        (0.0, 3, "0"),
        (None, 3, parts.MISSING),
        (float("inf"), 3, "inf"),
    ],
)
def test_significant_digits(value: float | None, digits: int, expected: str) -> None:
    assert parts.significant(value, digits) == expected


def test_a_kernel_is_where_its_flops_bytes_and_time_put_it(make_trial: MakeTrial) -> None:
    op = {"category": "kernel", "hbm_bytes": 3 * 10**6, "calls": 2}
    other = {"category": "layout", "hbm_bytes": 10**9, "calls": 1}
    trial = make_trial(time_samples_ms=(9.0,), kernel_time_ms=4.0, ops=(op, other))
    (roofline,) = kernels.rooflines([TrialFile("results/sweeps/x/trials.jsonl", (trial,))], [])
    ((shown, intensity, rate, fraction),) = roofline["rows"]
    flops = 4 * 3 * 1021 * 1013 * 64
    assert shown is trial
    assert intensity == pytest.approx(flops / 6e6)
    assert rate == pytest.approx(flops / 4e-3 / 1e12)
    assert fraction == pytest.approx(bf16_bound_ms(trial.shape, "bfloat16", "TPU v6 lite") / 4.0)
    assert f"<title>{kernels.describe(trial)}; " in roofline["svg"]


def test_kernels_without_traffic_are_counted_not_placed(make_trial: MakeTrial) -> None:
    op = {"category": "kernel", "hbm_bytes": 10**6, "calls": 1}
    placed = make_trial(ops=(op,))
    unknown = make_trial(block_sizes=BlockSizes(128, 128, 128))
    (roofline,) = kernels.rooflines([TrialFile("x", (placed, unknown))], [])
    assert roofline["skipped"] == 1
    assert len(roofline["rows"]) == 1


def test_int8_is_apart_from_what_is_exact(make_trial: MakeTrial) -> None:
    """It is faster and computes something else: no headline, no share of the bound of bf16."""
    op = {"category": "kernel", "hbm_bytes": 10**6, "calls": 1}
    exact = make_trial(time_samples_ms=(2.0,), kernel_time_ms=2.0, ops=(op,), variant={"qk_dtype": "bfloat16"})
    int8 = make_trial(time_samples_ms=(1.0,), kernel_time_ms=1.0, ops=(op,), variant={"qk_dtype": "int8"})
    peer = make_trial(time_samples_ms=(3.0,), kernel_time_ms=3.0, ops=(op,), kernel="jax_splash", variant={})
    file = TrialFile("results/peers/x/trials.jsonl", (exact, int8, peer))
    (peers,) = kernels.peers([file])
    assert peers["best_ratio"] == pytest.approx(1.5)
    assert [bar["name"] for bar in peers["bars"]["bars"]] == ["splash_attn int8", "splash_attn", "jax_splash"]
    (roofline,) = kernels.rooflines([], [file])
    assert [(kernels.series(row[0]), row[3] is None) for row in roofline["rows"]] == [
        ("splash_attn int8", True),
        ("splash_attn", False),
        ("jax_splash", False),
    ]


def test_the_newest_record_of_a_candidate_counts(make_trial: MakeTrial) -> None:
    first = make_trial(time_samples_ms=(1.0,), created_at="2026-11-01T00:00:00+00:00")
    again = make_trial(time_samples_ms=(2.0,), created_at="2026-11-02T00:00:00+00:00")
    other = make_trial(block_sizes=BlockSizes(128, 128, 128))
    assert kernels.newest_trials([again, first, other]) == [again, other]


def test_provenance_tells_old_kernel_sources_apart(make_trial: MakeTrial) -> None:
    trial = make_trial()
    old = dataclasses.replace(trial.environment, kernel_hash="0123456789abcdef", git_commit="f" * 40, git_dirty=True)
    text = kernels.origin_of_trials([trial, make_trial(environment=old)])
    assert f"kernel source 01234567 (not the present one), {trial.environment.kernel_hash[:8]};" in text
    assert "commit fffffff+changes, no commit;" in text


def test_stages_come_from_the_newest_record_that_has_them(samples: SimpleNamespace) -> None:
    old = samples.predicted(created_at="2026-11-01T00:00:00+00:00")
    denoise = {"denoise": samples.stage | {"time_s": 0.25, "breakdown_s": {"matmul": 0.25}}}
    new = samples.predicted(created_at="2026-11-02T00:00:00+00:00", stages=denoise, step_time_s=0.25)
    (case,) = pipeline.cases([decode(new, PredictionRecord), decode(old, PredictionRecord)])
    (row,) = case["plans"]
    assert row["step_s"] == 0.25
    assert row["total_s"] == pytest.approx(0.5 + 50 * 0.25 + 0.5)


def test_what_was_tried_and_not_taken_is_noted(samples: SimpleNamespace) -> None:
    others = {"megatron": 0.75, "seed_tp": "does not fit\nand more"}
    record = samples.predicted(other_plans=others, failures={"vae": "does not fit: 40 GiB"})
    (case,) = pipeline.cases([decode(record, PredictionRecord)])
    assert case["notes"] == [
        "megatron: 0.750 s a step, predicted and not taken",
        "seed_tp: does not fit, predicted and not taken",
        "ulysses: vae: does not fit: 40 GiB",
    ]


def test_a_plan_without_all_stages_has_no_total(samples: SimpleNamespace) -> None:
    run = decode(samples.predicted(stages={"denoise": samples.stage}), PredictionRecord)
    (case,) = pipeline.cases([run])
    assert case["plans"][0]["total_s"] is None
    assert case["plans"][0]["lacking"] == "text, vae"
    assert [stack["title"] for stack in case["stacks"]] == ["A denoising step"]


def test_another_kernel_in_place_of_ours_is_in_the_bar(samples: SimpleNamespace) -> None:
    """The record's step time has it, its breakdown has ours."""
    (case,) = pipeline.cases([decode(samples.predicted(step_time_s=0.75), PredictionRecord)])
    bar = next(stack for stack in case["stacks"] if stack["title"] == "A denoising step")["bars"][0]
    assert {s["name"]: s["value"] for s in bar["segments"]} == {"attention kernel": pytest.approx(0.55), "matmul": 0.2}
    assert bar["total"] == pytest.approx(0.75)


def test_reported_bars_are_labelled_and_on_the_same_scale(samples: SimpleNamespace) -> None:
    reported = {"label": "reported", "source": "somebody", "total_time_s": 52.0, "step_time_s": 1.0}
    (case,) = pipeline.cases([decode(samples.predicted(reported=reported), PredictionRecord)])
    whole = case["stacks"][0]
    assert [(bar["label"], bar["total"]) for bar in whole["bars"]] == [(Label.PREDICTED, 26.0), (Label.REPORTED, 52.0)]
    assert sum(segment["width"] for segment in whole["bars"][0]["segments"]) == pytest.approx(50)
    assert whole["bars"][1]["segments"][0]["width"] == pytest.approx(100)


def test_the_newest_line_of_each_candidate_is_shown(samples: SimpleNamespace) -> None:
    lines = [
        samples.judged(created_at="2026-11-02T00:00:00+00:00", psnr_db=[None] * 3, failures=["SSIM 0.9 < 0.98"]),
        samples.judged(created_at="2026-11-01T00:00:00+00:00"),
        samples.judged(candidate="int8"),
        samples.judged(candidate="int8", device={"platform": "tpu", "kind": "TPU v6 lite", "count": 8}),
    ]
    here, there = pipeline.quality([decode(line, QualityRecord) for line in lines])
    assert [row.candidate for row in here["rows"]] == ["online", "int8"]
    assert here["rows"][0].psnr_db == (None, None, None)
    assert here["rows"][0].failures == ("SSIM 0.9 < 0.98",)
    assert there["title"].endswith("on 8 x TPU v6 lite")


def test_pictures_take_their_colours_from_variables() -> None:
    pairs = [Pair("g", "a", Label.REPORTED, 1.0, 1.02), Pair("g", "c", Label.REPORTED, 3.0, 2.9)]
    svg = charts.to_svg(parity(pairs), "p", {"pair-0": "a < b"})
    assert "<title>a &lt; b</title>" in svg
    assert "var(--c1)" in svg
    assert LIGHT["c1"] not in svg
    assert svg == charts.to_svg(parity(pairs), "p", {"pair-0": "a < b"})
    alone = charts.standalone(svg)
    assert "prefers-color-scheme:dark" in alone


def test_a_newer_exact_sweep_does_not_hide_the_last_int8_one(make_trial: MakeTrial, tmp_path: Path) -> None:
    int8 = Variant(qk_dtype="int8").to_dict()
    old = make_trial(variant=int8, time_samples_ms=(11.5,))
    newer = make_trial(context="c2", time_samples_ms=(14.25,), created_at="2036-01-01T00:00:00+00:00")
    files = [
        TrialFile("results/sweeps/old/trials.jsonl", (old,)),
        TrialFile("results/sweeps/new/trials.jsonl", (newer,)),
    ]
    shown, outdated = kernels.sweeps(files, tmp_path / "results", top=3)
    assert [sweep["first"] for sweep in shown] == [newer, old] and outdated == []
