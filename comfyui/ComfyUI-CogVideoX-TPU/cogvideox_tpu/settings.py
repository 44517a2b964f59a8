"""What the widgets say -> the types of `pipeline`. Raises its RequestError and CheckpointError."""

import importlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from . import host

TINY = "tiny"
DEFAULT_MODEL = "zai-org/CogVideoX1.5-5B"
AUTO = "auto"
DTYPES = (AUTO, "bfloat16", "float32")
SCHEDULERS = ("checkpoint", "ddim", "dpm")
#: Name in the widget -> (plan, weights at rest) of `pipeline.requests.parallel_options.ParallelOptions`.
PARALLEL_PLANS = {
    AUTO: ("auto", "replicated"),
    "ulysses": ("ulysses", "replicated"),
    "ulysses, weights sharded": ("ulysses", "sharded"),
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
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PACKAGES = ("pipeline.requests.request", "splash_attn.types")


def require_packages() -> None:
    """Raises RuntimeError, saying what to do, unless the packages under these nodes are there, and the right ones."""
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            package = name.partition(".")[0]
            is_ours = str(error.name).startswith(f"{package}.")  # not a dependency of the package
            found = importlib.util.find_spec(package) if is_ours else None
            where = f"; another package of the name {package} is at {found.origin}" if found else ""
            raise RuntimeError(
                f"CogVideoX TPU nodes: cannot import {name if is_ours else error.name}{where}; install "
                "cogvideox-splash into ComfyUI's Python (python -m pip install <its folder>), see the pack's README"
            ) from error


def find_checkpoint(model_id: str) -> Any:
    """Return the pipeline's Checkpoint of a model_id: "tiny", a folder under ComfyUI's models folder, or owner/name.

    Nothing else is opened: a path is taken only below one of `host.model_folders()`, as written, so that a link which
    the server's owner has put there may point elsewhere.
    """
    from pipeline.checkpoints.loading import Checkpoint, hub_checkpoint, resolve_checkpoint
    from pipeline.requests.errors import CheckpointError

    model_id = model_id.strip()
    if model_id == TINY:
        return resolve_checkpoint(TINY)
    folder = _local_folder(model_id)
    if folder is not None:
        return Checkpoint(name=model_id, folder=folder)
    if _HUB_ID.fullmatch(model_id):
        return hub_checkpoint(model_id)
    folders = " or ".join(str(folder) for folder in host.model_folders())
    raise CheckpointError(
        f"model_id={model_id!r}: expected a Hub id (owner/name), a folder under {folders}, or {TINY}; a folder is "
        "given relative to one of these"
    )


def _local_folder(model_id: str) -> Path | None:
    if not model_id:
        return None
    for root in host.model_folders():
        root = Path(os.path.abspath(root))
        folder = Path(os.path.abspath(root / model_id))
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
    """The `pipeline.requests.request.AttentionOptions` of a kernel's name."""
    from pipeline.requests.request import AttentionOptions
    from splash_attn.types import Variant

    implementation, softmax, qk_dtype = KERNELS[kernel]
    return AttentionOptions(
        implementation=implementation,  # type: ignore[arg-type] # one of its Literals, see KERNELS
        variant=Variant(softmax=softmax) if softmax else None,  # type: ignore[arg-type]
        qk_dtype=qk_dtype,  # type: ignore[arg-type]
    )


def parallel_options(parallel_plan: str, num_devices: int) -> Any:
    """The `pipeline.requests.parallel_options.ParallelOptions` of a plan's name. num_devices: 0 for all there are."""
    from pipeline.requests.parallel_options import ParallelOptions

    plan, weights = PARALLEL_PLANS[parallel_plan]
    return ParallelOptions(plan=plan, num_devices=num_devices or None, weights=weights)  # type: ignore[arg-type]


def check_devices(attention: Any, parallel: Any) -> None:
    """Raises RequestError where the devices here cannot do what is asked for. Starts JAX."""
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
