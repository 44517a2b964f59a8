"""The choice among the files of a part: those whose weights diffusers, or transformers, would read; what is in them."""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.requests.errors import CheckpointError

#: Part -> how the libraries name its weights.
STEMS: Mapping[str, str] = {
    "text_encoder": "model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
_SHARD = re.compile(r"-\d{5}-of-\d{5}(\.\w+)?\.safetensors$")
_INDEX = re.compile(r"\.safetensors\.index(\.\w+)?\.json$")
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
#: Of the Hub to list files, before what is here is taken to be all there is.
_HUB_TIMEOUT_S = 10.0
_LFS_POINTER = b"version https://git-lfs"
_PREFIX = re.compile(r"^((model\.)?diffusion_model\.|transformer\.|model\.)")


def weight_files(folder: Path, part: str, where: str) -> list[Path]:
    """Return the files that hold a part's weights, sorted.

    diffusers takes the shards of an index before a single file, transformers the other way round; what stands beside
    them under other names (an EMA, a variant) is left alone. Without files of the libraries' own names there must be
    one single file, or one index. where: begins the messages of CheckpointError: no such files, or several; an index
    that cannot be read; a shard that is not there.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    index, single = own_names(part)
    own = [name for name in (index, single) if name in names]
    if own:
        chosen = own[-1] if part == "text_encoder" else own[0]
        return [folder / name for name in _weights_of(folder, chosen, where)]
    found = {name: _weights_of(folder, name, where) for name in names if _INDEX.search(name)}
    sharded = {name for shards in found.values() for name in shards}
    found |= {
        name: [name]
        for name in names
        if name.endswith(".safetensors") and not _SHARD.search(name) and name not in sharded
    }
    if len(found) > 1:
        raise CheckpointError(f"{where} holds {' and '.join(found)}; expected {single}, or only one of them")
    if not found:
        raise CheckpointError(f"{where} holds {_instead(names)}; expected {single}")
    return [folder / name for name in next(iter(found.values()))]


def own_names(part: str) -> tuple[str, str]:
    """Return the libraries' own names of the index of a part's shards, and of a single file."""
    single = f"{STEMS[part]}.safetensors"
    return f"{single}.index.json", single


def files_to_fetch(folder: Path, part: str, where: str) -> Iterator[list[str]]:
    """Yield patterns of the files to fetch into a part's folder: the next ones only where those before bring none.

    In the order of the libraries, so that copies beside the weights (an EMA, a variant, pickles) stay where they are.
    where: begins the message of CheckpointError: an index that cannot be read.
    """
    single = f"{STEMS[part]}.safetensors"
    index = folder / f"{single}.index.json"
    own = [_shards(index, where)] if index.is_file() else []
    yield from ([[single], *own] if part == "text_encoder" else [*own, [single]])
    yield ["*.safetensors"]


def cached_folder(repo_id: str, commit: str | None) -> Path | None:
    """Return the folder of the Hub's cache that holds what is here of a commit; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    name = "transformer/config.json"  # which every checkpoint has, and is read first of all
    found = try_to_load_from_cache(repo_id, name, revision=commit)
    return Path(found).parents[1] if isinstance(found, str) else None


def files_on_hub(repo_id: str, commit: str | None) -> list[str] | None:
    """Return the names of a commit's files as the Hub lists them; None where it does not answer. Fetches no file.

    Raises CheckpointError where it refuses to list them.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    try:
        found = HfApi().model_info(repo_id, revision=commit, timeout=_HUB_TIMEOUT_S)
    except (HTTPError, OSError) as error:  # OSError: with HF_HUB_OFFLINE=1
        if isinstance(error, HfHubHTTPError) and 400 <= error.response.status_code < 500:
            said = " ".join(str(error).split())[:300]
            raise CheckpointError(f"checkpoint={repo_id!r}: the Hub does not list its files ({said})") from error
        return None
    return [file.rfilename for file in found.siblings or ()]


def require_on_hub(part: str, names: Sequence[str], where: str) -> None:
    """Raise CheckpointError unless there are weights of a part among the names of the Hub's files."""
    own = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
    if not any(name.endswith(".safetensors") for name in own):
        raise CheckpointError(f"{where} holds {_instead(own)} on the Hub; expected {STEMS[part]}.safetensors")


def _instead(names: list[str]) -> str:
    """Say what there is in place of weights."""
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return f"{shards[0]} but no index of shards; download it again"
    if pickles := [name for name in names if name.endswith(_PICKLE_SUFFIXES)]:
        return (
            f"only pickled weights ({pickles[0]}), which can run code when read "
            "(convert it with save_pretrained(safe_serialization=True))"
        )
    return "no weights"


def _weights_of(folder: Path, name: str, where: str) -> list[str]:
    """Return the names of the shards of an index, or of the single file itself."""
    if not name.endswith(".json"):
        return [name]
    shards = _shards(folder / name, where)
    if absent := [shard for shard in shards if not (folder / shard).is_file()]:
        raise CheckpointError(f"{where} lacks {absent[0]}, listed in {name}; download it again")
    return shards


def _shards(index: Path, where: str) -> list[str]:
    """Return the names of the shards that an index lists."""
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise ValueError("expected names of files beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{where}{index.name} is not an index of shards ({problem}); download it again"
        ) from error
    return shards


def saved_weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a file holds of a torch module: parameters, tied ones once, and buffers that are saved."""
    yield from module.named_parameters()
    saved = module.state_dict().keys()  # not these themselves: tied weights are there under each name
    yield from ((name, value) for name, value in module.named_buffers() if name in saved)


def weight_shapes(module: torch.nn.Module) -> dict[str, torch.Size]:
    """Return the shapes of a module's `saved_weights` by name."""
    return {name: value.shape for name, value in saved_weights(module)}


def stock_name(key: str) -> str:
    """Return a weight's name in a transformer's single file without what trainers and other programs put before it."""
    return _PREFIX.sub("", key, count=1)


def check_whole(path: Path, where: str) -> None:
    """Raise CheckpointError, from the header alone, where a file of weights ends early or is none. where: begins it."""
    with open_weights(path, where):
        pass


@contextlib.contextmanager
def open_weights(path: Path, where: str) -> Iterator[Any]:
    """Open a file of weights as `safe_open` does. Raises CheckpointError where it cannot be read. where: begins it."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        remedy = "a pointer of Git LFS: git lfs pull" if pointer else f"{error}; download it again"
        raise CheckpointError(f"{where}{path.name} is not readable as safetensors ({remedy})") from error
