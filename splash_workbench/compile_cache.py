"""Keeps compiled programs on disk, in JAX's persistent cache."""

import functools
import glob
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from splash_workbench.provenance import user_cache_dir

logger = logging.getLogger(__name__)

_DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '(.+?)'")


def use_compilation_cache(folder: Path | None = None) -> None:
    """Keep compiled programs in a folder, by default the user's; what is set (JAX_COMPILATION_CACHE_DIR) stays."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = folder or user_cache_dir() / "compiled"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
            warnings.showwarning = functools.partial(_drop_damaged, folder, warnings.showwarning)
        except OSError as error:
            logger.warning(
                "cache: cannot write to %s (%s); programs are compiled again each time, unless "
                "$COGVIDEOX_SPLASH_CACHE names another folder",
                folder,
                error.strerror,
            )
    # XLA's own caches, of GPUs, put the folder's path into every key: filled on another machine, it would serve nobody.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _drop_damaged(folder: Path, show: Callable[..., None], message: Warning | str, *rest: Any, **more: Any) -> None:
    """Remove compiled programs that JAX warns it cannot read, which it would keep; show other warnings."""
    match = _DAMAGED.match(str(message))
    if match is None:
        show(message, *rest, **more)
        return
    for entry in folder.glob(f"{glob.escape(match[1])}-*-cache"):
        entry.unlink(missing_ok=True)
    logger.warning("cache: in %s the compiled program %s was damaged; it is made anew", folder, match[1])
