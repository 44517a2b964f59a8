"""The files that are read are diffusers' own choice, or one line says why there is none."""

import fnmatch
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from pipeline.checkpoints.checks import check_weights, read_configs
from pipeline.checkpoints.loading import Checkpoint
from pipeline.checkpoints.weight_files import STEMS, open_weights, weight_files
from pipeline.requests.errors import CheckpointError
from pipeline.requests.request import STAGES

OWN = "diffusion_pytorch_model"


def _names(folder: Path, part: str = "transformer") -> list[str]:
    return [path.name for path in Checkpoint("mine", folder).weight_files(part)]


def _index(path: Path, *shards: str) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": {str(i): name for i, name in enumerate(shards)}}))


@pytest.mark.parametrize(
    "beside",
    [f"{OWN}_ema.safetensors", f"{OWN}.fp16.safetensors", "model.safetensors", "zz-00001-of-00002.safetensors"],
)
def test_what_stands_beside_the_weights_is_left_alone(folder, beside):
    from diffusers import CogVideoXTransformer3DModel

    part = folder / "transformer"
    before = Checkpoint("mine", folder).identity("transformer")
    save_file({name: torch.zeros_like(x) for name, x in load_file(part / f"{OWN}.safetensors").items()}, part / beside)
    assert _names(folder) == [f"{OWN}.safetensors"]
    assert Checkpoint("mine", folder).identity("transformer") == before
    assert CogVideoXTransformer3DModel.from_pretrained(part).proj_out.bias.any()  # as diffusers chooses


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_files_of_macos_are_no_weights(folder, part):
    (folder / part / "._x.safetensors").write_bytes(b"not weights")
    (folder / part / f"._{OWN}.safetensors.index.json").write_bytes(b"not JSON")
    assert len(_names(folder, part)) == 1


def test_a_lone_variant_is_taken(folder):
    (folder / "vae" / f"{OWN}.safetensors").rename(folder / "vae" / f"{OWN}.fp16.safetensors")
    assert _names(folder, "vae") == [f"{OWN}.fp16.safetensors"]


def test_of_several_that_are_not_the_librarys_own_none_is_taken(folder):
    part = folder / "transformer"
    (part / f"{OWN}.safetensors").rename(part / f"{OWN}.fp16.safetensors")
    shutil.copy(part / f"{OWN}.fp16.safetensors", part / f"{OWN}_ema.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"{OWN}.fp16.safetensors and {OWN}_ema.safetensors; expected {OWN}.safe"
    ):
        _names(folder)


@pytest.mark.parametrize(("part", "stem", "sharded"), [("transformer", OWN, True), ("text_encoder", "model", False)])
def test_shards_beside_a_single_file_as_the_library_chooses(folder, part, stem, sharded):
    shards = [f"{stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in shards:
        (folder / part / name).write_bytes(b"")
    _index(folder / part / f"{stem}.safetensors.index.json", *shards)
    assert _names(folder, part) == (shards if sharded else [f"{stem}.safetensors"])


def test_shards_of_a_variant(folder):
    part = folder / "vae"
    shards = [f"{OWN}.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (part / f"{OWN}.safetensors").rename(part / shards[0])
    shutil.copy(part / shards[0], part / shards[1])
    _index(part / f"{OWN}.safetensors.index.fp16.json", *shards)
    assert _names(folder, "vae") == shards


@pytest.mark.parametrize(
    "content",
    ["[]", "{", "", "null", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 9999],
)
def test_a_broken_index_is_one_line(folder, content):
    (folder / "transformer" / f"{OWN}.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"transformer/.*index.json is not an index of shards") as error:
        _names(folder)
    assert "\n" not in str(error.value)


def test_an_index_names_only_files_beside_it(folder):
    _index(folder / "transformer" / f"{OWN}.safetensors.index.json", "../vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="names of files beside it"):
        _names(folder)


def test_an_absent_shard(folder):
    _index(folder / "transformer" / f"{OWN}.safetensors.index.json", "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks model-00001-of-00002.safetensors"):
        _names(folder)


def test_shards_without_an_index(folder):
    part = folder / "transformer"
    (part / f"{OWN}.safetensors").rename(part / f"{OWN}-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="but no index of shards"):
        _names(folder)


def test_a_pointer_of_git_lfs(tmp_path):
    path = tmp_path / f"{OWN}.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert weight_files(tmp_path, "vae", "") == [path]
    with pytest.raises(CheckpointError, match="git lfs pull"), open_weights(path, "vae/"):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch) -> Checkpoint:
    """A checkpoint on a Hub that has the files of `folder`."""
    cached = tmp_path / "snapshots" / "c0ffee"

    def snapshot_download(repo_id, *, revision, allow_patterns):
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        for name in names:
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (cached / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, cached / name)
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return Checkpoint("owner/name", repo_id="owner/name", commit="c0ffee")


def _fetched(hub: Checkpoint, part: str) -> set[str]:
    chosen = {path.name for path in hub.weight_files(part)}
    assert {path.name for path in hub.part(part).glob("*.safetensors")} == chosen, "no other is fetched"
    return chosen


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_of_the_hub_only_the_files_that_are_read_are_fetched(folder, hub, part):
    single = f"{STEMS[part]}.safetensors"
    for name in (f"{STEMS[part]}_ema.safetensors", f"{STEMS[part]}.fp16.safetensors", "other.safetensors"):
        shutil.copy(folder / part / single, folder / part / name)
    assert _fetched(hub, part) == {single}


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_of_shards_and_a_single_file_on_the_hub_one_is_fetched(folder, hub, part):
    single = f"{STEMS[part]}.safetensors"
    shards = {f"{STEMS[part]}-{number}.safetensors" for number in (1, 2)}
    for name in shards:
        shutil.copy(folder / part / single, folder / part / name)
    _index(folder / part / f"{single}.index.json", *shards)
    assert _fetched(hub, part) == (shards if part == "transformer" else {single}), "the library's order"


def test_shards_alone_and_a_lone_variant_are_fetched(folder, hub):
    for part in ("text_encoder", "vae"):
        (folder / part / f"{STEMS[part]}.safetensors").rename(folder / part / "x.fp16.safetensors")
    (folder / "text_encoder" / "x.fp16.safetensors").rename(folder / "text_encoder" / "m-1.safetensors")
    _index(folder / "text_encoder" / "model.safetensors.index.json", "m-1.safetensors")
    assert (_fetched(hub, "text_encoder"), _fetched(hub, "vae")) == ({"m-1.safetensors"}, {"x.fp16.safetensors"})


def test_an_index_on_the_hub_that_cannot_be_read(folder, hub):
    (folder / "vae" / f"{OWN}.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"index.json is not an index of shards .*; download it again"):
        hub.weight_files("vae")


COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def hub_cache(folder, tmp_path, monkeypatch) -> Path:
    """The cache of a Hub that does not answer: what is there of "owner/name", all of `folder`. Nothing is fetched."""
    cached = tmp_path / "hub" / "models--owner--name" / "snapshots" / COMMIT
    shutil.copytree(folder, cached)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("a file is fetched"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", _no_answer)
    return cached


def _no_answer(*args, **options):
    raise OfflineModeIsEnabled("offline")


def _list_on_hub(monkeypatch, names: list[str]) -> None:
    def model_info(*args, timeout: float, **options):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)


def _check_cached(folder) -> None:
    on_hub = Checkpoint("owner/name", repo_id="owner/name", commit=COMMIT)
    check_weights(on_hub, read_configs(Checkpoint("mine", folder)), STAGES, encodes=False)


def test_what_the_hubs_cache_holds_is_checked_before_any_work(folder, hub_cache):
    _check_cached(folder)
    path = hub_cache / "vae" / f"{OWN}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"^checkpoint='owner/name': vae/.* is not readable as safetensors"):
        _check_cached(folder)


@pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
def test_what_the_hubs_cache_lacks_is_told_before_any_work(folder, hub_cache, monkeypatch, part):
    (hub_cache / part / f"{STEMS[part]}.safetensors").unlink()
    message = rf"^checkpoint='owner/name': {part}/ holds no weights; .*{hub_cache}, and the Hub does not answer"
    with pytest.raises(CheckpointError, match=message):
        _check_cached(folder)
    names = [f"{part}/config.json", f"{part}/model.bin"]
    _list_on_hub(monkeypatch, names)
    with pytest.raises(
        CheckpointError, match=rf"{part}/ holds only pickled weights \(model.bin\), .* on the Hub; expec"
    ):
        _check_cached(folder)
    names.append(f"{part}/{STEMS[part]}.safetensors")
    _check_cached(folder)  # it is fetched when its stage begins


def test_a_hub_that_refuses_says_so(folder, hub_cache, monkeypatch):
    answer = SimpleNamespace(status_code=403, headers={}, request=None)

    def refuse(*args, **options):
        raise GatedRepoError("Access to it is restricted", response=answer)

    (hub_cache / "vae" / f"{OWN}.safetensors").unlink()
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    with pytest.raises(CheckpointError, match=r"^checkpoint='owner/name': the Hub does not list .*is restricted"):
        _check_cached(folder)


def test_a_part_that_is_not_in_the_hubs_cache(folder, hub_cache):
    shutil.rmtree(hub_cache / "vae")
    with pytest.raises(CheckpointError, match=r"vae/ holds no weights; .* and the Hub does not answer"):
        _check_cached(folder)


def test_a_lone_variant_in_the_hubs_cache_counts_where_the_hub_has_no_other(folder, hub_cache, monkeypatch):
    path = hub_cache / "vae" / "x.fp16.safetensors"
    (hub_cache / "vae" / f"{OWN}.safetensors").rename(path)
    _check_cached(folder)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="vae/ lacks "):
        _check_cached(folder)
    _list_on_hub(monkeypatch, [f"vae/{OWN}.safetensors"])
    _check_cached(folder)


def test_a_shard_that_the_hubs_cache_lacks(folder, hub_cache):
    (hub_cache / "transformer" / f"{OWN}.safetensors").unlink()
    _index(hub_cache / "transformer" / f"{OWN}.safetensors.index.json", "one.safetensors")
    with pytest.raises(CheckpointError, match=r"transformer/ lacks one\.safetensors, listed in .* does not answer"):
        _check_cached(folder)
