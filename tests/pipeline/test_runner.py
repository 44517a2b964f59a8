import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline import runner
from pipeline.errors import PipelineError, RequestError, StageOutputError
from pipeline.files import append_json_line, atomic_path
from pipeline.request import STAGES, AttentionOptions
from pipeline.runner import generate, run_name
from pipeline.video import write_mp4


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory) -> tuple[Path, Path]:
    """The folder and the results of one complete run."""
    from pipeline.request import GenerateRequest

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
    original = runner._run_stage

    def run_stage(request, checkpoint, stage, *args):
        names.append(stage)
        return original(request, checkpoint, stage, *args)

    monkeypatch.setattr(runner, "_run_stage", run_stage)
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
    done = subprocess.run([sys.executable, "-c", _READ, str(path)], capture_output=True, check=True)
    meta = json.loads(done.stderr)
    width, height = meta["size"]
    return meta, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


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
    generate(same(), stages=["text", "denoise"], run_dir=run_dir, resume=False)
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

    def run_stage(request, checkpoint, stage, *args):
        names.append(stage)
        return {"prompt_embeds": np.ones(1), "latents": np.ones(1), "frames": np.zeros((2, 16, 16, 3), np.uint8)}, {}

    monkeypatch.setattr(runner, "_run_stage", run_stage)
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


def test_an_interrupted_run_goes_on_with_the_stage_it_was_in(finished, same, ran, tmp_path):
    def interrupt(event):
        if event.stage == "denoise" and event.step == 1:
            raise KeyboardInterrupt

    run_dir, stages = tmp_path / "run", ["text", "denoise"]
    with pytest.raises(KeyboardInterrupt):
        generate(same(), stages=stages, run_dir=run_dir, progress=interrupt)
    assert sorted(path.name for path in run_dir.iterdir()) == ["text.json", "text.safetensors"]
    ran.clear()
    generate(same(), stages=stages, run_dir=run_dir)
    assert ran == ["denoise"]
    assert (run_dir / "denoise.safetensors").read_bytes() == (finished[0] / "denoise.safetensors").read_bytes()


def test_names_of_runs(same):
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
    with pytest.raises(RequestError, match="taken': a file; expected a folder"):
        generate(same(), run_dir=tmp_path / "taken")


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
