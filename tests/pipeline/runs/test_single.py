import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from helpers import PLENTY_S
from pipeline.requests.errors import PipelineError, RequestError, StageOutputError
from pipeline.requests.parallel_options import ParallelOptions
from pipeline.requests.request import STAGES, AttentionOptions
from pipeline.requests.run_names import run_name
from pipeline.requests.run_options import RunOptions
from pipeline.runs import preview
from pipeline.runs.request_run import RequestRun
from pipeline.runs.single import generate
from pipeline.runs.video import MAX_TAG_LENGTH, write_mp4
from pipeline.stages import resume as denoise_state
from pipeline.stages.resume import STATE_NAME, StateFile
from splash_workbench.files import append_json_line, atomic_path


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The folder and the results of one complete run."""
    from pipeline.requests.request import GenerateRequest

    folder = tmp_path_factory.mktemp("runs")
    request = GenerateRequest(
        "a cat", str(tiny_folder), height=48, width=80, num_frames=9, num_inference_steps=2, seed=7
    )
    generate(request, run_dir=folder / "run", results_path=folder / "results.jsonl")
    return folder / "run", folder / "results.jsonl"


@pytest.fixture
def run_dir(finished, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


@pytest.fixture
def same(request_of):
    """Makes the request of `finished`, with changes."""
    return lambda **changes: request_of(**{"prompt": "a cat", "num_inference_steps": 2, **changes})


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Names of the stages that are really run."""
    names: list[str] = []
    original = RequestRun._compute

    def compute(self, stage, *args):
        names.append(stage)
        return original(self, stage, *args)

    monkeypatch.setattr(RequestRun, "_compute", compute)
    return names


_READ = """
import imageio_ffmpeg, json, sys
reader = imageio_ffmpeg.read_frames(sys.argv[1])
print(json.dumps(next(reader)), file=sys.stderr)
for frame in reader:
    sys.stdout.buffer.write(frame)
"""


def _probe(path: Path) -> tuple[dict, np.ndarray]:
    """What ffmpeg says of a video, and its frames; in another process, because imageio_ffmpeg forks."""
    done = subprocess.run([sys.executable, "-c", _READ, str(path)], capture_output=True, check=True, timeout=PLENTY_S)
    meta = json.loads(done.stderr)
    width, height = meta["size"]
    return meta, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def _tags(path: Path) -> dict[str, str]:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PLENTY_S)
    lines = re.split(r"(?<!\\)\n", done.stdout.decode())
    return {name: re.sub(r"\\(.)", r"\1", value, flags=re.S) for name, _, value in (x.partition("=") for x in lines)}


def test_tags_hold_any_text(tmp_path):
    title = 'it\'s "red"; 50% = #1 \\ 日本\nsecond line'
    write_mp4(tmp_path / "video.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8, {"title": title, "comment": "x" * 200_000})
    tags = _tags(tmp_path / "video.mp4")
    assert tags["title"] == title
    assert tags["comment"] == "x" * MAX_TAG_LENGTH


@pytest.mark.compile
def test_what_a_run_leaves(finished):
    run_dir, results = finished
    assert sorted(path.name for path in run_dir.iterdir()) == sorted(
        [f"{stage}.{suffix}" for stage in STAGES for suffix in ("json", "safetensors")] + ["video.json", "video.mp4"]
    )
    meta, frames = _probe(run_dir / "video.mp4")
    assert (meta["size"], meta["fps"], meta["codec"]) == ([80, 48], 8.0, "h264")
    assert meta["pix_fmt"].startswith("yuv420p")
    expected = load_file(run_dir / "vae.safetensors")["frames"]
    assert frames.shape == expected.shape == (9, 48, 80, 3)
    # Chroma is stored at half the resolution, so compare brightness.
    assert np.abs(frames.mean(-1) - expected.mean(-1)).mean() < 12
    (line,) = results.read_text().splitlines()
    record = json.loads(line)
    assert record["schema_version"] == 1
    assert record["label"] == "measured"
    assert record["device"]["platform"] == "cpu"
    assert record["attention"]["implementation"] == "xla"
    assert record["request"]["num_inference_steps"] == 2
    assert {"jax", "torch", "diffusers"} <= set(record["versions"])
    assert list(record["stages"]) == list(STAGES)
    assert len(record["stages"]["denoise"]["step_times_s"]) == 2
    sidecar = json.loads((run_dir / "video.json").read_text())
    assert sidecar["request"] == record["request"]
    assert sidecar["options"]["parallel"]["plan"] == "auto"
    assert set(sidecar["weights"]) == set(STAGES)
    tags = _tags(run_dir / "video.mp4")
    assert tags["title"] == "a cat"
    comment = json.loads(tags["comment"])
    assert comment["seed"] == 7 and comment["prompt"] == "a cat" and comment["fingerprint"] == sidecar["fingerprint"]
    assert comment["versions"] == record["versions"] and comment["git"] == record["git"]
    assert [timing["stage"] for timing in sidecar["stages"]] == list(STAGES)


def test_the_same_request_reuses_everything_and_records_nothing(run_dir, same, ran, tmp_path):
    before = {path.name: path.read_bytes() for path in run_dir.glob("*.safetensors")}
    result = generate(same(), run_dir=run_dir, results_path=tmp_path / "results.jsonl")
    assert ran == []
    assert all(timing.reused for timing in result.timings)
    assert {path.name: path.read_bytes() for path in run_dir.glob("*.safetensors")} == before
    assert not (tmp_path / "results.jsonl").exists()
    assert json.loads((run_dir / "video.json").read_text())["attention"]["implementation"] == "xla"


def test_another_rate_only_writes_the_video_again(run_dir, same, ran):
    generate(same(fps=12), run_dir=run_dir)
    assert ran == []
    assert _probe(run_dir / "video.mp4")[0]["fps"] == 12.0


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


def test_a_stage_with_another_requests_input(run_dir, same):
    with pytest.raises(StageOutputError, match=r"denoise: .* another request \(seed: saved 7, wanted 8\)"):
        generate(same(seed=8), stages=["vae"], run_dir=run_dir)


@pytest.mark.compile
def test_other_weights_are_another_request(run_dir, same, tiny_folder, tmp_path, caplog, ran):
    copy = Path(shutil.copytree(tiny_folder, tmp_path / "copy"))
    generate(same(checkpoint=str(copy)), run_dir=run_dir)
    assert ran == [], "the same weights in another place are the same"
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    generate(same(checkpoint=str(copy)), run_dir=run_dir)
    assert ran == ["vae"]
    assert "vae_weights: saved" in caplog.text


@pytest.mark.parametrize("damage", ["truncated", "missing", "foreign"])
def test_damaged_output_is_made_anew(damage, run_dir, same, ran, caplog):
    path = run_dir / "denoise.safetensors"
    before = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(before[:1000])
    elif damage == "missing":
        path.unlink()
    else:  # a crash between the two writes of another request
        shutil.copy(run_dir / "text.safetensors", path)
    generate(same(), run_dir=run_dir)
    assert ran == ["denoise"]
    assert path.read_bytes() == before
    assert "running it again" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_damaged_description(content, run_dir, same, ran):
    (run_dir / "text.json").write_text(content)
    generate(same(), stages=["text"], run_dir=run_dir)
    assert ran == ["text"]


@pytest.mark.compile
@pytest.mark.parametrize("changes", [{"scheduler": "dpm"}, {"dtype": "bfloat16"}], ids=str)
def test_an_interrupted_run_goes_on_with_the_step_it_was_in(changes, same, ran, tmp_path):
    """Also with a scheduler that draws noise: the generator's state comes back."""
    request, stages = same(**changes, num_inference_steps=5), ["text", "denoise"]

    def interrupt(event):
        if event.stage == "denoise" and event.step == 3:
            raise KeyboardInterrupt

    generate(request, stages=stages, run_dir=tmp_path / "whole")
    run_dir = tmp_path / "run"
    for every in (2, 0):  # saved after step 2, and after step 3 because of the interrupt
        with pytest.raises(KeyboardInterrupt):
            options = RunOptions(checkpoint_every=every)
            generate(request, stages=stages, run_dir=run_dir, run_options=options, progress=interrupt)
        assert sorted(path.name for path in run_dir.iterdir()) == [STATE_NAME, "text.json", "text.safetensors"]
    ran.clear()
    events = []
    result = generate(request, stages=stages, run_dir=run_dir, progress=events.append)
    assert ran == ["denoise"]
    steps = [event.step for event in events if event.phase == "run" and event.total_steps]
    assert steps == [3, 4, 5]
    assert len(result.timings[1].step_times_s) == 5
    assert (run_dir / "denoise.safetensors").read_bytes() == (tmp_path / "whole" / "denoise.safetensors").read_bytes()
    assert json.loads((run_dir / "denoise.json").read_text())["resumed_at_step"] == 3
    assert not (run_dir / STATE_NAME).exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [("other request", "belongs to another request"), ("truncated", "is not readable"), ("no resume", "")],
)
def test_a_state_that_does_not_fit_is_not_taken(damage, message, same, tmp_path, caplog):
    def interrupt(event):
        if event.stage == "denoise" and event.step == 2:
            raise KeyboardInterrupt

    request, stages, resume = same(num_inference_steps=3), ["text", "denoise"], True
    with pytest.raises(KeyboardInterrupt):
        generate(request, stages=stages, run_dir=tmp_path, progress=interrupt)
    if damage == "other request":
        request = dataclasses.replace(request, seed=8)
    elif damage == "truncated":
        (tmp_path / STATE_NAME).write_bytes((tmp_path / STATE_NAME).read_bytes()[:300])
    else:
        resume = False
    events = []
    options = RunOptions(resume=resume)
    generate(request, stages=stages, run_dir=tmp_path, run_options=options, progress=events.append)
    steps = [event.step for event in events if event.stage == "denoise" and event.total_steps]
    assert steps == [0, 1, 2, 3]
    assert message in caplog.text
    assert not (tmp_path / STATE_NAME).exists()


def test_an_unwritable_state_is_a_warning(same, tmp_path, caplog, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(denoise_state, "atomic_path", full)
    generate(same(), stages=["text", "denoise"], run_dir=tmp_path, run_options=RunOptions(checkpoint_every=1))
    assert "step 1 could not be saved" in caplog.text and "No space left" in caplog.text
    assert (tmp_path / "denoise.safetensors").exists()


@pytest.mark.parametrize(
    ("every", "step_times_s", "expected"),
    [
        (None, [90.0, 0.86], [35, 70]),  # the first step is not representative
        (None, [90.0], []),
        (None, [1.0, 45.0], list(range(1, 101))),
        (10, [1.0], list(range(10, 101, 10))),
        (0, [1.0, 100.0], []),
    ],
)
def test_when_the_state_is_saved(every, step_times_s, expected, tmp_path):
    state_file = StateFile(tmp_path, "x", every)
    assert [step for step in range(1, 101) if state_file.due(step, step_times_s)] == expected


def test_preview_pictures(same, tmp_path, monkeypatch, caplog):
    stages, options = ["text", "denoise"], RunOptions(preview_every=2)
    generate(same(), stages=stages, run_dir=tmp_path, run_options=options)
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.size == (2 * 80, 2 * 48)  # 3 latent frames, in 2 rows of 2

    def fail(latents):
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(preview, "contact_sheet", fail)
    generate(same(seed=8), stages=stages, run_dir=tmp_path, run_options=options)
    assert "no preview of step 2 (no picture)" in caplog.text


def test_names_of_runs(same):
    assert run_name(same(), "{line:03d} {slug} {seed}", 4) == "004 a-cat 7"
    for name in ("", ".", "..", "a/b", "/etc", "x" * 300, "{prompt}", "{seed", "{seed.real}", "{}", "{slug:d}", 3):
        with pytest.raises(RequestError, match="name="):
            run_name(same(), name)
    name = run_name(same(prompt="A cat, on a mat!"))
    assert name.startswith("a-cat-on-a-mat-80x48x9-seed7-")
    assert run_name(same(prompt="日本")).startswith("video-80x48x9")
    assert run_name(same(prompt="x" * 500)) != run_name(same(prompt="x" * 501))
    assert run_name(same(fps=30)) == run_name(same())
    assert run_name(same(guidance_scale=2.0)) != run_name(same())


def test_pallas_tpu_without_a_tpu_is_refused_before_any_work(same, ran, tmp_path):
    request = dataclasses.replace(same(), attention=AttentionOptions(implementation="pallas_tpu"))
    with pytest.raises(RequestError, match="'pallas_tpu': needs a TPU, and JAX runs on 'cpu'"):
        generate(request, run_dir=tmp_path / "run")
    assert ran == []


def test_a_file_where_the_folder_should_be(same, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(RequestError, match=r"taken is a file; expected a folder"):
        generate(same(), run_dir=tmp_path / "taken")
    with pytest.raises(RequestError, match=r"taken is a file; expected a folder"):
        generate(same(), output_dir=tmp_path / "taken" / "videos")


def test_a_plan_that_does_not_fit_is_refused_before_any_work(same, ran, tmp_path):
    options = RunOptions(parallel=ParallelOptions(num_devices=9))
    with pytest.raises(RequestError, match="num_devices=9: only"):
        generate(same(), run_dir=tmp_path, run_options=options)
    assert ran == []


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a" / "x.json"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_torn_line_stays_apart(tmp_path):
    path = tmp_path / "results" / "lines.jsonl"
    append_json_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2, "tor')
    append_json_line(path, {"a": 3})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"a": 1}
    assert json.loads(lines[2]) == {"a": 3}


def test_ffmpegs_refusal_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(PipelineError, match="ffmpeg could not encode 15x16 at 8 fps"):
        write_mp4(tmp_path / "video.mp4", np.zeros((2, 16, 15, 3), np.uint8), 8)
    assert list(tmp_path.iterdir()) == []
