"""A batch over the slices of a Ray cluster: every line once, whatever is lost, and the bits of one machine."""

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fake_slices import FakeSlice
from helpers import PLENTY_S, environment_with_repo, wait_until
from pipeline import generate
from pipeline.requests.batch_file import entries_of
from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.options import RunOptions
from pipeline.requests.request import STAGES
from pipeline.runs import fleet
from pipeline.runs.fleet import Fleet, new_marker
from pipeline.runs.messages import Job
from pipeline.runs.request_run import LOCK_NAME, RequestRun
from pipeline.runs.slices import Slice
from pipeline.stages.progress import Interrupted
from pipeline.terminal import Terminal, batch_table
from ray_nodes import ray_nodes
from splash_workbench.engines.cluster import Cluster, connected
from splash_workbench.engines.settings import EngineSettings
from splash_workbench.files import locked


def _job(folder: Path, config: GenerateConfig, *prompts: str) -> Job:
    entries = []
    for seed, prompt in enumerate(prompts):
        made = dataclasses.replace(config, prompt=prompt, seed=seed, name="{line}")
        entries += entries_of(made, seed + 1)
    output_dir = folder / "videos"
    options = RunOptions()
    return Job(tuple(entries), None, STAGES, folder, output_dir, new_marker(), options, None, True, None)


@pytest.mark.compile
def test_lines_are_handed_out_again_and_new_slices_join(tmp_path, monkeypatch):
    monkeypatch.setattr(fleet, "_LOOK_S", 0.2)
    monkeypatch.setattr(fleet, "_TELL_S", 0.5)
    config = GenerateConfig(height=48, width=80)
    prompts = ["a", "lost once", "lost", "fails", *"bcdefghi"]
    job = _job(tmp_path, config, *prompts)
    results, said = tmp_path / "results.jsonl", []
    with ray_nodes(1) as nodes, connected(EngineSettings(nodes.address, retries=1)) as cluster:

        def say(place: str, text: str) -> None:
            said.append(f"{place} {text}".strip())
            if text.startswith("done on slice 1") and sum("done on" in line for line in said) == 1:
                nodes.add()

        made = Fleet(cluster, job, results, say, FakeSlice)
        made.run_all()
        again = Fleet(cluster, dataclasses.replace(job, entries=job.entries[:1]), results, say, FakeSlice)
        again.run_all()
        with Terminal().handling_signals(), pytest.raises(Interrupted, match="SIGTERM"):
            _stopped_while_it_works(cluster, tmp_path, config)
        assert (tmp_path / "stopped/videos/stopped").exists()
    status = {line.entry.request.prompt: line.status for line in made.lines}
    assert status == {prompt: "done" for prompt in prompts} | {"lost": "failed", "fails": "failed"}
    assert again.lines[0].status == "finished before"
    table = batch_table(made.lines)
    assert "10 done, 2 failed" in table and "lost with its slice 2 times: " in table and "it holds NaN" in table
    assert "videos/1/video.mp4" in table and str(tmp_path) not in table
    assert json.loads((job.output_dir / "3" / "error.json").read_text())["line"] == 3
    names = [json.loads(line)["made"] for line in results.read_text().splitlines()]
    assert sorted(names) == sorted(str(number) for number in range(1, 13) if number not in (3, 4))
    counts = collections.Counter((job.output_dir / "log").read_text().splitlines())
    rest = ",".join(STAGES)
    expected = {f"{index} text": 1 for index in range(12)} | {f"{index} {rest}": 1 for index in range(12)}
    assert counts == expected | {f"1 {rest}": 2, f"2 {rest}": 2}
    assert "slice 2: 1 x fake on host" in said
    assert any("; slice 1: line " in line for line in said) or any("; slice 2: line " in line for line in said)
    assert not list(job.output_dir.glob(".slices-*"))


def _stopped_while_it_works(cluster: Cluster, folder: Path, config: GenerateConfig) -> None:
    """Get a signal while a slice is at a line; its step is ended first."""
    job = _job(folder / "stopped", config, "long")
    log = job.output_dir / "log"

    def send() -> None:
        wait_until(lambda: log.exists() and "text,denoise,vae" in log.read_text(), "the long line")
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        Fleet(cluster, job, None, lambda place, text: None, FakeSlice).run_all()
    finally:
        sender.join()


@pytest.mark.slow("5 min")
def test_twelve_prompts_over_three_slices_one_of_which_is_killed(tmp_path, tiny_folder):
    """kill -9 of a node in the middle; the whole batch in one process, to compare with."""
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"a red circle and {n} stars", "seed": n, "name": f"{n}"} for n in range(1, 13)]
    lines[4] |= {"scheduler": "dpm"}
    lines[7] |= {"guidance_scale": 1}
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = [f"prompts={prompts}", f"checkpoint={tiny_folder}", "model=tiny", "height=48", "width=80", "num_frames=9"]
    command = [sys.executable, "-m", "pipeline.generate", *common, "num_inference_steps=4"]
    variables = {"COGVIDEOX_SPLASH_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}
    with ray_nodes(1, 1, 1, **variables) as nodes:
        on_cluster = [*command, "output_dir=cluster", "engine=ray", f"engine.address={nodes.address}"]
        log = (tmp_path / "log").open("wb")
        environment = environment_with_repo() | variables
        process = subprocess.Popen(on_cluster, cwd=tmp_path, env=environment, stdout=log, stderr=log)

        def some_are_there() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text()
            return len(list((tmp_path / "cluster").glob("*/video.mp4"))) >= 2

        wait_until(some_are_there, "two videos")
        nodes.kill_9(1)
        assert process.wait(PLENTY_S) == 0, (tmp_path / "log").read_text()
    shown = (tmp_path / "log").read_text()
    assert "12 done" in shown and "is lost (" in shown, shown
    alone = subprocess.run(
        [*command, "output_dir=alone", "results_path=alone.jsonl"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PLENTY_S,
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    for name in (line["name"] for line in lines):
        assert (tmp_path / "cluster" / name / "video.mp4").stat().st_size > 0
        for stage in STAGES:
            actual, expected = (
                load_file(tmp_path / run / name / f"{stage}.safetensors") for run in ("cluster", "alone")
            )
            assert actual.keys() == expected.keys()
            for array in actual:
                np.testing.assert_array_equal(actual[array], expected[array])
    counted = len((tmp_path / "results" / "generate.jsonl").read_text().splitlines())
    assert counted == len((tmp_path / "alone.jsonl").read_text().splitlines()) == 12


def test_a_slice_looks_at_all_lines_before_it_works(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = {"prompt_embeds": np.ones(1), "latents": np.ones(1), "frames": np.zeros((2, 16, 16, 3), np.uint8)}
    monkeypatch.setattr(RequestRun, "_compute", lambda *args: (made, {}))
    config = GenerateConfig(checkpoint=str(tiny_folder), height=48, width=80, guidance_scale=1)
    job = dataclasses.replace(_job(tmp_path, config, "a", "b"), compilation_cache=False)
    (message,) = Slice(job).prepare().errors
    assert message.startswith(f"output_dir={tmp_path / 'videos'}: node ") and "does not see it" in message
    job.output_dir.mkdir()
    (job.output_dir / job.marker).touch()
    wrong = dataclasses.replace(job.entries[0].request, checkpoint="nowhere")
    wrong_job = dataclasses.replace(job, entries=(dataclasses.replace(job.entries[0], request=wrong),))
    (message,) = Slice(wrong_job).prepare().errors
    assert message.startswith("checkpoint='nowhere': no such folder")
    first, second = Slice(job), Slice(job)
    ready = first.prepare()
    assert (ready.errors, ready.finished, ready.groups) == ((), (None, None), (0, 0))
    assert second.prepare().digest == ready.digest
    assert first.work(0, ("text",)).status == "waiting"
    with locked(job.output_dir / "1" / LOCK_NAME, "busy"):
        busy = second.work(0, STAGES)
    assert busy.status == "failed" and "another process is at work there" in str(busy.error)
    third = Slice(job)
    third.prepare()
    done = third.work(0, STAGES)  # whose text another slice has made
    assert done.status == "done" and done.result is not None and done.result.record is not None
    (finished, _) = Slice(job).prepare().finished
    assert finished is not None and finished.video_path == done.result.video_path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "x"}, "engine=ray: hands out the lines of a batch; expected prompts=FILE"),
        ({"prompts": "x", "resume": False}, "engine=ray and resume=false"),
    ],
)
def test_what_a_fleet_cannot_do(changes, message):
    with pytest.raises(RequestError, match=message):
        generate._check_combination(GenerateConfig(**changes), EngineSettings())
