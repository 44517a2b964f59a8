"""One command in several processes with simulated devices: the video of one process, and they end together."""

import dataclasses
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers import PLENTY_S, environment_with_repo, virtual_devices, wait_until
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.requests.config import DistributedConfig, GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.options import DistributedOptions, to_distributed
from pipeline.requests.request import GenerateRequest
from pipeline.runs import hosts
from pipeline.runs.request_run import generate
from pipeline.stages.resume import STATE_NAME

#: As in tests/pipeline/model/test_sharding.py: plans differ in the order of sums.
LATENT_TOLERANCE = 2e-4


class Group:
    """Processes that run one command in folders of their own; only the first may write to its."""

    def __init__(
        self,
        folder: Path,
        programs: dict[str, str],
        checkpoint: Path,
        count: int,
        *arguments: str,
        devices: int = 1,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folders = [folder / str(index) for index in range(count)]
        together = (f"distributed.coordinator=127.0.0.1:{port}", f"distributed.num_processes={count}")
        variables = {**programs, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": virtual_devices(devices)}
        self.processes = []
        for index, cwd in enumerate(self.folders):
            cwd.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "pipeline.generate", "prompt=a red circle", f"checkpoint={checkpoint}"]
            command += ["model=tiny", "height=48", "width=80", "num_frames=9", "seed=7", "run_dir=run", *arguments]
            if count > 1:
                command += [*together, f"distributed.process_id={index}"]
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=environment_with_repo() | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            self.processes.append(process)

    def finish(self) -> list[tuple[int, str, str]]:
        """Return exit code, stdout and stderr of each process."""
        try:
            outputs = [process.communicate(timeout=PLENTY_S) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs, strict=True)]

    def wait_for_state(self) -> None:
        """Wait until a denoising step was saved."""

        def there() -> bool:
            assert all(process.poll() is None for process in self.processes), self.finish()
            return (self.folders[0] / "run" / STATE_NAME).exists()

        wait_until(there, "the first saved step")


def _same_video(several: Path, one: Path, frames: bool = True) -> None:
    """Assert that two run folders hold the same video, to rounding."""
    actual, expected = (load_file(folder / "denoise.safetensors")["latents"] for folder in (several, one))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=LATENT_TOLERANCE)
    if not frames:
        return
    actual, expected = (load_file(folder / "vae.safetensors")["frames"] for folder in (several, one))
    assert np.abs(actual.astype(int) - expected).max() <= 1  # of 255


@pytest.mark.slow("40 s")
@pytest.mark.compile
def test_a_signal_to_one_ends_both_after_a_step(tmp_path, shared_programs, tiny_folder):
    """They write in the first one's folder only."""
    steps = ("num_inference_steps=100", "checkpoint_every=1", "stages=text,denoise")
    interrupted = Group(tmp_path, shared_programs, tiny_folder, 2, *steps)
    interrupted.wait_for_state()
    interrupted.processes[1].send_signal(signal.SIGTERM)
    (code, _, shown), (other_code, other_printed, _) = interrupted.finish()
    assert (code, other_code) == (128 + signal.SIGTERM,) * 2, shown
    assert "interrupted in denoise after step" in shown and "goes on from there" in shown
    assert all(line.startswith("[Gloo]") for line in other_printed.splitlines())
    run_dir = tmp_path / "0" / "run"
    assert sorted(path.name for path in run_dir.iterdir()) == [STATE_NAME, "text.json", "text.safetensors"]
    assert list((tmp_path / "1").iterdir()) == []


@pytest.mark.compile
@pytest.mark.parametrize(
    "stages", ["text,denoise", pytest.param("text,denoise,vae", marks=pytest.mark.slow("1 min"))], ids=str
)
def test_several_processes_make_the_video_of_one(stages, tmp_path, shared_programs, tiny_folder):
    """They write in the first one's folder only."""
    run_dir = tmp_path / "0" / "run"
    request = GenerateRequest(
        "a red circle", str(tiny_folder), height=48, width=80, num_frames=9, num_inference_steps=2, seed=7
    )
    one = tmp_path / "one"
    generate(request, run_dir=one, stages=stages.split(","))
    several = Group(tmp_path, shared_programs, tiny_folder, 2, "num_inference_steps=2", f"stages={stages}").finish()
    assert [code for code, _, _ in several] == [0, 0], several
    assert list((tmp_path / "1").iterdir()) == []
    timings = json.loads((run_dir / "denoise.json").read_text())["timings"]
    assert 0 < timings["read_bytes"] < timings["stored_bytes"]  # the rest is read by the other one
    whole = stages.endswith("vae")
    assert ("video: run/video.mp4" in several[0][1]) == whole
    _same_video(run_dir, one, frames=whole)


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint whose heads divide over eight devices."""
    spec = TinySpec(1, 8, 16, 24, 20, text_layers=1, max_text_seq_length=19, vae_block_out_channels=(8, 8, 16, 16))
    return ensure_tiny_checkpoint(tmp_path_factory.mktemp("cache"), spec)


@pytest.mark.slow("4 min")
def test_four_processes_of_two_devices_make_the_video_of_one_of_eight(tmp_path, shared_programs, eight_heads):
    """Killing one ends the others, and the next run goes on from what is saved."""
    steps = ("num_inference_steps=20", "checkpoint_every=1")
    ((code, _, shown),) = Group(tmp_path / "one", shared_programs, eight_heads, 1, *steps, devices=8).finish()
    assert code == 0, shown
    killed = Group(tmp_path, shared_programs, eight_heads, 4, *steps, devices=2)
    killed.wait_for_state()
    killed.processes[2].kill()
    for index, (code, _, shown) in enumerate(killed.finish()):
        assert code == -signal.SIGKILL if index == 2 else code not in (0, -signal.SIGKILL), shown
        assert index == 2 or "process 2 on" in shown, shown
    assert not (tmp_path / "0" / "run" / "denoise.json").exists()
    several = Group(tmp_path, shared_programs, eight_heads, 4, *steps, devices=2).finish()
    assert [code for code, _, _ in several] == [0] * 4, several
    details = json.loads((tmp_path / "0" / "run" / "denoise.json").read_text())
    assert details["resumed_at_step"] > 0
    assert (details["parallel"]["dp"], details["parallel"]["model"]) == (2, 4)
    assert [list((tmp_path / str(index)).iterdir()) for index in (1, 2, 3)] == [[]] * 3
    _same_video(tmp_path / "0" / "run", tmp_path / "one/0/run")


@pytest.mark.compile
@pytest.mark.slow("1 min each")  # `make test` ends one by an error
@pytest.mark.parametrize("victim", [0, 1])
def test_killing_one_ends_the_others_and_the_next_run_resumes(victim, tmp_path, shared_programs, tiny_folder):
    arguments = ("num_inference_steps=100", "checkpoint_every=1", "stages=text,denoise")
    group = Group(tmp_path, shared_programs, tiny_folder, 2, *arguments)
    group.wait_for_state()
    group.processes[victim].kill()
    codes_and_texts = group.finish()
    code, _, shown = codes_and_texts[1 - victim]
    assert code not in (0, -signal.SIGKILL)
    host = socket.gethostname()
    if victim == 1:
        assert f"error: process 1 on {host} is lost: no sign of life" in shown
        assert "the same command on every host goes on from what is saved" in shown
    else:  # JAX's own message
        assert f"process 1 on {host}, of 2; process 0 on {host} writes" in shown
        assert "coordination service" in shown
        return
    resumed = Group(tmp_path, shared_programs, tiny_folder, 2, *arguments).finish()
    assert [code for code, _, _ in resumed] == [0, 0], resumed
    assert '"resumed_at_step": null' not in (tmp_path / "0" / "run" / "denoise.json").read_text()


@pytest.mark.compile
def test_an_error_of_one_process_ends_all_and_names_it(tmp_path, shared_programs, tiny_folder):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "own.safetensors").touch()  # which process 1 does not have
    group = Group(tmp_path, shared_programs, tiny_folder, 2, "transformer=own.safetensors", "stages=text")
    for code, _, shown in group.finish():
        assert code != 0
        assert "own.safetensors" in shown
    assert list((tmp_path / "1").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "host:1"}, "distributed.num_processes=null: expected a value beside those of coordinator"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "expected HOST:PORT of process 0"),
        ({"coordinator": "host:1", "num_processes": 0, "process_id": 0}, "num_processes=0: expected 1 or more"),
        ({"coordinator": "host:1", "num_processes": 2, "process_id": 2}, "process_id=2: expected 0 to 1"),
        ({"timeout_s": 0}, "timeout_s=0: expected seconds from 1 to"),
    ],
)
def test_bad_options_are_refused(given, message):
    with pytest.raises(RequestError, match=message):
        DistributedOptions(**given)


def test_one_host_is_the_default():
    assert to_distributed(GenerateConfig()) is None
    assert to_distributed(GenerateConfig(distributed=DistributedConfig(enabled=True))) == DistributedOptions()


@pytest.fixture
def watch(monkeypatch) -> tuple[hosts.Hosts, list[tuple[str, int]]]:
    """Return what watches over two processes as process 0, and what it would end with."""
    watch, ends = hosts.Hosts(timeout_s=60), []
    monkeypatch.setattr(watch, "_end", lambda message, exit_code: ends.append((message, exit_code)))
    monkeypatch.setattr(watch, "_count", 2)
    return watch, ends


@pytest.mark.parametrize(
    ("done", "where"),
    [
        ([{"events": 3}, {"events": 2}], "in step 7"),
        ([{"events": 2, "arrays_read": 9}, {"events": 2, "arrays_read": 8}], "in denoise"),  # loading
    ],
)
def test_a_hang_ends_at_its_limit_and_names_the_host_that_is_behind(done, where, watch, monkeypatch):
    watch, ends = watch
    states = {index: hosts._State("ab"[index], where=where, **values) for index, values in enumerate(done)}
    watch._look_at(states)
    assert not ends
    monkeypatch.setattr(watch, "_since", time.monotonic() - 61)
    watch._look_at(states)
    ((message, exit_code),) = ends
    assert message.startswith(
        f"process 1 on b has not gone on for 60 s (distributed.timeout_s) {where}; noticed by process 0 on "
    )
    assert exit_code == 1


def test_what_a_process_failed_of_is_said_by_the_others(watch, monkeypatch):
    """It is at its end by then, and is not taken for lost."""
    watch, ends = watch
    told = []
    monkeypatch.setattr(watch, "_index", 1)
    monkeypatch.setattr(watch, "_tell", lambda: told.append(dataclasses.replace(watch._mine)))
    watch.__exit__(RequestError, RequestError("no such disk"), None)
    monkeypatch.setattr(watch, "_index", 0)
    watch._look_at({0: hosts._State("a"), 1: told[-1]})
    assert ends == [(f"process 1 on {socket.gethostname()} failed: no such disk", 1)]
