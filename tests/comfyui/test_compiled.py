"""Compiled programs outlive the process: after a restart of ComfyUI nothing is compiled again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S

pytestmark = pytest.mark.compile

_START = """
import collections, importlib.util, json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import comfy_stub
comfy_stub.install(pathlib.Path("models"))
spec = importlib.util.spec_from_file_location("pack", sys.argv[2])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
import jax, torch
events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event.rpartition("/")[2]]))
nodes = sys.modules["pack.cogvideox_tpu.nodes"]
with torch.inference_mode():
    (embeds,) = nodes.CogVideoXTextEncoder.execute(prompt="a red circle", negative_prompt="", model_id="tiny").args
    values = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 1, "guidance_scale": 1.0, "seed": 5}
    (latents,) = nodes.CogVideoXTPUSampler.execute(embeds, **values, num_devices=1).args
    images, _ = nodes.CogVideoXTPUVAEDecoder.execute(latents, fps=8).args
print(json.dumps({**events, "sum": images.sum().item(), "folder": jax.config.values["jax_compilation_cache_dir"]}))
"""


def _start(pack_dir: Path, folder: Path, **environment: str) -> dict[str, Any]:
    settings = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", _START, str(Path(__file__).parent), str(pack_dir / "__init__.py")],
        **{"capture_output": True, "text": True, "check": True, "timeout": PLENTY_S, "cwd": folder},
        env={**os.environ, "PYTHONPATH": str(pack_dir.parents[1]), **settings},
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow("1 min")
def test_a_restart_compiles_nothing_anew(pack_dir: Path, cache_folder: Path, tmp_path: Path) -> None:
    first, second = _start(pack_dir, tmp_path), _start(pack_dir, tmp_path)
    assert first["folder"] == str(cache_folder / "compiled"), "where the command line keeps its programs"
    assert first["cache_misses"] >= 3
    assert "cache_misses" not in second and second["cache_hits"] >= 3
    assert second["sum"] == first["sum"]


@pytest.mark.slow("30 s")
def test_a_folder_that_the_user_has_set_stays(pack_dir: Path, cache_folder: Path, tmp_path: Path) -> None:
    chosen = str(tmp_path / "chosen")
    assert _start(pack_dir, tmp_path, JAX_COMPILATION_CACHE_DIR=chosen)["folder"] == chosen
    assert any(Path(chosen).iterdir()) and not (cache_folder / "compiled").exists()
