"""Records profiles, and keeps the profiler of a libtpu that JAX was not built with out of the process.

jaxlib 0.10.2 dies of SIGSEGV when it starts the profiler of libtpu 0.0.52, whose structures are larger than those that
it knows ("Unexpected PLUGIN_Profiler_Api size: expected 80, got 104"); that of 0.0.42, which it asks for, works.
"""

import contextlib
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import jax
from jaxlib import xla_client
from packaging.requirements import Requirement

from splash_workbench.errors import UserError

_loaded_without_profiler = False


class ProfilerError(UserError):
    """Profiling would end the process; the text says why, and what to install."""


def load_libtpu_without_profiler() -> None:
    """Load libtpu, to compile with; JAX, which would start its profiler with every trace, finds it loaded.

    Does nothing where libtpu is loaded already.

    Raises:
      ImportError: it is not installed.
    """
    global _loaded_without_profiler
    if not xla_client.pjrt_plugin_loaded("tpu"):
        import libtpu

        xla_client.load_pjrt_plugin_dynamically("tpu", os.environ.get("TPU_LIBRARY_PATH") or libtpu.get_library_path())
        _loaded_without_profiler = True


@contextlib.contextmanager
def trace(folder: Path, options: jax.profiler.ProfileOptions) -> Iterator[None]:
    """Profile the block into a folder. Raises as `check_profiler`."""
    check_profiler()
    with jax.profiler.trace(folder, profiler_options=options):
        yield


def check_profiler() -> None:
    """Start JAX's backends, as profiling would.

    Raises:
      ProfilerError: the process would die of profiling.
    """
    jax.devices()
    if _loaded_without_profiler or not xla_client.pjrt_plugin_loaded("tpu"):
        return
    try:
        found = metadata.version("libtpu")
    except metadata.PackageNotFoundError:  # one that no package brought, e.g. TPU_LIBRARY_PATH of an image
        return
    requirements = map(Requirement, metadata.requires("jax") or ())
    wanted = next((r for r in requirements if r.name == "libtpu"), None)
    if wanted is not None and not wanted.specifier.contains(found, prereleases=True):
        raise ProfilerError(
            f"libtpu {found} is installed, and profiling with it would end the process: jax {jax.__version__} needs "
            f"libtpu{wanted.specifier}; pip install 'jax[tpu]=={jax.__version__}'"
        )
