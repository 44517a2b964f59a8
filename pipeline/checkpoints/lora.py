"""LoRAs: names of their weights as trainers give them, whether they fit a transformer, and merging them into it.

Known are the names of PEFT and diffusers (`transformer.transformer_blocks.0.attn1.to_q.lora_A.weight`), the same below
`diffusion_model.` as ComfyUI has them, and those of kohya's scripts and of VideoX-Fun
(`lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight`).
"""

import contextlib
import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from pipeline.checkpoints.stored import ONE_AT_A_TIME
from pipeline.checkpoints.weight_files import open_weights
from pipeline.model.placement import Changed
from pipeline.requests.errors import CheckpointError
from pipeline.requests.media import content_digest
from pipeline.requests.request import LoraFile
from splash_workbench.files import user_path

#: LoRAs that come with the package, by the names that stand for their paths.
SHIPPED: Mapping[str, Path] = {"tiny-outline": Path(__file__).parents[1] / "tiny_lora"}
_PREFIX = re.compile(
    r"^(base_model\.model\.)?((model\.)?diffusion_model\.|transformer\.|unet\.|lora_unet_+|lora_transformer_+)?"
)
_HALF = re.compile(r"(.+)\.(lora_A|lora_down|lora\.down|lora_B|lora_up|lora\.up)(\.\w+)?\.weight")
_DOWN = ("lora_A", "lora_down", "lora.down")
#: Of other kinds of adapters, which are not merged here.
_OTHER = re.compile(
    r"dora_scale|lora_magnitude_vector|hada_w|lokr_|oft_|lora_B\.(\w+\.)?bias|\.diff(_b)?$|(lora_te|text_encoder)"
)


@dataclasses.dataclass(frozen=True)
class LoraPair:
    """The two factors of one weight's change, by their keys in a file. scale: of their product, at strength 1."""

    down: str
    up: str
    scale: float


def lora_identity(loras: Sequence[LoraFile]) -> tuple[str, ...]:
    """Return what tells LoRAs from others, by their content and strengths. Raises RequestError."""
    return tuple(f"{content_digest('lora', str(_path(lora)))} at {lora.strength:g}" for lora in loras)


def check_loras(loras: Sequence[LoraFile], shapes: Mapping[str, Sequence[int]], of: str) -> None:
    """Raise CheckpointError for a LoRA that does not fit a transformer, from the headers of its files.

    shapes: of the transformer's weights, by their stock names. of: the checkpoint, for messages.
    """
    for lora in loras:
        with _opened(lora) as (file, config):
            _pairs(lora, file, config, shapes, of)


@dataclasses.dataclass(frozen=True)
class LoraChange:
    """What LoRAs add to one weight. factors: (up, down, scale) of each."""

    factors: Sequence[tuple[Any, Any, float]]

    def applied(self, values: np.ndarray, whole: Sequence[int], start: int = 0) -> np.ndarray:
        """Return rows of a weight of shape `whole`, from `start` on, with the change: in float32, rounded once."""
        changed = values.astype(np.float32)
        for up, down, scale in self.factors:  # whole products, so that the bits do not depend on the rows
            product = (_matrix(up) @ _matrix(down)).reshape(whole)
            changed += scale * product[start : start + len(values)]
        return changed.astype(values.dtype)


@dataclasses.dataclass(frozen=True)
class MergedWeight(Changed):
    """A weight that LoRAs change as it is read."""

    change: LoraChange
    divisible = False  # the whole change is computed for any part

    def read(self, start: int, stop: int, out: np.ndarray) -> None:
        """Write rows to `out`."""
        values = np.empty((stop - start, *self.shape[1:]), self.dtype)
        self.weight.read(start, stop, values)
        with ONE_AT_A_TIME:  # changes in float32 of many weights would be twice the model
            out[...] = self.change.applied(values, self.shape, start).reshape(out.shape)


def lora_changes(loras: Sequence[LoraFile], shapes: Mapping[str, Sequence[int]], of: str) -> dict[str, LoraChange]:
    """Return what LoRAs add to stock weights, by their names. Arguments and errors are those of `check_loras`."""
    factors: dict[str, list[tuple[Any, Any, float]]] = {}
    for lora in loras:
        with _opened(lora) as (file, config):
            for name, pair in _pairs(lora, file, config, shapes, of).items():
                up, down = file.get_tensor(pair.up), file.get_tensor(pair.down)
                factors.setdefault(name, []).append((up, down, lora.strength * pair.scale))
    return {name: LoraChange(each) for name, each in factors.items()}


def merge_loras(weights: dict[str, Any], loras: Sequence[LoraFile], of: str) -> None:
    """Add LoRAs to stock weights on the host, each rounded once to its dtype. Raises as `check_loras`."""
    shapes = {name: value.shape for name, value in weights.items()}
    for name, change in lora_changes(loras, shapes, of).items():
        weights[name] = change.applied(weights[name], shapes[name])


def _path(lora: LoraFile) -> Path:
    return SHIPPED.get(lora.path) or user_path(lora.path)


def _matrix(tensor: Any) -> np.ndarray:
    return tensor.float().flatten(1).numpy()


@contextlib.contextmanager
def _opened(lora: LoraFile) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Open a LoRA: its weights, and PEFT's settings, from beside them or as diffusers keeps them among them."""
    where, path = f"lora={lora.path!r}: ", _path(lora)
    if not path.exists():
        names = ", ".join(SHIPPED)
        raise CheckpointError(f"{where}no such file; expected {names}, a file of safetensors, or PEFT's folder")
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(found) != 1 or found[0].suffix != ".safetensors":
        instead = f"holds {len(found)} files of safetensors" if path.is_dir() else "a file of another kind"
        raise CheckpointError(f"{where}{instead}; expected one of safetensors")
    with open_weights(found[0], where) as file:
        stat = found[0].stat()
        if (wrong := _not_finite(found[0], stat.st_mtime_ns, stat.st_size)) is not None:
            raise CheckpointError(f"{where}{wrong}; expected finite floats: the file is damaged, or of another kind")
        beside = path / "adapter_config.json"
        try:
            settings = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
            settings = {name.removeprefix("transformer."): value for name, value in settings.items()}
            if beside.is_file():
                settings = dict(json.loads(beside.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}its settings are not readable ({error})") from error
        yield file, settings


@functools.lru_cache(maxsize=64)
def _not_finite(path: Path, modified_ns: int, size: int) -> str | None:
    """Return the first tensor of a file that holds something else than finite floats, or None; numbers may be whole.

    modified_ns, size: of the file, which is read anew when they change.
    """
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 # no mapping
            values = file.get_tensor(key)
            if not values.is_floating_point() and values.numel() > 1:
                return f"{key} is {str(values.dtype).removeprefix('torch.')}"
            if not values.float().isfinite().all():
                return f"{key} holds NaN or infinity"
    return None


def _pairs(
    lora: LoraFile, file: Any, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], of: str
) -> dict[str, LoraPair]:
    """Return the pairs of a LoRA by the stock names of what they change. Raises CheckpointError where one is wrong."""
    where = f"lora={lora.path!r}: "
    keys = list(file.keys())
    if other := next((key for key in keys if _OTHER.search(key)), None) or ("DoRA" if config.get("use_dora") else None):
        raise CheckpointError(f"{where}{other}: not a plain LoRA of the transformer, and nothing else is merged here")
    halves: dict[str, dict[str, str]] = {}
    alphas: dict[str, str] = {}
    names = {name.removesuffix(".weight").replace(".", "_"): name for name in shapes if name.endswith(".weight")}
    unknown = []
    for key in keys:
        match = _HALF.fullmatch(key)
        base = match[1] if match else key.removesuffix(".alpha")
        name = names.get(_PREFIX.sub("", base, count=1).replace(".", "_"))
        if name is None or (match is None and base == key):
            unknown.append(key)
        elif match:
            half = "down" if match[2] in _DOWN else "up"
            if (other := halves.setdefault(name, {}).setdefault(half, key)) != key:
                raise CheckpointError(f"{where}{other} and {key} are of one weight: expected a file of one LoRA")
        else:
            alphas[name] = key
    if unknown or not halves:
        what = f"{unknown[0]} (and {len(unknown) - 1} more)" if unknown else "an empty file"
        raise CheckpointError(
            f"{where}{what} fits no weight of {of}: a LoRA of another model, or with names of an unknown trainer"
        )
    pairs = {}
    for name, both in halves.items():
        if len(both) < 2:
            raise CheckpointError(f"{where}only one half, {next(iter(both.values()))}; it was not saved whole")
        down, up = (tuple(file.get_slice(both[half]).get_shape()) for half in ("down", "up"))
        out, *rest = shapes[name]
        is_pair = min(len(up), len(down)) >= 2 and down[0] > 0
        if not is_pair or (*up[:2], math.prod(down[1:])) != (out, down[0], math.prod(rest)):
            raise CheckpointError(
                f"{where}{both['up']} {list(up)} times {both['down']} {list(down)} is no {list(shapes[name])} as "
                f"{name} of {of}: a LoRA of another model"
            )
        try:
            alpha = file.get_tensor(alphas[name]).item() if name in alphas else None
            scale = _scale(name, down[0], alpha, config)
        except (ValueError, TypeError, RuntimeError, AttributeError, re.error) as error:
            raise CheckpointError(f"{where}no scale of {name} in it ({error})") from error
        pairs[name] = LoraPair(both["down"], both["up"], scale)
    return pairs


def _scale(name: str, rank: int, alpha: float | None, config: Mapping[str, Any]) -> float:
    """Return alpha over rank: the file's own alpha, else the settings', else 1."""
    if alpha is None:
        patterns: Iterator[float] = (
            value
            for pattern, value in (config.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(.*\.)?{pattern}", name.removesuffix(".weight"))
        )
        alpha = next(patterns, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
