"""The pack, loaded as ComfyUI loads it, over a stand-in for ComfyUI."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
PACK_DIR = HERE.parents[1] / "comfyui" / "ComfyUI-CogVideoX-TPU"
PACK = "cogvideox_tpu_pack"


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
