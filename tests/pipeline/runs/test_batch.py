"""Batches: the order, what a failure or a kill leaves."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from helpers import PLENTY_S, wait_until
from pipeline import generate
from pipeline.requests import media
from pipeline.requests.batch_file import read_entries
from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import DeviceMemoryError, RequestError
from pipeline.requests.options import RunOptions
from pipeline.requests.request import STAGES
from pipeline.runs import batch
from pipeline.runs.batch import Batch, Item
from pipeline.runs.request_run import RequestRun
from pipeline.runs.video import write_mp4
from pipeline.stages.denoise import Denoiser
from pipeline.stages.resume import STATE_NAME
from pipeline.terminal import batch_table
from videos import write_batch

ROOT = Path(generate.__file__).resolve().parents[1]


@pytest.fixture
def config(tiny_folder) -> GenerateConfig:
    return GenerateConfig(checkpoint=str(tiny_folder), height=48, width=80, num_frames=9, num_inference_steps=2)


def _prepare(folder, config, *lines, options=None, chosen=STAGES) -> list[Item]:
    path = write_batch(folder, *lines)
    return batch.prepare(read_entries(path, config), path, chosen, folder / "videos", options or RunOptions())


def _run(folder, config, *lines, options=None, progress=lambda event: None, **more):
    """The items, and what was said."""
    said = []
    options = options or RunOptions()
    items = _prepare(folder, config, *lines, options=options, **more)
    Batch(items, folder / "results.jsonl", progress, lambda place, text: said.append(f"{place} {text}")).run_all()
    return items, said


def test_a_line_of_no_checkpoint_is_named(tmp_path, config):
    with pytest.raises(RequestError, match=r"prompts.jsonl:2: checkpoint='nowhere': no such folder"):
        _prepare(tmp_path, config, {"prompt": "x"}, {"prompt": "x", "checkpoint": "nowhere"})


def test_what_many_lines_share_is_checked_once(tmp_path, config, monkeypatch):
    """A try at writing took 3 ms a line, a video as long as its decoding."""
    tried, decoded = [], []
    fallocate, decode = os.posix_fallocate, media._decode
    monkeypatch.setattr(os, "posix_fallocate", lambda *given: tried.append(given) or fallocate(*given))
    monkeypatch.setattr(media, "_decode", lambda *given: decoded.append(given) or decode(*given))
    video = tmp_path / "of-many.mp4"
    write_mp4(video, np.zeros((9, 48, 80, 3), np.uint8), 8)
    items = _prepare(tmp_path, config, *({"prompt": "x", "seed": seed, "video": str(video)} for seed in range(20)))
    assert (len(items), len(tried), len(decoded)) == (20, 1, 1)


def test_an_output_that_is_missing_in_between_fails_before_any_work(tmp_path, config, monkeypatch):
    monkeypatch.setattr(RequestRun, "run_stage", lambda *_: pytest.fail("work began"))
    items = _prepare(tmp_path, config, {"prompt": "a"}, {"prompt": "b"}, chosen=("text", "vae"))
    Batch(items).run_all()
    assert [item.status for item in items] == ["failed", "failed"]
    assert all("denoise: no saved output in" in str(item.error) for item in items)


@pytest.fixture(scope="module")
def spoilt(tiny_folder, tmp_path_factory) -> Path:
    """The checkpoint with NaN in its transformer."""
    folder = tmp_path_factory.mktemp("spoilt")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({name: np.full_like(value, np.nan) for name, value in weights.items()}, path)
    return folder


@pytest.mark.compile
def test_a_batch_goes_on_after_a_failure_and_loads_once(tmp_path, config, spoilt, capsys):
    lines = (
        {"prompt": "a cat", "name": "one", "seed": 1},
        {"prompt": "a cat", "name": "two", "checkpoint": str(spoilt)},
        {"prompt": "a dog", "name": "three", "scheduler": "dpm"},
    )
    loads = []

    def progress(event):
        if event.phase != "run":
            loads.append((event.stage, event.phase))

    items, said = _run(tmp_path, config, *lines, progress=progress)
    assert [item.status for item in items] == ["done", "failed", "done"]
    assert loads.count(("text", "load")) == loads.count(("vae", "load")) == loads.count(("text", "compile")) == 1
    assert loads.count(("denoise", "load")) == 2, "two checkpoints"
    folder = tmp_path / "videos"
    assert (folder / "one" / "video.mp4").exists() and (folder / "three" / "video.mp4").exists()
    error = json.loads((folder / "two" / "error.json").read_text())
    assert "denoise: step 1 of 2: the latents hold NaN or infinity" in error["error"]
    assert (error["stage"], error["line"], error["type"]) == ("denoise", 2, "NonFiniteError")
    assert [line for line in said if "done: " in line] == [
        f"[1 of 3] done: {folder / 'one' / 'video.mp4'}",
        f"[3 of 3] done: {folder / 'three' / 'video.mp4'}",
    ]
    table = batch_table(items)
    assert "2 done, 1 failed" in table and "latents hold NaN" in table
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2

    loads.clear()
    lines[1]["checkpoint"] = config.checkpoint
    items, said = _run(tmp_path, config, *lines, progress=progress)
    assert [item.status for item in items] == ["finished before", "done", "finished before"]
    assert f"[1 of 3] finished before, skipped: {folder / 'one' / 'video.mp4'}" in said
    assert not (folder / "two" / "error.json").exists()
    loads.clear()
    items, _ = _run(tmp_path, config, *lines, {"prompt": "a cat", "name": "one ", "seed": 1}, chosen=("text",))
    assert [item.status for item in items] == ["done"] * 4


@pytest.mark.compile
@pytest.mark.parametrize("change", [{"fps": 9}, {"seed": 2}, "no video", "cut video", "no resume"], ids=str)
def test_only_a_whole_video_of_exactly_the_request_is_finished(change, tmp_path, config, monkeypatch):
    line = {"prompt": "a cat", "name": "one"}
    made = {"prompt_embeds": np.ones(1), "latents": np.ones(1), "frames": np.zeros((2, 16, 16, 3), np.uint8)}
    monkeypatch.setattr(RequestRun, "_compute", lambda *args: (made, {}))
    for status in ("done", "finished before"):
        (item,), _ = _run(tmp_path, config, line)
        assert item.status == status
    video = tmp_path / "videos" / "one" / "video.mp4"
    if change == "no video":
        video.unlink()
    elif change == "cut video":
        video.write_bytes(video.read_bytes()[:-1])
    (item,), _ = _run(
        tmp_path,
        config,
        {**line, **(change if isinstance(change, dict) else {})},
        options=RunOptions(resume=change != "no resume"),
    )
    assert item.status == "done"


@pytest.mark.parametrize("full", ["vae", "denoise"])
def test_where_two_stages_do_not_fit_all_is_denoised_first(full, tmp_path, config, monkeypatch):
    """Memory that is full while both are loaded."""
    ran = []

    def compute(self, stage, context, inputs, stages):
        stages._hold(stage, 0, lambda: 0)
        ran.append(f"{stage} {self.run_dir.name}")
        if stage == full and stages.holds("denoise", "vae"):
            raise DeviceMemoryError("full")
        return {"prompt_embeds": np.ones(1), "latents": np.ones(1), "frames": np.zeros((2, 16, 16, 3), np.uint8)}, {}

    monkeypatch.setattr(RequestRun, "_compute", compute)
    items, _ = _run(tmp_path, config, *({"prompt": "x", "name": name} for name in "abc"))
    assert [item.status for item in items] == ["done"] * 3
    expected = {
        "vae": ["denoise a", "vae a", "denoise b", "denoise c", "vae a", "vae b", "vae c"],
        "denoise": ["denoise a", "vae a", "denoise b", "denoise b", "denoise c", "vae b", "vae c"],
    }
    assert ran == ["text a", "text b", "text c", *expected[full]]


@pytest.mark.parametrize(
    ("full", "expected"),
    [
        ("vae", ["denoise a", "vae a", "vae a", "denoise b", "vae b", "denoise c", "vae c"]),
        ("denoise", ["denoise a", "vae a", "denoise b", "denoise b", "vae b", "denoise c", "vae c"]),
    ],
)
def test_one_item_at_a_time(full, expected, tmp_path, config, monkeypatch):
    """As a slice runs them: text first, then the rest of each; where two stages do not fit, one makes room."""
    ran = []

    def compute(self, stage, context, inputs, stages):
        stages._hold(stage, 0, lambda: 0)
        ran.append(f"{stage} {self.run_dir.name}")
        assert stage == "text" or not stages.holds("text")
        if stage == full and stages.holds("denoise", "vae"):
            raise DeviceMemoryError("full")
        return {"prompt_embeds": np.ones(1), "latents": np.ones(1), "frames": np.zeros((2, 16, 16, 3), np.uint8)}, {}

    monkeypatch.setattr(RequestRun, "_compute", compute)
    items = _prepare(tmp_path, config, *({"prompt": "x", "name": name} for name in "abc"))
    made = Batch(items)
    for stages in (("text",), STAGES):
        assert [item.status for item in items] == ["waiting"] * 3
        for item in items:
            made.run_one(item, stages)
    assert [item.status for item in items] == ["done"] * 3
    assert ran == ["text a", "text b", "text c", *expected]


@pytest.mark.compile
def test_what_never_fits_fails_and_the_rest_goes_on(tmp_path, config, monkeypatch):
    original = Denoiser.denoise

    def run_denoise(self, request, *args):
        if request.seed == 1:
            import jax

            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 1 byte")
        if request.seed == 2:
            raise KeyError("a bug\nof ours")
        return original(self, request, *args)

    monkeypatch.setattr(Denoiser, "denoise", run_denoise)
    items, _ = _run(tmp_path, config, *({"prompt": "x", "seed": seed, "name": f"{seed}"} for seed in range(1, 4)))
    assert [item.status for item in items] == ["failed", "failed", "done"]
    assert items[0].error.startswith("denoise: not enough device memory for 80x48, 9 frames, float32; try a smaller")
    assert items[1].error.startswith("denoise: KeyError: 'a bug")
    traceback = json.loads((tmp_path / "videos" / "2" / "error.json").read_text())["traceback"]
    assert "run_denoise" in "".join(traceback)


def _runs(process: subprocess.Popen) -> bool:
    assert process.poll() is None, "it ended too early"
    return True


@pytest.mark.slow("2 min")
def test_a_killed_batch_goes_on_and_gives_the_same_bits(tmp_path, tiny_folder):
    """kill -9 in the denoise stage of the second of three; the whole batch, by the same command, to compare with."""
    lines = (
        {"prompt": "a red circle", "name": "one", "seed": 1},
        {"prompt": "a blue square", "name": "two", "scheduler": "dpm", "num_inference_steps": 150},
        {"prompt": "a star", "name": "three", "guidance_scale": 1},
    )
    path = write_batch(tmp_path, *lines)
    command = [sys.executable, "-m", "pipeline.generate", f"prompts={path}", f"checkpoint={tiny_folder}", "model=tiny"]
    command += ["height=48", "width=80", "num_frames=9", "num_inference_steps=2", "checkpoint_every=5"]
    command += ["output_dir=videos"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COGVIDEOX_SPLASH_CACHE": str(tmp_path / "cache")}
    log = (tmp_path / "log").open("wb")
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    videos = tmp_path / "videos"
    try:
        wait_until(lambda: _runs(process) and (videos / "two" / STATE_NAME).exists(), "the second video's state")
    finally:
        process.kill()
    assert process.wait(PLENTY_S) == -signal.SIGKILL
    assert not (videos / "two" / "denoise.json").exists()

    def finished() -> dict[str, tuple[int, int]]:
        files = (file for file in (videos / "one").iterdir() if not file.name.startswith("."))
        return {file.name: (file.stat().st_mtime_ns, file.stat().st_ino) for file in files}

    first = finished()
    assert "video.mp4" in first
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=PLENTY_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[1 of 3] finished before, skipped: videos/one/video.mp4" in done.stdout
    assert finished() == first
    sidecar = json.loads((videos / "two" / "video.json").read_text())
    assert sidecar["resumed_at_step"] % 5 == 0 and 0 < sidecar["resumed_at_step"] < 150
    assert len(sidecar["stages"][1]["step_times_s"]) == 150
    assert not [file for file in videos.rglob("*") if file.name.startswith(".") or file.name == STATE_NAME]

    (tmp_path / "whole").mkdir()
    subprocess.run(command, cwd=tmp_path / "whole", env=environment, capture_output=True, check=True, timeout=PLENTY_S)
    for name in ("one", "two", "three"):
        for stage in ("denoise", "vae"):
            expected = load_file(tmp_path / "whole" / "videos" / name / f"{stage}.safetensors")
            actual = load_file(videos / name / f"{stage}.safetensors")
            assert actual.keys() == expected.keys()
            for array in actual:
                np.testing.assert_array_equal(actual[array], expected[array])


@pytest.mark.slow("2 min")
def test_an_interrupt_says_how_to_go_on(tmp_path, tiny_folder):
    path = write_batch(tmp_path, {"prompt": "a", "name": "one"})
    command = [sys.executable, "-m", "pipeline.generate", f"prompts={path}", f"checkpoint={tiny_folder}", "model=tiny"]
    command += ["height=48", "width=80", "num_inference_steps=900", "checkpoint_every=0", "preview_every=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COGVIDEOX_SPLASH_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        picture = tmp_path / "videos" / "one" / "preview.png"
        wait_until(lambda: _runs(process) and picture.exists(), "a preview")
        process.terminate()
        _, errors = process.communicate(timeout=PLENTY_S)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    last = errors.splitlines()[-1]
    assert last.startswith("interrupted [1 of 1] in denoise after step ")
    assert last.endswith(" of 900; the same command goes on from there")
    assert (tmp_path / "videos" / "one" / STATE_NAME).exists()


def test_options_of_a_run():
    for changes in ({"checkpoint_every": -1}, {"preview_every": 1001}):
        with pytest.raises(RequestError, match="expected steps from 1 to 1000, or 0: "):
            RunOptions(**changes)
    assert dataclasses.asdict(RunOptions())["checkpoint_every"] is None


def test_durations():
    assert [batch.duration(s) for s in (45, 720, 11_100)] == ["45 s", "12 min", "3 h 5 min"]
