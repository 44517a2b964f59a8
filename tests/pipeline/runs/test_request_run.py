"""One request from prompt to video: what a run leaves, reuses and refuses."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.requests.errors import RequestError, StageOutputError
from pipeline.requests.options import ParallelOptions, RunOptions
from pipeline.requests.request import STAGES, AttentionOptions
from pipeline.runs.request_run import RequestRun, generate
from splash_workbench.errors import UserError
from splash_workbench.files import locked
from videos import probe, tags

pytestmark = pytest.mark.compile  # the whole run that most of these copy


def test_what_a_run_leaves(finished):
    run_dir, results = finished
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(
        [f"{stage}.{suffix}" for stage in STAGES for suffix in ("json", "safetensors")] + ["video.json", "video.mp4"]
    )
    meta, frames = probe(run_dir / "video.mp4")
    assert (meta["size"], meta["fps"], meta["codec"]) == ([80, 48], 8.0, "h264")
    assert meta["pix_fmt"].startswith("yuv420p")
    expected = load_file(run_dir / "vae.safetensors")["frames"]
    assert frames.shape == expected.shape == (9, 48, 80, 3)
    # Chroma is stored at half the resolution, so compare brightness.
    assert np.abs(frames.mean(-1) - expected.mean(-1)).mean() < 12
    (line,) = results.read_text().splitlines()
    record = json.loads(line)
    assert record["schema_version"] == 2
    assert record["label"] == "measured"
    assert record["device"]["platform"] == "cpu"
    assert record["attention"]["implementation"] == "xla"
    assert record["compiler_options"] == {"computed": {}}  # a CPU has none
    assert record["request"]["num_inference_steps"] == 2
    assert {"jax", "torch", "diffusers"} <= set(record["environment"]["versions"])
    assert list(record["stages"]) == list(STAGES)
    assert len(record["stages"]["denoise"]["step_times_s"]) == 2
    sidecar = json.loads((run_dir / "video.json").read_text())
    assert sidecar["request"] == record["request"]
    assert sidecar["options"]["parallel"]["plan"] == "auto"
    assert set(sidecar["weights"]) == set(STAGES)
    found = tags(run_dir / "video.mp4")
    assert found["title"] == "a cat"
    comment = json.loads(found["comment"])
    assert comment["seed"] == 7 and comment["prompt"] == "a cat" and comment["fingerprint"] == sidecar["fingerprint"]
    assert comment["environment"] == record["environment"]
    assert [timing["stage"] for timing in sidecar["stages"]] == list(STAGES)


def test_the_same_request_reuses_everything_and_records_nothing(run_dir, same, ran, tmp_path):
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.safetensors")}
    result = generate(same(), run_dir=run_dir, results_path=tmp_path / "results.jsonl")
    assert ran == []
    assert all(timing.reused for timing in result.timings)
    assert {path.name: path.read_bytes() for path in run_dir.glob("*.safetensors")} == before
    assert not (tmp_path / "results.jsonl").exists()
    assert json.loads((run_dir / "video.json").read_text())["attention"]["implementation"] == "xla"


def test_a_run_killed_before_its_record_leaves_its_times_to_the_next(tmp_path, same, run_dir, ran):
    for stage in STAGES:  # as they are before a run ends
        path = run_dir / f"{stage}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "on_record": False}))
    (run_dir / "video.json").unlink()
    results = tmp_path / "results.jsonl"
    result = generate(same(), run_dir=run_dir, results_path=results)
    assert ran == []
    assert all(timing.reused for timing in result.timings)
    record = json.loads(results.read_text())
    assert list(record["stages"]) == list(STAGES) and record["reused_stages"] == []
    (run_dir / "video.json").unlink()
    generate(same(), run_dir=run_dir, results_path=results)
    assert len(results.read_text().splitlines()) == 1, "recorded twice"


def test_another_rate_only_writes_the_video_again(run_dir, same, ran):
    generate(same(fps=12), run_dir=run_dir)
    assert ran == []
    assert probe(run_dir / "video.mp4")[0]["fps"] == 12.0


def test_without_resume_stages_run_again_and_give_the_same_bits(run_dir, same, ran):
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.safetensors")}
    generate(same(), stages=["text", "denoise"], run_dir=run_dir, run_options=RunOptions(resume=False))
    assert ran == ["text", "denoise"]
    assert {path.name: path.read_bytes() for path in run_dir.glob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompt": "a dog"}, ["text", "denoise", "vae"]),
        ({"negative_prompt": "blue"}, ["text", "denoise", "vae"]),
        ({"seed": 8}, ["denoise", "vae"]),
        ({"num_inference_steps": 3}, ["denoise", "vae"]),
        ({"guidance_scale": 2.0}, ["denoise", "vae"]),
        ({"scheduler": "dpm"}, ["denoise", "vae"]),
        ({"attention": AttentionOptions(k_smooth=False)}, ["denoise", "vae"]),
    ],
    ids=str,
)
def test_a_changed_request_runs_what_depends_on_the_change(changes, expected, run_dir, same, monkeypatch, caplog):
    names = []

    def compute(self, stage, *args):
        names.append(stage)
        return {"prompt_embeds": np.ones(1), "latents": np.ones(1), "frames": np.zeros((2, 16, 16, 3), np.uint8)}, {}

    monkeypatch.setattr(RequestRun, "_compute", compute)
    generate(same(**changes), run_dir=run_dir)
    assert names == expected
    assert "was made for another request" in caplog.text
    assert next(iter(changes)) in caplog.text


def test_stages_one_at_a_time(finished, same, ran, tmp_path):
    run_dir = tmp_path / "run"
    for stage in STAGES:
        result = generate(same(), stages=[stage], run_dir=run_dir)
        assert (result.video_path is not None) == (stage == "vae")
    assert ran == list(STAGES)
    sidecar = json.loads((run_dir / "video.json").read_text())
    assert [timing["stage"] for timing in sidecar["stages"]] == ["vae"]
    assert sidecar["attention"]["implementation"] == "xla", "known from the denoise stage's own output"
    for stage in STAGES:
        name = f"{stage}.safetensors"
        assert (run_dir / name).read_bytes() == (finished[0] / name).read_bytes()


def test_a_stage_without_the_one_before(same, tmp_path):
    with pytest.raises(
        StageOutputError, match=r"denoise: no saved output in .*run that stage too \(stages=denoise,vae"
    ):
        generate(same(), stages=["vae"], run_dir=tmp_path)


@pytest.mark.parametrize("resume", [True, False])
def test_an_output_that_is_missing_in_between_is_told_before_the_first_stage(resume, same, ran, tmp_path):
    options = RunOptions(resume=resume)
    with pytest.raises(StageOutputError, match=r"no saved output in .*run that stage too \(stages=denoise,vae"):
        generate(same(), stages=["text", "vae"], run_dir=tmp_path / "run", run_options=options)
    assert ran == [] and not (tmp_path / "run").exists()


def test_a_stage_with_an_output_of_its_own_needs_no_other(run_dir, same, ran):
    for path in run_dir.glob("denoise.*"):
        path.unlink()
    generate(same(), stages=["text", "vae"], run_dir=run_dir)
    assert ran == []
    with pytest.raises(StageOutputError, match="no saved output"):
        generate(same(), stages=["text", "vae"], run_dir=run_dir, run_options=RunOptions(resume=False))
    assert ran == []


def test_a_stage_with_another_requests_input(run_dir, same):
    with pytest.raises(StageOutputError, match=r"denoise: .* another request \(seed: saved 7, wanted 8\)"):
        generate(same(seed=8), stages=["vae"], run_dir=run_dir)


def test_other_weights_are_another_request(run_dir, same, tiny_folder, tmp_path, caplog, ran):
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    generate(same(checkpoint=str(copy)), run_dir=run_dir)
    assert ran == [], "the same weights in another place are the same"
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    generate(same(checkpoint=str(copy)), run_dir=run_dir)
    assert ran == ["vae"]
    assert "vae_weights: saved" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign", "other bytes"])
def test_damaged_output_is_made_anew(damage, run_dir, same, ran, caplog):
    path = run_dir / "denoise.safetensors"
    before = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(before[:1000])
    elif damage == "missing":
        path.unlink()
    elif damage == "other bytes":
        path.write_bytes(before[:-4] + b"\0\1\2\3")
    else:  # a crash between the two writes of another request
        shutil.copy(run_dir / "text.safetensors", path)
    generate(same(), run_dir=run_dir)
    assert ran == ["denoise"]
    assert path.read_bytes() == before
    assert "running it again" in caplog.text


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """Collect the names of the stages that would be run; what they make is made up."""
    names: list[str] = []

    def compute(self, stage, *args):
        names.append(stage)
        return {"prompt_embeds": np.ones(1)}, {}

    monkeypatch.setattr(RequestRun, "_compute", compute)
    return names


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"\xff\x00", b"[" * 100_000, b'{"request": 1}', b'{"request": [], "fingerprint": ""}'],
    ids=lambda content: repr(content[:9]),
)
def test_damaged_description(content, run_dir, same, asked):
    (run_dir / "text.json").write_bytes(content)
    generate(same(), stages=["text"], run_dir=run_dir)
    assert asked == ["text"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("timings", value) for value in (None, [], {}, {"stage": "text", "load_time_s": "long"}, {"nope": 1})),
        *(("attention", value) for value in ([1], "xla", 1)),
    ],
    ids=repr,
)
def test_damaged_field(field, value, run_dir, same, asked):
    """In a file that is the request's own in all else."""
    path = run_dir / "text.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, field: value}))
    generate(same(), stages=["text"], run_dir=run_dir)
    assert asked == ["text"]


@pytest.mark.parametrize("name", ["text.json", "vae.safetensors", "video.json", "video.mp4", ".lock"])
def test_a_folder_where_an_output_should_be(name, same, ran, tmp_path):
    (tmp_path / name).mkdir()
    with pytest.raises(
        UserError, match=f"^run_dir='.*': {re.escape(name)} is a folder there; expected another run_dir$"
    ):
        generate(same(), run_dir=tmp_path)
    assert ran == []


def test_a_folder_in_which_another_run_is_at_work(run_dir, same, ran):
    with locked(run_dir / ".lock", ""), pytest.raises(UserError, match=r"^run_dir='.*run': another process is at work"):
        generate(same(), run_dir=run_dir, run_options=RunOptions(resume=False))
    assert ran == []
    generate(same(), stages=["text"], run_dir=run_dir)
    assert not (run_dir / ".lock").exists()


def test_a_record_that_cannot_be_written_costs_no_video(run_dir, same, tmp_path, caplog):
    (run_dir / "video.mp4").unlink()
    (run_dir / "vae.json").unlink()
    generate(same(), run_dir=run_dir, results_path=tmp_path)
    assert re.search(r"results_path=.*Is a directory.*; video.json beside the video has the timings", caplog.text)
    assert probe(run_dir / "video.mp4")[0]["fps"] == same().fps


def test_pallas_tpu_without_a_tpu_is_refused_before_any_work(same, ran, tmp_path):
    request = dataclasses.replace(same(), attention=AttentionOptions(implementation="pallas_tpu"))
    with pytest.raises(RequestError, match="'pallas_tpu': needs a TPU, and JAX runs on 'cpu'"):
        generate(request, run_dir=tmp_path / "run")
    assert ran == []


def test_a_file_where_the_folder_should_be(same, tmp_path):
    (tmp_path / "taken").write_text("")
    for where in ({"run_dir": tmp_path / "taken"}, {"output_dir": tmp_path / "taken" / "videos"}):
        with pytest.raises(UserError, match=r"^run_dir='.*: cannot write .* \(Not a directory\); "):
            generate(same(), **where)


def test_a_plan_that_does_not_fit_is_refused_before_any_work(same, ran, tmp_path):
    options = RunOptions(parallel=ParallelOptions(num_devices=9))
    with pytest.raises(RequestError, match="num_devices=9: only"):
        generate(same(), run_dir=tmp_path, run_options=options)
    assert ran == []
