"""Checkpoints in diffusers' folder layout -> torch modules without storage -> weights as JAX arrays.

Only safetensors are read, only the parts (`text_encoder/`, `vae/`, ...) that were asked for, and no code from a
checkpoint is ever run: classes are the ones named here.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from pipeline.checkpoints.stored import dtype_of, open_stored
from pipeline.checkpoints.tiny import TRAINED_FOLDER, ensure_tiny_checkpoint
from pipeline.checkpoints.tiny_i2v import ensure_tiny_i2v
from pipeline.checkpoints.weight_files import (
    STEMS,
    check_whole,
    files_to_fetch,
    open_weights,
    saved_weights,
    stock_name,
    weight_files,
)
from pipeline.model.placement import read_whole
from pipeline.requests.errors import CheckpointError
from pipeline.requests.request import Stage
from splash_workbench.files import user_path
from splash_workbench.provenance import user_cache_dir

logger = logging.getLogger(__name__)

TINY, RANDOM, TINY_I2V = "tiny", "tiny-random", "tiny-i2v"
#: Made in the cache folder when they are asked for.
_MADE = {TINY_I2V: ensure_tiny_i2v, RANDOM: ensure_tiny_checkpoint}
_PARTS = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
STAGE_PARTS: Mapping[Stage, tuple[str, ...]] = {
    "text": ("tokenizer", "text_encoder"),
    "denoise": ("transformer", "scheduler"),
    "vae": ("vae",),
}
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_SAMPLED_BLOCKS = 16
_BLOCK_BYTES = 65536


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose parts are fetched when asked for.

    name: as the user gave it. folder: of a local one. repo_id, commit: of one on the Hub. transformer: a file with the
    transformer's weights instead of its own.
    """

    name: str
    folder: Path | None = None
    repo_id: str | None = None
    commit: str | None = None
    transformer: Path | None = None

    def part(self, part: str) -> Path:
        """Return the folder of one part; of one on the Hub, downloaded first without its weights.

        Raises CheckpointError without it.
        """
        assert part in _PARTS, part
        folder = self._root(f"{part}/*.json", f"{part}/*.model", f"{part}/*.txt") / part
        if not folder.is_dir():
            raise self.error(f"no folder {part}/ in it; expected diffusers' layout ({', '.join(_PARTS)})")
        if part == "tokenizer" and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
            raise self.error(f"tokenizer/ holds no tokenizer; expected {' or '.join(_TOKENIZER_FILES)}")
        return folder

    def weight_files(self, part: str) -> list[Path]:
        """Return the files of a part's weights, see `weight_files`; only they are downloaded from the Hub."""
        if part == "transformer" and self.transformer is not None:
            return [self.transformer]
        folder, where = self.part(part), self.where(part)
        for patterns in files_to_fetch(folder, part, where) if self.folder is None else ():
            self._root(*(f"{part}/{pattern}" for pattern in patterns))
            if any(found for pattern in patterns for found in folder.glob(pattern)):
                break
        return weight_files(folder, part, where)

    def config(self, part: str) -> dict[str, Any]:
        """Read a part's configuration, with the library's defaults for what it leaves out. Raises CheckpointError."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        return with_defaults(part, self._read_json(f"{part}/{name}"))

    def pipeline_class(self) -> str | None:
        """Return the class that model_index.json names, None without that file. Raises CheckpointError."""
        if self.folder is not None and not (self.folder / "model_index.json").exists():
            return None
        return self._read_json("model_index.json").get("_class_name")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self._root(name) / name).read_text(encoding="utf-8"))
        except OSError as error:
            raise self.error(f"cannot read {name} ({error.strerror}); expected diffusers' layout") from error
        except (ValueError, RecursionError) as error:
            raise self.error(f"{name} is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise self.error(f"{name} holds {type(content).__name__}, expected an object")
        return content

    def where(self, part: str) -> str:
        """Return what begins a message about a part's weights."""
        if part == "transformer" and self.transformer is not None:
            return f"transformer={str(self.transformer)!r}: "
        return f"checkpoint={self.name!r}: {part}/"

    def error(self, problem: str) -> CheckpointError:
        """Return an error about this checkpoint, to be raised."""
        return CheckpointError(f"checkpoint={self.name!r}: {problem}")

    def _root(self, *patterns: str) -> Path:
        """Return the checkpoint's folder; of one on the Hub, with the files of these patterns downloaded first."""
        if self.folder is not None:
            return self.folder
        assert self.repo_id is not None
        return _snapshot(self.repo_id, self.commit, list(patterns))

    def identities(self, *stages: Stage) -> dict[Stage, str]:
        """Return the `identity` of the weights of each stage. Raises CheckpointError."""
        return {stage: self.identity(*STAGE_PARTS[stage]) for stage in stages}

    def identity(self, *parts: str) -> str:
        """Return the identity of these weights: the Hub commit, or a digest of a local folder's files.

        Files over 1 MiB are sampled (length, beginning, and blocks spread evenly), so that 11 GB need not be read: a
        change of single values in a large local file can go unnoticed, another training run cannot. Raises
        CheckpointError for a file of weights that ends early.
        """
        hub = f"{self.repo_id}@{self.commit}" if self.commit is not None else ""
        if hub and (self.transformer is None or "transformer" not in parts):
            return hub
        digest = hashlib.sha256(hub.encode())
        for part in parts:
            files: list[Path] = []
            if not hub:
                files = [
                    path for suffix in ("json", "model", "txt") for path in self.part(part).glob(f"[!.]*.{suffix}")
                ]
            if part in STEMS and (not hub or part == "transformer"):
                weights = self.weight_files(part)
                for path in weights:
                    check_whole(path, self.where(part))  # here, not when its stage's turn comes
                files += weights
            for path in sorted(files):
                size = path.stat().st_size
                digest.update(f"{part}/{path.name}:{size}\n".encode())
                with path.open("rb") as file:
                    if size <= _SAMPLED_BLOCKS * _BLOCK_BYTES:
                        digest.update(file.read())
                        continue
                    for block in range(_SAMPLED_BLOCKS):
                        file.seek((size - _BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1))
                        digest.update(file.read(_BLOCK_BYTES))
        return f"sha256:{digest.hexdigest()[:32]}"


def resolve_checkpoint(
    name: str, revision: str | None = None, cache_dir: Path | None = None, transformer: str | None = None
) -> Checkpoint:
    """Find a checkpoint: "tiny" or "tiny-i2v" of this package, "tiny-random", a local folder, or a Hub id "owner/name".

    "tiny-i2v" and "tiny-random" are made in the cache folder. transformer: a file with other weights for its
    transformer. Raises CheckpointError when it is none of these or cannot be reached.
    """
    folder = TRAINED_FOLDER if name == TINY else user_path(name)
    if name in _MADE or folder.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"revision={revision!r}: only a Hub id has revisions, not checkpoint={name!r}; leave it out"
            )
        found = Checkpoint(name, _MADE[name](cache_dir or user_cache_dir()) if name in _MADE else folder)
    elif folder.is_file():
        raise CheckpointError(f"checkpoint={name!r}: a file; expected a folder in diffusers' layout")
    elif name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise CheckpointError(
            f"checkpoint={name!r}: no such folder; expected {', '.join((TINY, *_MADE))}, an existing folder, or "
            "owner/name"
        )
    else:
        found = hub_checkpoint(name, revision)
    if transformer is None:
        return found
    path = user_path(transformer)
    if not path.is_file() or path.suffix != ".safetensors":
        problem = "a file of another kind" if path.is_file() else "no such file"
        raise CheckpointError(f"transformer={transformer!r}: {problem}; expected a file of safetensors")
    return dataclasses.replace(found, transformer=path)


def hub_checkpoint(repo_id: str, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint on the Hub, whatever folders there are here. Raises CheckpointError if out of reach."""
    snapshot = _snapshot(repo_id, revision, ["model_index.json", "*/config.json", "scheduler/*.json"])
    return Checkpoint(name=repo_id, repo_id=repo_id, commit=snapshot.name)


def with_defaults(part: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration, with diffusers' defaults for what one of transformer/ or vae/ leaves out."""
    cls = _diffusers_classes().get(part)
    parameters = inspect.signature(cls.__init__).parameters.values() if cls else ()
    return {**{each.name: each.default for each in parameters if each.default is not each.empty}, **config}


def _diffusers_classes() -> dict[str, Any]:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    return {"transformer": CogVideoXTransformer3DModel, "vae": AutoencoderKLCogVideoX}


def _snapshot(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise CheckpointError(f"checkpoint={repo_id!r}: not a folder here, and not a valid Hub id ({error})") from error
    except HfHubHTTPError as error:
        detail = str(error).strip().splitlines()[0]
        raise CheckpointError(f"checkpoint={repo_id!r} revision={revision}: the Hub refused it ({detail})") from error
    except (HTTPError, OSError) as error:
        raise CheckpointError(
            f"checkpoint={repo_id!r}: no such folder here, and the Hub cannot be reached; "
            "check the name and the network, or give a folder that holds the checkpoint"
        ) from error


@dataclasses.dataclass
class LoadedModule:
    """A torch module without storage (on the meta device) and its weights by name."""

    module: torch.nn.Module
    weights: dict[str, Any]


def import_libraries() -> None:
    """Import diffusers' and transformers' models, some seconds the first time, so that no stage's timing holds that."""
    from transformers import T5EncoderModel, T5Tokenizer  # noqa: F401

    _diffusers_classes()


def build_module(part: str, config: Mapping[str, Any], dtype: torch.dtype) -> torch.nn.Module:
    """Build the stock module of a part from its configuration alone, on the meta device, in eval mode."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        if part == "text_encoder":
            module = T5EncoderModel(T5Config(**config))
        else:
            module = _diffusers_classes()[part].from_config(dict(config))
    # torch's own `to`: diffusers' warns of modules to keep in float32, of which these have none.
    return torch.nn.Module.to(module, dtype).eval()


@contextlib.contextmanager
def open_module(
    checkpoint: Checkpoint, part: str, dtype: torch.dtype, keep: Callable[[str], bool] = lambda name: True
) -> Iterator[LoadedModule]:
    """Open one part ("text_encoder", "transformer" or "vae"); its weights are to be read in the block.

    keep: which parameters are wanted at all, by name.
    Raises CheckpointError as `find_weights` does.
    """
    module = build_module(part, checkpoint.config(part), dtype)
    keys = find_weights(checkpoint, part, module, keep)
    with contextlib.ExitStack() as stack:
        paths = dict.fromkeys(path for path, _ in keys.values())
        files = {path: stack.enter_context(open_stored(path, checkpoint.where(part))) for path in paths}
        # A floating-point weight takes the dtype asked for, as from_pretrained(dtype=...) does.
        yield LoadedModule(module, {name: files[path].weight(key, dtype) for name, (path, key) in keys.items()})


def load_module(
    checkpoint: Checkpoint,
    part: str,
    dtype: torch.dtype,
    keep: Callable[[str], bool] = lambda name: True,
    place: Callable[[np.ndarray], Any] = jax.device_put,
) -> LoadedModule:
    """Load one part as `open_module` does. place: puts one weight where it is wanted."""
    with open_module(checkpoint, part, dtype, keep) as opened:
        weights = {name: place(read_whole(weight)) for name, weight in opened.weights.items()}
    return LoadedModule(opened.module, jax.block_until_ready(weights))


def find_weights(
    checkpoint: Checkpoint, part: str, module: torch.nn.Module, keep: Callable[[str], bool] = lambda name: True
) -> dict[str, tuple[Path, str]]:
    """Return the file and the key of each weight of a part, from the files' headers.

    module: the part's, without storage. keep: which of its weights are wanted at all, by name.
    Raises CheckpointError when weights are missing, unexpected, of another shape, of a dtype that is not floating,
    unreadable, or only there as pickle.
    """
    where, wanted = checkpoint.where(part), {name: value for name, value in saved_weights(module) if keep(name)}
    first = {id(value): name for name, value in module.named_parameters()}
    aliases = {name: first[id(value)] for name, value in module.named_parameters(remove_duplicate=False)}
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or []  # a whole T5 has a decoder, too
    single_file = part == "transformer" and checkpoint.transformer is not None
    found: dict[str, tuple[Path, str]] = {}
    unexpected: list[str] = []
    for path in checkpoint.weight_files(part):
        with open_weights(path, where) as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name = stock_name(key) if single_file else key
                name = aliases.get(name, name)
                if name not in wanted:
                    if keep(name) and not any(re.search(pattern, name) for pattern in ignored):
                        unexpected.append(key)
                    continue
                stored, expected = file.get_slice(key), list(wanted[name].shape)
                if stored.get_shape() != expected:
                    problem = f"has shape {stored.get_shape()}, expected {expected}"
                    raise CheckpointError(f"{where}{path.name}: {key} {problem}")
                dtype_of(stored.get_dtype(), wanted[name].dtype, f"{where}{path.name}: {key}")
                found[name] = path, key
    missing = sorted(wanted.keys() - found.keys())
    if missing or unexpected:
        problem = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the configuration does not"
        raise CheckpointError(
            f"{where.rstrip()} {problem} ({len(missing)} missing, {len(unexpected)} unexpected weights)"
        )
    return found
