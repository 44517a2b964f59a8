"""The gate: it measures what it says, lets equal ways pass, and fails where harm was planted in attention."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import splash_attn
from pipeline.checkpoints.shapes import draw, parse_caption, random_scene
from pipeline.quality import __main__ as quality
from pipeline.quality import judge, pairs
from pipeline.quality.config import Budget
from pipeline.quality.gate import Comparison, QualityVariant, measure
from pipeline.quality.render import Made, variant_videos
from pipeline.requests.config import GenerateConfig
from pipeline.requests.options import ParallelOptions, to_parallel
from pipeline.requests.request import AttentionOptions, to_request
from splash_workbench.records.quality import PairRecord

CAPTION = "a red circle moves right"
BUDGET = Budget(psnr_db=35, ssim=0.98, lpips=0.02)


def candidate(**changes) -> QualityVariant:
    config = GenerateConfig(prompt=CAPTION, **changes)
    return QualityVariant("mine", to_request(config), to_parallel(config), BUDGET)


def video(rng: np.random.Generator, caption: str = CAPTION) -> np.ndarray:
    return draw(random_scene(rng, 64, 96, **parse_caption(caption)), 17, 64, 96)[None].astype(np.float32) / 255


def compare(variant, videos, reference, captions) -> Comparison:
    """Compare float videos [videos, frames, height, width, 3] with the reference's."""
    records = [
        PairRecord(
            key="",
            candidate=variant.name,
            prompt=caption,
            seed=0,
            denoise_time_s=1.0,
            steps_computed=8,
            **measure(one, other, with_lpips=True, with_readings=True),
        )
        for one, other, caption in zip(videos, reference, captions, strict=True)
    ]
    return Comparison(variant, records)


def test_the_reference_itself_passes(rng):
    drawn = video(rng)
    outcome = compare(candidate(), drawn, drawn, [CAPTION])
    assert outcome.psnr_db == (float("inf"),) and outcome.ssim == (1.0,) and outcome.lpips == (0.0,)
    assert outcome.read_back == {"colour": 1.0, "shape": 1.0, "motion": 1.0, "all": 1.0}
    assert outcome.failures == []


@pytest.mark.parametrize(("error", "expected"), [(0.01, 40.0), (0.1, 20.0)])
def test_psnr_is_of_the_mean_squared_error(rng, error, expected):
    drawn = video(rng) * 0.8
    outcome = compare(candidate(), drawn + np.float32(error), drawn, [CAPTION])
    assert outcome.psnr_db[0] == pytest.approx(expected, abs=1e-3)
    assert (outcome.failures != []) == (expected < 35)


def test_one_bad_video_among_good_ones_is_seen(rng):
    drawn = np.concatenate([video(rng)] * 3)
    harmed = drawn.copy()
    harmed[1] += rng.normal(0, 0.05, harmed[1].shape).astype(np.float32)
    failures = compare(candidate(), harmed.clip(0, 1), drawn, [CAPTION] * 3).failures
    assert [failure.split(" 0.")[0].split(" 2")[0] for failure in failures] == ["PSNR", "SSIM", "LPIPS"]


def test_another_picture_reads_otherwise(rng):
    failures = compare(candidate(), video(rng, "a red circle moves left"), video(rng), [CAPTION]).failures
    assert failures[-1] == "reads otherwise than the reference in 1 of 1"


def test_nan_does_not_pass(rng):
    drawn = video(rng)
    harmed = drawn.copy()
    harmed[0, 0, 0, 0, 0] = np.nan
    with np.errstate(invalid="ignore"):
        assert compare(candidate(), harmed, drawn, [CAPTION]).failures


# --- the command, with attention that is harmed where a candidate asks for the kernel


def _drop_the_last_keys(q, k, v):
    return k[:, :, :-8], v[:, :, :-8], None


def _noise(q, k, v):
    return k, v, 0.1 * jax.random.normal(jax.random.key(0), q.shape, jnp.float32)


def _none(q, k, v):
    return k, v, None


HARMS = (_none, _drop_the_last_keys, _noise)


@pytest.fixture
def plant(monkeypatch):
    """Make what candidates call the kernel XLA's attention with harm done to it: HARMS[variant.lookahead]."""
    real = splash_attn.attention

    def attention(q, k, v, *, implementation, **options):
        if implementation != "pallas_interpret":
            return real(q, k, v, implementation=implementation, **options)
        length = options.pop("kv_seq_len")  # behind it are no keys
        k, v, added = HARMS[options["variant"].lookahead](q, k[:, :, :length], v[:, :, :length])
        out = real(q, k, v, implementation="xla", **{**options, "block_sizes": None, "variant": None})
        return out if added is None else out + (added * jnp.std(out)).astype(out.dtype)

    monkeypatch.setattr(splash_attn, "attention", attention)


def command(monkeypatch, tmp_path: Path, *arguments: str) -> int:
    common = (f"captions=[{CAPTION}]", "seeds=[1001]", "follows=0", f"results_path={tmp_path / 'quality.jsonl'}")
    monkeypatch.setattr(sys, "argv", ["quality", *common, "compilation_cache=false", *arguments])
    return quality.main()


@pytest.mark.compile
@pytest.mark.usefixtures("plant")
@pytest.mark.parametrize(
    "harms",
    [(_none, _drop_the_last_keys), pytest.param((_none, _noise), marks=pytest.mark.slow("40 s"))],
    ids=lambda harms: harms[1].__name__,
)
def test_planted_harm_is_seen_and_nothing_else(harms, monkeypatch, tmp_path, capsys):
    planted = (
        f"{{name: {harm.__name__}, attention: {{implementation: pallas_interpret, variant: {{lookahead: {number}}}}}}}"
        for number, harm in enumerate(HARMS)
        if harm in harms
    )
    code = command(monkeypatch, tmp_path, f"candidates=[{','.join(planted)}]", "num_inference_steps=2", "num_frames=9")
    reference, *records = [json.loads(line) for line in (tmp_path / "quality.jsonl").read_text().splitlines()]
    assert reference["psnr_db"] == [None] and reference["failures"] == []
    assert [record["candidate"] for record in records] == [harm.__name__ for harm in harms]
    assert reference["candidate"] == "reference"
    assert all(record["label"] == "measured" and record["device"]["platform"] == "cpu" for record in records)
    printed = capsys.readouterr().out
    equal, *harmed = (record["failures"] for record in records)
    assert equal == [] and all(failures[0].startswith("PSNR") for failures in harmed), printed
    assert code == 1 and "over budget" in printed


def test_without_failures_the_command_ends_well(monkeypatch, tmp_path, capsys, rng):
    drawn = video(rng)
    monkeypatch.setattr(pairs, "variant_videos", lambda variant, wanted, *_: [Made(drawn[0], 1.0, 8) for _ in wanted])
    for _ in range(2):  # the same command again adds no record
        assert command(monkeypatch, tmp_path, "candidates=[{name: same}]") == 0
        assert "all within budget" in capsys.readouterr().out
        lines = (tmp_path / "quality.jsonl").read_text().splitlines()
        assert [json.loads(line)["candidate"] for line in lines] == ["reference", "same"]


def test_prompts_that_are_no_text_are_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "mine.txt").write_bytes(b"\xff\xfe\0\n")
    assert command(monkeypatch, tmp_path, f"prompts={tmp_path / 'mine.txt'}") == 2
    assert "mine.txt': not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("captions=[a cat]", "prompt='a cat': expected 'a COLOUR SHAPE MOTION'"),
        ("first_frame_db=-1", "first_frame_db=-1.0: expected 0 or more, in dB"),
        ("budget.lpips=2", "budget.lpips=2.0: expected 0 to 1"),
        ("captions=[]", "captions=[]: expected at least one, or prompts="),
        ("seeds=[]", "seeds=[]: expected at least one, whole numbers from 0 to"),
        ("seeds=[1,1]", "seeds=[1, 1]: expected each once"),
        ("seeds=[3,-1]", "seeds=[3, -1]: expected at least one, whole numbers from 0 to"),
        ("candidates=[5]", "candidates=[5]: expected mappings with a name"),
        ("candidates=[{name: 5}]", "candidates: expected a name in {'name': 5}"),
        ("candidates=[{name: x, budget: 5}]", "candidate 'x': budget=5: expected some of psnr_db, ssim"),
        ("candidates=[{name: x, budget: {ssim: high}}]", "candidate 'x': budget.ssim='high': expected a number"),
        ("only=[nobody]", "only=['nobody']: expected some of online"),
        ("candidates=[{dtype: bfloat16}]", "candidates: expected a name"),
        ("candidates=[{name: x, dtype: float64}]", "candidate 'x': dtype='float64': expected one of float32"),
        ("candidates=[{name: x, colour: red}]", "candidate 'x': Key 'colour' not in 'GenerateConfig'"),
        (
            "candidates=[{name: x, attention: {variant: {speed: 1}}}]",
            "candidate 'x': attention.variant={'speed': 1}: expected some of {softmax: ...",
        ),
        (
            "candidates=[{name: x, budget: {fps: 1}}]",
            "candidate 'x': budget={'fps': 1}: expected some of psnr_db, ssim",
        ),
    ],
)
def test_bad_input_is_one_line(monkeypatch, tmp_path, capsys, argument, message):
    assert command(monkeypatch, tmp_path, argument) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]


def test_a_candidate_is_the_reference_but_for_what_it_names():
    base = GenerateConfig(prompt=CAPTION, num_inference_steps=3)
    base.attention.implementation = "xla"
    base.attention.k_smooth = False
    fields = {"name": "x", "attention": {"variant": {"softmax": "online"}}, "parallel": {"num_devices": 8}}
    made = judge._candidate(base, fields, Budget(psnr_db=30))
    assert made.request.num_inference_steps == 3
    assert dataclasses.replace(made.request.attention, variant=None) == AttentionOptions("xla", k_smooth=False)
    assert made.request.attention.variant.softmax == "online"
    assert made.parallel == ParallelOptions(num_devices=8) and made.budget.psnr_db == 30


@pytest.mark.slow("1 min each")
@pytest.mark.parametrize("plan", ["ulysses", "megatron"])
def test_plans_on_simulated_devices_keep_the_video(plan):
    changes = {"num_inference_steps": 2}
    wanted = [(CAPTION, 1001)]
    (expected,) = variant_videos(candidate(**changes), wanted)
    one = dataclasses.replace(candidate(**changes), parallel=ParallelOptions(plan=plan, num_devices=8))
    (made,) = variant_videos(one, wanted)
    outcome = compare(one, made.frames[None], expected.frames[None], [CAPTION])
    assert outcome.psnr_db[0] > 60 and outcome.failures == []
