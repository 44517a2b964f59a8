"""What the widgets say -> the types of `pipeline`. Raises its RequestError and CheckpointError."""

import collections
import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

from . import host

#: Come with the package cogvideox-splash: models, and LoRAs for them.
TINY_MODELS = ("tiny", "tiny-i2v")
TINY_LORAS = ("tiny-outline",)
DEFAULT_MODEL = "zai-org/CogVideoX1.5-5B"
#: The models by their Hub ids; the tests compare them with the pipeline's.
PUBLISHED = (
    DEFAULT_MODEL,
    "zai-org/CogVideoX1.5-5B-I2V",
    "zai-org/CogVideoX-5b",
    "zai-org/CogVideoX-5b-I2V",
    "zai-org/CogVideoX-2b",
)
NO_FILE = "no file yet"
_MODEL_IDS = "a Hub id (owner/name), a folder under ComfyUI's models folder, tiny or tiny-i2v"
AUTO = "auto"
DTYPES = (AUTO, "bfloat16", "float32")
SCHEDULERS = ("checkpoint", "ddim", "dpm")
#: Name in the widget -> (plan, weights at rest) of `pipeline.requests.options.ParallelOptions`.
PARALLEL_PLANS = {
    AUTO: ("auto", "replicated"),
    "ulysses": ("ulysses", "replicated"),
    "ulysses, weights sharded": ("ulysses", "sharded"),
    "ulysses_allgather": ("ulysses_allgather", "replicated"),
    "megatron": ("megatron", "replicated"),
    "seed_tp": ("seed_tp", "replicated"),
}
#: Name in the widget -> (implementation, softmax, qk_dtype) of `pipeline.requests.request.AttentionOptions`.
KERNELS: dict[str, tuple[str | None, str | None, str | None]] = {
    AUTO: (None, None, None),
    "fixed_bound": ("pallas_tpu", "fixed_bound", None),
    "online": ("pallas_tpu", "online", None),
    "int8": ("pallas_tpu", None, "int8"),
    "interpret": ("pallas_interpret", None, None),
    "xla": ("xla", None, None),
}
QUALITIES = ("exact", "fast", "fastest")
#: Name in the widget -> fields of `pipeline.requests.reuse.CacheOptions`, as configs/cache/ has them.
CACHES: dict[str, dict[str, Any]] = {
    "by quality": {},
    "none": {"method": "none", "unconditional_every": 1},
    "teacache": {"method": "teacache"},
    "magcache": {"method": "magcache"},
    "first_block": {"method": "first_block"},
    "unconditional": {"method": "none", "unconditional_every": 2},
}
#: What the pipeline's messages say -> what a user of the nodes knows.
_WIDGET_TERMS = (
    (r" revision=None\b", ""),
    (r"\bcheckpoint=", "model_id="),
    (r"\btiny, tiny-i2v, tiny-random, a folder, or a Hub id\b", _MODEL_IDS),
    (r"\btiny, tiny-i2v, tiny-random, an existing folder, or owner/name\b", _MODEL_IDS),
    (r"\bimage=null\b", "no image"),
    (r"\bimage='as given'", "the node CogVideoX TPU Image"),
    (r", or context_frames=\d+", ""),
    (r"\bexpected image=path instead of video\b", "expected the node CogVideoX TPU Image instead of Video"),
    (r"\bexpected image=path\b", "expected the node CogVideoX TPU Image before the sampler"),
    (r"\btopology='[a-z0-9]+-(\d+)'", r"num_devices=\1"),
    (r"\bexpected [a-z0-9]+-N with N one of ([\d, ]+\d), or chips as [a-z0-9:]+", r"expected one of \1"),
    (r"\bparallel\.num_devices=", "num_devices="),
    (r"\bparallel=ulysses_sharded\b", "parallel_plan=ulysses, weights sharded"),
    (r"\bparallel(\.plan)?=", "parallel_plan="),
    (r"\battention\.implementation=", "kernel="),
    (r"\bpallas_interpret\b", "interpret"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_Function = TypeVar("_Function", bound=Callable[..., Any])
#: Packages under these nodes, each with a module that no other of its name has; those that others import come first.
_PACKAGES = {
    "splash_attn": "types",
    "splash_workbench": "provenance",
    "offline_tpu": "machine.devices",
    "pipeline": "requests.limits",
}


def limits() -> Mapping[str, Any]:
    """Return the constants of pipeline.requests.limits, without importing it; None each where it is not installed."""
    file = _file_of(_spec("pipeline"), _PACKAGES["pipeline"])
    if file is None and (root := _installed_root("pipeline")) is not None:
        file = _file_of(PathFinder.find_spec("pipeline", [root]), _PACKAGES["pipeline"])
    return collections.defaultdict(lambda: None, runpy.run_path(str(file)) if file else {})


def require_packages() -> None:
    """Make the packages under these nodes importable, whatever else on Python's path has one of their names.

    Raises RuntimeError, which says what to do, where they are not installed or another of their name was imported.
    """
    for package, module in _PACKAGES.items():
        spec = _spec(package)
        own = _file_of(spec, module) is not None
        root = None if own else _installed_root(package)
        if not own and (root is None or package in sys.modules):
            there = list(spec.submodule_search_locations or [spec.origin]) if spec else []
            where = f"; another package of the name {package} is at {there[0]}" if there else ""
            install = "install cogvideox-splash into ComfyUI's Python (python -m pip install <its folder>)"
            raise _not_importable(f"{package}{where}; {'disable the pack that brings it' if root else install}")
        try:
            with _first_on_path(root):
                importlib.import_module(f"{package}.{module}")
        except ModuleNotFoundError as error:  # a dependency
            raise _not_importable(f"{error.name}; install it with the pack's requirements.txt") from error


def _not_importable(what: str) -> RuntimeError:
    return RuntimeError(f"CogVideoX TPU nodes: cannot import {what}, see the pack's README")


def _spec(package: str) -> ModuleSpec | None:
    """Return the spec of a package: of the imported one, if it is."""
    try:
        return importlib.util.find_spec(package)
    except ValueError:  # imported by a program that gave it no spec
        module = sys.modules[package]
        spec = ModuleSpec(package, None, origin=getattr(module, "__file__", "no file"))
        spec.submodule_search_locations = list(getattr(module, "__path__", []))
        return spec


def _file_of(spec: ModuleSpec | None, module: str) -> Path | None:
    """Return the file of the module that tells our package from others of its name; None of those."""
    folders = (spec and spec.submodule_search_locations) or ()
    files = (Path(folder, *module.split(".")).with_suffix(".py") for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _installed_root(package: str) -> str | None:
    """Return where the distribution that holds one of our packages is installed, or its editable install points to."""
    try:
        distribution = importlib.metadata.distribution("cogvideox-splash")
    except importlib.metadata.PackageNotFoundError:
        return None
    url = json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")
    roots = (str(distribution.locate_file("")), unquote(urlparse(url).path))
    return next((root for root in roots if _file_of(PathFinder.find_spec(package, [root]), _PACKAGES[package])), None)


@contextlib.contextmanager
def _first_on_path(root: str | None) -> Iterator[None]:
    """Have imports in the block look into a folder first, and leave the path as it was."""
    before = list(sys.path)
    sys.path[:0] = [root] if root else []
    try:
        yield
    finally:
        sys.path[:] = before


def checked_widgets(execute: _Function) -> _Function:
    """Have a node check the values of its widgets, and its errors name these, not the keys of the command line.

    Optional widgets that a workflow leaves out get their defaults. Raises RequestError.
    """

    @functools.wraps(execute)
    def checked(node: Any, *linked: Any, **values: Any) -> Any:
        require_packages()
        from splash_workbench.errors import UserError

        try:
            return execute(node, *linked, **_checked(node.define_schema(), values))
        except UserError as error:
            raise type(error)(*map(_in_widget_terms, error.messages)) from error

    return checked  # type: ignore[return-value]


def _in_widget_terms(message: str) -> str:
    from pipeline.requests.models import MODELS

    for name in sorted(MODELS, key=len, reverse=True):  # a name begins another
        model_id = f"model_id={MODELS[name].checkpoint}"
        message = re.sub(rf"\bmodel={re.escape(name)}(?![\w-])", model_id, message)
    for pattern, term in _WIDGET_TERMS:
        message = re.sub(pattern, term, message)
    return message


def model_ids() -> list[str]:
    """Return what the dropdown offers: published models, the tiny ones, and folders with a model below ComfyUI's."""
    found: dict[Path, str] = {}
    for folder in host.model_folders():
        for path in sorted([*folder.glob("*/model_index.json"), *folder.glob("*/*/model_index.json")]):
            found.setdefault(path.parent, path.parent.relative_to(folder).as_posix())
    return [*PUBLISHED, *TINY_MODELS, *found.values()]


def _checked(schema: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a node's inputs with defaults. ComfyUI does not check a value that comes over a link."""
    from pipeline.requests.errors import RequestError

    checked = dict(values)
    for slot in schema.inputs:
        if slot.optional:
            checked.setdefault(slot.id, slot.default)
        expected = _expected(slot, checked[slot.id]) if slot.id in checked else None
        if expected is not None:
            raise RequestError(f"{slot.id}={checked[slot.id]!r}: expected {expected}")
    return checked


def _expected(slot: Any, value: Any) -> str | None:
    """Return what a widget takes, None if it takes this value."""
    kind = slot.get_io_type()
    if kind == "COMBO":
        return None if value in slot.options else f"one of {', '.join(slot.options)}"
    if kind in ("INT", "FLOAT"):
        is_number = isinstance(value, int if kind == "INT" else int | float) and not isinstance(value, bool)
        what = f"a {'whole ' if kind == 'INT' else ''}number from {slot.min} to {slot.max}"
        return None if is_number and slot.min <= value <= slot.max else what
    python, what = {"STRING": (str, "text"), "BOOLEAN": (bool, "true or false")}.get(kind, (object, ""))
    return None if isinstance(value, python) else what


def find_checkpoint(model_id: str) -> Any:
    """Return the pipeline's Checkpoint of a model_id: one of TINY_MODELS, a folder under ComfyUI's models, owner/name.

    Nothing else is opened: a path is taken only below one of `host.model_folders()`, as written, so that a link which
    the server's owner has put there may point elsewhere.
    """
    from pipeline.checkpoints.loading import Checkpoint, hub_checkpoint, resolve_checkpoint
    from pipeline.requests.errors import CheckpointError

    model_id = model_id.strip()
    if model_id in TINY_MODELS:
        return resolve_checkpoint(model_id)
    folder = _local_folder(model_id)
    if folder is not None:
        return Checkpoint(name=model_id, folder=folder)
    if _HUB_ID.fullmatch(model_id):
        return hub_checkpoint(model_id)
    raise CheckpointError(f"model_id={model_id!r}: expected {_MODEL_IDS}; a folder is given relative to that")


def _local_folder(model_id: str) -> Path | None:
    for root in host.model_folders():
        root = Path(os.path.abspath(root))
        folder = Path(os.path.abspath(root / model_id))
        with contextlib.suppress(OSError):  # a name that is too long for one
            if folder != root and folder.is_relative_to(root) and folder.is_dir():
                return folder
    return None


def resolve_dtype(dtype: str, model_id: str) -> str:
    """Return the model's own dtype for "auto"; for a model that is not known, the one of the published CogVideoX."""
    if dtype != AUTO:
        return dtype
    from pipeline.requests.models import model_defaults

    return model_defaults(model_id.strip(), "cogvideox1.5-5b").dtype


def attention_options(kernel: str) -> Any:
    """Return the `pipeline.requests.request.AttentionOptions` of a kernel's name."""
    from pipeline.requests.request import AttentionOptions
    from splash_attn.types import Variant

    implementation, softmax, qk_dtype = KERNELS[kernel]
    return AttentionOptions(
        implementation=implementation,  # type: ignore[arg-type] # one of its Literals, see KERNELS
        variant=Variant(softmax=softmax) if softmax else None,  # type: ignore[arg-type]
        qk_dtype=qk_dtype,  # type: ignore[arg-type]
    )


def parallel_options(parallel_plan: str, num_devices: int) -> Any:
    """Return the `pipeline.requests.options.ParallelOptions` of a plan's name. num_devices: 0 for all."""
    from pipeline.requests.options import ParallelOptions

    plan, weights = PARALLEL_PLANS[parallel_plan]
    return ParallelOptions(plan=plan, num_devices=num_devices or None, weights=weights)  # type: ignore[arg-type]


def check_devices(attention: Any, parallel: Any) -> None:
    """Raise RequestError where the devices here cannot do what is asked for. Starts JAX."""
    import jax

    from pipeline.requests.errors import RequestError

    platform, available = jax.default_backend(), jax.device_count()
    if attention.implementation == "pallas_tpu" and platform != "tpu":
        kernel = attention.qk_dtype or attention.variant.softmax
        raise RequestError(
            f"kernel={kernel}: needs a TPU, and JAX runs on {platform!r} here; "
            "take kernel=auto, or interpret to try it slowly"
        )
    if parallel.num_devices is not None and parallel.num_devices > available:
        raise RequestError(
            f"num_devices={parallel.num_devices}: JAX sees {available} of {platform!r} here; expected at most "
            f"{available}, or 0 for all"
        )
