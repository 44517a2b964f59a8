"""Programs that are compiled ahead of a run are those of the run."""

import json
import os
import subprocess
import sys

import pytest

from helpers import PLENTY_S, virtual_devices
from pipeline.predict.ahead import compile_ahead, topology_devices
from pipeline.requests.errors import RequestError

_BOTH = """
import collections, json, sys
import jax
from pathlib import Path
from pipeline.checkpoints.checks import read_configs
from pipeline.checkpoints.loading import resolve_checkpoint
from splash_workbench.compile_cache import use_compilation_cache
from pipeline.predict.ahead import compile_ahead, request_programs
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import GenerateRequest
from pipeline.runs.request_run import generate

folder, cache = sys.argv[1], Path(sys.argv[2])
use_compilation_cache(cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # small programs compile in less than JAX's 1 s
request = GenerateRequest(
    prompt="a cat", checkpoint=folder, dtype="float32", height=48, width=80, num_frames=9, num_inference_steps=1
)
checkpoint = resolve_checkpoint(folder)
said = []
stages = tuple(sys.argv[3].split(","))
configs, options = read_configs(checkpoint), ParallelOptions()
compile_ahead(request_programs(request, stages, options, jax.devices(), configs, checkpoint), said.append)

def programs():
    return sorted(path.name for path in cache.glob("*-cache") if path.name.startswith(("jit_program", "jit__step")))

ahead = programs()
generate(request, run_dir=cache / "run", results_path=None, stages=stages)
print(json.dumps({"ahead": ahead, "after": programs(), "said": said}))
"""


@pytest.mark.compile
@pytest.mark.parametrize(
    ("num_devices", "stages"),
    [
        (1, "text,denoise"),
        pytest.param(1, "text,denoise,vae", marks=pytest.mark.slow("40 s")),
        pytest.param(8, "text,denoise,vae", marks=pytest.mark.slow("1 min")),
    ],
)
def test_a_run_finds_every_program_that_was_compiled_ahead(tiny_folder, tmp_path, num_devices, stages):
    command = [sys.executable, "-c", _BOTH, str(tiny_folder), str(tmp_path / "compiled"), stages]
    variables = os.environ | {"XLA_FLAGS": virtual_devices(num_devices)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PLENTY_S, env=variables)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["ahead"]) == len(stages.split(","))  # text, step, VAE
    assert found["after"] == found["ahead"]
    assert found["said"][0] == "text: compiling"


def test_there_is_no_such_topology():
    with pytest.raises(RequestError, match="topology='v6e-9': expected v6e-N"):
        topology_devices("v6e-9")


def test_what_refuses_does_so_before_any_program_is_compiled():
    def programs():
        yield "text", None
        raise RequestError("step_options.json: unreadable compiler options; put it right or remove it.")

    said = []
    with pytest.raises(RequestError, match="unreadable compiler options"):
        compile_ahead(programs(), said.append)
    assert not said
