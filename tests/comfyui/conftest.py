"""The pack, loaded as ComfyUI loads it, over a stand-in for ComfyUI."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from helpers import set_aside
from pipeline.checkpoints import loading
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint

HERE = Path(__file__).parent
PACK_DIR = HERE.parents[1] / "comfyui" / "ComfyUI-CogVideoX-TPU"
PACK = "cogvideox_tpu_pack"
PROMPT = "a red circle moves right"
VALUES = {
    "height": 32,
    "width": 48,
    "num_frames": 9,
    "num_inference_steps": 3,
    "guidance_scale": 6.0,
    "seed": 42,
    "num_devices": 1,
}
SPEC = TinySpec(
    num_layers=1,
    num_attention_heads=2,
    time_embed_dim=24,
    text_embed_dim=20,
    text_layers=1,
    max_text_seq_length=19,
    vae_block_out_channels=(8, 8, 8, 8),
)


def load_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pack_dir() -> Path:
    return PACK_DIR


@pytest.fixture(scope="session")
def stub() -> ModuleType:
    return load_module("comfy_stub", HERE / "comfy_stub.py")


@pytest.fixture(scope="session")
def _loaded(stub: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """The pack over the stand-in; what it put into sys.modules is taken out again at the end."""
    before = set(sys.modules)
    comfy = stub.install(tmp_path_factory.mktemp("models"))
    ours = set(sys.modules) - before
    pack = load_module(PACK, PACK_DIR / "__init__.py")
    yield pack, comfy
    for name in [name for name in sys.modules if name in ours or name.partition(".")[0] == PACK]:
        del sys.modules[name]


@pytest.fixture
def comfy(_loaded: Any):
    """The stand-in's handle, as at the start."""
    comfy = _loaded[1]
    yield comfy
    comfy.unload_all_models()
    comfy.interrupt_after, comfy.interrupted = None, False
    for log in (comfy.texts, comfy.bars, comfy.previews):
        log.clear()
    for folder in (comfy.output_dir, comfy.input_dir):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(_loaded: Any) -> dict[str, Any]:
    """Node classes by id."""
    return {node.define_schema().node_id: node for node in sys.modules[f"{PACK}.cogvideox_tpu.nodes"].NODES}


@pytest.fixture
def schemas(nodes: dict[str, Any]) -> dict[str, Any]:
    return {name: node.define_schema() for name, node in nodes.items()}


@pytest.fixture
def part(_loaded: Any):
    """Modules of the pack by name, e.g. part("settings")."""
    return lambda name: sys.modules[f"{PACK}.cogvideox_tpu.{name}"]


@pytest.fixture
def prompt() -> str:
    return PROMPT


@pytest.fixture
def values() -> dict[str, Any]:
    """Of the sampler's widgets, for a video that takes a moment."""
    return dict(VALUES)


@pytest.fixture(scope="session")
def spec() -> TinySpec:
    """Of a checkpoint that compiles in a moment."""
    return SPEC


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ensure_tiny_checkpoint(tmp_path_factory.mktemp("cache"), SPEC)
    set_aside()
    return folder


@pytest.fixture
def small_tiny(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """model_id tiny, smaller still."""
    monkeypatch.setattr(loading, "TRAINED_FOLDER", tiny_folder)


@pytest.fixture
def run(nodes: dict[str, Any], values: dict[str, Any]):
    """What ComfyUI does with the three nodes: in inference mode, asking the sampler before it encodes."""

    def run(**changes: Any) -> tuple[torch.Tensor, float]:
        sampler = nodes["CogVideoXTPUSampler"]
        chosen = {**values, **changes}
        with torch.inference_mode():
            assert sampler.check_lazy_status(embeddings=None, **chosen) == ["embeddings"]
            (embeds,) = nodes["CogVideoXTextEncoder"].execute(prompt=PROMPT, negative_prompt="", model_id="tiny").args
            assert sampler.check_lazy_status(embeddings=embeds, **chosen) == []
            (latents,) = sampler.execute(embeds, **chosen).args
            images, frame_rate = nodes["CogVideoXTPUVAEDecoder"].execute(latents, fps=16).args
        return images, frame_rate

    return run
