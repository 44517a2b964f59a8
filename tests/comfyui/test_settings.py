"""Widget values to the pipeline's types: which model ids are opened, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S
from pipeline.checkpoints import loading
from pipeline.checkpoints.loading import Checkpoint
from pipeline.requests import limits
from pipeline.requests.errors import CheckpointError, RequestError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions
from splash_attn.types import Variant


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids that were asked of the Hub, which is not reached."""
    asked: list[str] = []

    def snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
        asked.append(repo_id)
        return Path("commit")

    monkeypatch.setattr(loading, "_snapshot", snapshot)
    return asked


def test_tiny_and_hub_ids(
    part: Any, hub: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, comfy: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)  # a folder where ComfyUI was started is not a model
    find = part("settings").find_checkpoint
    assert find("owner/name") == Checkpoint(name="owner/name", repo_id="owner/name", commit="commit")
    assert hub == ["owner/name"]
    assert find(" tiny ").folder == loading.TRAINED_FOLDER


def test_folders_under_models(part: Any, hub: list[str], comfy: Any) -> None:
    find = part("settings").find_checkpoint
    for folder in ("diffusers/mine", "diffusers/owner/name", "other"):
        (comfy.models_dir / folder).mkdir(parents=True, exist_ok=True)
    assert find("mine").folder == comfy.models_dir / "diffusers" / "mine"
    assert find("owner/name").folder == comfy.models_dir / "diffusers" / "owner" / "name", "here rather than the Hub"
    assert find("other").folder == comfy.models_dir / "other"
    assert find(str(comfy.models_dir / "other")).folder == comfy.models_dir / "other"
    assert not hub


@pytest.mark.parametrize("model_id", ["", ".", "..", "../x", "diffusers/../../x", "/etc", "~/x", "a/b/c", "a/..", "x"])
def test_nothing_else_is_opened(part: Any, hub: list[str], comfy: Any, model_id: str) -> None:
    (comfy.models_dir.parent / "x").mkdir(exist_ok=True)
    with pytest.raises(CheckpointError, match=r"model_id=.*expected a Hub id \(owner/name\), a folder under"):
        part("settings").find_checkpoint(model_id)
    assert not hub


def test_folder_outside_by_its_absolute_path(part: Any, hub: list[str], comfy: Any, tmp_path: Path) -> None:
    for folder in (tmp_path, comfy.models_dir, comfy.models_dir.parent):
        with pytest.raises(CheckpointError, match="expected a Hub id"):
            part("settings").find_checkpoint(str(folder))


def test_dtype(part: Any) -> None:
    resolve = part("settings").resolve_dtype
    assert resolve("auto", "tiny") == "float32"
    assert resolve("auto", "owner/name") == "bfloat16"
    assert resolve("bfloat16", "tiny") == "bfloat16"


def test_kernels_and_plans(part: Any) -> None:
    settings = part("settings")
    assert settings.attention_options("auto") == AttentionOptions()
    assert settings.attention_options("online") == AttentionOptions("pallas_tpu", variant=Variant(softmax="online"))
    assert settings.attention_options("int8") == AttentionOptions("pallas_tpu", qk_dtype="int8")
    assert settings.attention_options("xla") == AttentionOptions("xla")
    assert settings.parallel_options("auto", 0) == ParallelOptions()
    sharded = settings.parallel_options("ulysses, weights sharded", 4)
    assert sharded == ParallelOptions("ulysses", num_devices=4, weights="sharded")


def test_devices_that_are_not_here(part: Any) -> None:
    settings = part("settings")
    with pytest.raises(RequestError, match=r"num_devices=512: JAX sees \d+ of 'cpu' here; expected at most \d+, or 0"):
        settings.check_devices(AttentionOptions(), ParallelOptions(num_devices=512))
    with pytest.raises(RequestError, match=r"kernel=online: needs a TPU, .* take kernel=auto"):
        settings.check_devices(settings.attention_options("online"), ParallelOptions())
    settings.check_devices(AttentionOptions(), ParallelOptions(num_devices=1))


_IMPORT = """
import sys
{hide}
sys.path.insert(0, {tests!r})
import comfy_stub, importlib.util, pathlib
import numpy, PIL.Image, torch  # ComfyUI's own, there already when it loads packs
comfy_stub.install(pathlib.Path("models"))
before = torch.get_default_dtype(), torch.is_grad_enabled(), set(sys.modules)
sys.path[:] = [path for path in sys.path if path not in {hidden!r}]
import importlib.metadata
def not_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.distribution = not_installed
spec = importlib.util.spec_from_file_location("pack", {pack!r})
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
schemas = [node.define_schema() for node in sys.modules["pack.cogvideox_tpu.nodes"].NODES]
assert sys.modules["pack.cogvideox_tpu.settings"].limits()["MAX_SIDE"] is None
heavy = {{"jax", "jaxlib", "torchax", "diffusers", "transformers", "pipeline", "splash_attn", "libtpu"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert before[:2] == (torch.get_default_dtype(), torch.is_grad_enabled())
assert importlib.util.find_spec("pipeline") is None
try:
    sys.modules["pack.cogvideox_tpu.settings"].require_packages()
except RuntimeError as error:
    print(error)
"""


#: An editable install answers for its packages from a finder of its own; these tests are about what has none.
_HIDE = "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]"


def test_import_is_light_and_needs_no_package(pack_dir: Path, tmp_path: Path) -> None:
    root = str(pack_dir.parents[1])
    code = _IMPORT.format(
        hide=_HIDE,
        tests=str(Path(__file__).parent),
        pack=str(pack_dir / "__init__.py"),
        hidden=["", root, str(tmp_path)],
    )
    # -P and -I leave the current folder and PYTHONPATH out; -S would leave out the libraries.
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False, timeout=PLENTY_S
    )
    assert done.returncode == 0, done.stderr
    assert "cannot import splash_attn; install cogvideox-splash" in done.stdout


_SHADOWED = """
import importlib.util, sys, types
{hide}
sys.modules["p"] = types.ModuleType("p"); sys.modules["p"].__path__ = []
sys.modules["p.host"] = types.ModuleType("p.host")
spec = importlib.util.spec_from_file_location("p.settings", {settings!r})
settings = importlib.util.module_from_spec(spec); spec.loader.exec_module(settings)
sys.path.insert(0, {other!r})
{before}
settings.require_packages()
import pipeline.requests.models, splash_attn
print(pipeline.__file__, splash_attn.__file__)
"""


def _import_beside_another(
    part: Any, folder: Path, package: str, installed_url: str, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """Import ours where a package of its name comes first. installed_url: where our editable install points to."""
    (folder / "cogvideox_splash-0.dist-info").mkdir()
    (folder / "cogvideox_splash-0.dist-info" / "METADATA").write_text("Name: cogvideox-splash\nVersion: 0\n")
    (folder / "cogvideox_splash-0.dist-info" / "direct_url.json").write_text(json.dumps({"url": installed_url}))
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text("")
    code = _SHADOWED.format(hide=_HIDE, settings=part("settings").__file__, other=str(folder), before=before)
    command = [sys.executable, "-I", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PLENTY_S)


@pytest.mark.compile
@pytest.mark.parametrize("package", ["pipeline", "splash_attn"])
def test_ours_is_found_beside_another_of_its_name(part: Any, pack_dir: Path, tmp_path: Path, package: str) -> None:
    root = pack_dir.parents[1]
    done = _import_beside_another(part, tmp_path, package, root.as_uri())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(root / name / "__init__.py") for name in ("pipeline", "splash_attn")]


@pytest.mark.compile
@pytest.mark.parametrize("made", ["types.ModuleType('pipeline')", "__import__('pipeline')"])
def test_another_of_the_name_without_a_spec_is_named(part: Any, pack_dir: Path, tmp_path: Path, made: str) -> None:
    before = f"module = sys.modules['pipeline'] = {made}; module.__spec__ = None"
    done = _import_beside_another(part, tmp_path, "pipeline", pack_dir.parents[1].as_uri(), before)
    where = "no file" if "types" in made else tmp_path / "pipeline"
    expected = f"cannot import pipeline; another package of the name pipeline is at {where}; disable"
    assert expected in done.stderr.strip().splitlines()[-1], done.stderr


def test_limits_are_ours_beside_another_of_the_name(part: Any, pack_dir: Path, tmp_path: Path) -> None:
    """And reading them imports neither: packs that ComfyUI loads later find theirs."""
    before = "print(settings.limits()['MAX_FPS'], 'pipeline' in sys.modules); sys.exit()"
    done = _import_beside_another(part, tmp_path, "pipeline", pack_dir.parents[1].as_uri(), before)
    assert done.stdout.split() == [str(limits.MAX_FPS), "False"], done.stderr


@pytest.mark.compile
@pytest.mark.parametrize("package", ["pipeline", "splash_workbench"])
def test_another_of_the_name_imported_before_is_named(part: Any, pack_dir: Path, tmp_path: Path, package: str) -> None:
    done = _import_beside_another(part, tmp_path, package, pack_dir.parents[1].as_uri(), f"import {package}")
    expected = f"cannot import {package}; another package of the name {package} is at {tmp_path / package}; disable"
    assert expected in done.stderr.strip().splitlines()[-1], done.stderr


def test_another_of_the_name_where_ours_is_not_installed(part: Any, tmp_path: Path) -> None:
    done = _import_beside_another(part, tmp_path, "splash_attn", "file:///nowhere")
    message = done.stderr.strip().splitlines()[-1]
    assert "another package of the name splash_attn is at" in message and "install cogvideox-splash into" in message
