"""Sets libtpu up to compile for chips that are not here, and to dump the schedules of what it compiles."""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from offline_tpu.machine.devices import DEVICES, DeviceSpec
from offline_tpu.machine.errors import UnsupportedVersionError
from offline_tpu.machine.topology import parse_topology
from splash_workbench import provenance
from splash_workbench.accelerator import accelerator_visible
from splash_workbench.errors import UserError
from splash_workbench.files import ensure_folder, require_writable
from splash_workbench.profiles.profiler import load_libtpu_without_profiler

logger = logging.getLogger(__name__)

#: The libtpu whose dump format this package reads. The flags and files are undocumented and change between releases.
SUPPORTED_LIBTPU = "0.0.52"
#: Further ones that dump alike: what was timed with one of them can be compiled with it.
EARLIER_LIBTPUS = ("0.0.45", "0.0.46", "0.0.36")
#: The jaxlib whose parser reads these dumps.
SUPPORTED_JAXLIB = "0.10.2"

#: Patterns of the files that make a prediction and its interval, for `splash_workbench.provenance`: without __init__
#: and __main__.
SOURCES = ("offline_tpu/**/[!_]*.py", "offline_tpu/machine/residuals.json")

#: Names the folder that `predict` empties and removes. A user's own --xla_jf_dump_to names one that it must not.
_DUMP_VARIABLE = "OFFLINE_TPU_DUMP_DIR"
#: Room for a program's dump.
_DUMP_BYTES = 2**25


def worker_environment(device: DeviceSpec, dump_dir: Path, compiler: str = SUPPORTED_LIBTPU) -> dict[str, str]:
    """Return the variables that a process needs before libtpu loads, to compile for `device` and dump schedules.

    Only the passes that are read are dumped: a hundredth of the whole dump's bytes. compiler: version of the libtpu.

    Raises:
      UnsupportedVersionError: another libtpu or jaxlib is installed.
    """
    _check_versions(compiler)
    is_beside = installed_version("libtpu") != compiler
    beside = {"TPU_LIBRARY_PATH": str(folder_beside(compiler) / "libtpu" / "libtpu.so")} if is_beside else {}
    return beside | {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": device.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        _DUMP_VARIABLE: str(dump_dir),
        "LIBTPU_INIT_ARGS": (
            f"--xla_jf_dump_to={dump_dir} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=^(final_(bundles|hlo-static-per-bundle-utilization)|overlay-graph)$"
        ),
    }


def find_dump_dir() -> Path:
    """Return the folder that libtpu dumps to; loads it for that where the process has no `worker_environment`.

    Raises:
      RuntimeError: an accelerator is here, and JAX_PLATFORMS is not cpu; or another libtpu is installed.
      UserError: as `check_setup`.
    """
    if folder := os.environ.get(_DUMP_VARIABLE):
        _check_versions(SUPPORTED_LIBTPU)
        return Path(folder)
    check_setup()
    return Path(_load().name) / "dump"


@functools.cache
def _load() -> tempfile.TemporaryDirectory[str]:
    """Load libtpu, which reads its flags only then; what the environment held before is put back."""
    if accelerator_visible() and jax.config.jax_platforms != "cpu":  # type: ignore[attr-defined]
        raise RuntimeError(
            "an accelerator is here, and libtpu takes only one set of flags in a process: expected JAX_PLATFORMS=cpu; "
            "predict in a process of its own, e.g. python -m offline_tpu MODULE:FUNCTION."
        )
    jax.config.update("jax_platforms", "cpu")
    folder = tempfile.TemporaryDirectory(prefix="offline_tpu-", ignore_cleanup_errors=True)
    device = DEVICES["v6e"]  # once loaded, libtpu compiles for all of them
    with _environment(worker_environment(device, Path(folder.name) / "dump")):
        describe_topology(device.topology)
    return folder


def describe_topology(name: str) -> topologies.TopologyDescription:
    """Return chips that are not here, by libtpu's name for them ("v6e:2x4"). Loads libtpu where nothing has yet.

    Raises:
      RuntimeError: libtpu does not start.
    """
    load_libtpu_without_profiler()
    return topologies.get_topology_desc(platform="tpu", topology_name=name)


def topology_mesh(topology: str, shape: Sequence[int], axis_names: Sequence[str]) -> Mesh:
    """Return a mesh of devices that are not here.

    Args:
      topology: "v6e-8" (so many chips, in the shape that such a slice has) or "v6e:2x4" (that shape).
      shape, axis_names: of the mesh; neighbours on the chips' own grid are kept together where that is possible.

    Raises:
      ValueError: the topology is not known, or the mesh does not have as many devices, or a name for each axis.
      RuntimeError: as for `predict`.
    """
    _, name = parse_topology(topology)
    if not isinstance(shape, Sequence) or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"{shape=}: expected a tuple of whole numbers, 1 or more.")
    if isinstance(axis_names, str) or len(set(axis_names)) != len(axis_names) or len(axis_names) != len(shape):
        raise ValueError(f"{axis_names=}: expected a tuple of names, another for each axis of shape={tuple(shape)}.")
    find_dump_dir()
    description = describe_topology(name)
    if math.prod(shape) != len(description.devices):
        raise ValueError(f"shape={tuple(shape)}: expected {len(description.devices)} devices, as {topology} has.")
    return topologies.make_mesh(description, tuple(shape), tuple(axis_names))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def check_setup() -> None:
    """See whether programs can be compiled and their schedules dumped here. Tells once of flags that are not used.

    Raises:
      UnsupportedVersionError: another libtpu or jaxlib is installed.
      UserError: libtpu cannot dump to the folder of temporary files: it would end the process.
    """
    _check_versions(SUPPORTED_LIBTPU)
    _tell_of_flags(None if _DUMP_VARIABLE in os.environ else os.environ.get("LIBTPU_INIT_ARGS"))
    folder = Path(tempfile.gettempdir())
    if re.search(r"\s", str(folder)):
        raise UserError(f"TMPDIR={folder}: libtpu's flags take no folder with a space; name another folder.")
    require_writable("TMPDIR", folder, _DUMP_BYTES)


@functools.cache
def _tell_of_flags(flags: str | None) -> None:
    """Tell of flags in whose place others are set: a prediction is of what is recorded with it, and nothing else."""
    if flags:
        logger.warning(
            "LIBTPU_INIT_ARGS=%s: predictions do not use it; compiler_options has flags for one program", flags
        )


def _check_versions(compiler: str) -> None:
    found_versions = {"libtpu": compiler_version(compiler), "jaxlib": installed_version("jaxlib")}
    for name, expected in (("libtpu", compiler), ("jaxlib", SUPPORTED_JAXLIB)):
        found = found_versions[name]
        if found != expected:
            beside = f", or beside it: pip install {beside_arguments(compiler)}" if name == "libtpu" and found else ""
            raise UnsupportedVersionError(
                f"{f'{name} {found}' if found else f'no {name}'} is installed, and predictions need {name} {expected}, "
                "since the dumps that they are read from change between releases; "
                f"pip install 'cogvideox-splash[offline]' (Linux, x86-64), in an environment of its own{beside}"
            )


def compiler_version(compiler: str = SUPPORTED_LIBTPU) -> str | None:
    """Return the version of the libtpu that predictions are made with, where `compiler` is to make them; None: no one.

    JAX runs a TPU with the libtpu that it asks for, and predictions need one whose dumps are known: where that is not
    the one installed, it may lie in `folder_beside`.
    """
    return compiler if is_beside(compiler) else installed_version("libtpu")


def capture(sources: Iterable[str] = SOURCES, compiler: str = SUPPORTED_LIBTPU) -> provenance.Environment:
    """Describe this process as `provenance.capture`, for predictions: with the libtpu that they are made with."""
    return with_compiler(provenance.capture(sources), compiler)


def with_compiler(captured: provenance.Environment, compiler: str = SUPPORTED_LIBTPU) -> provenance.Environment:
    """Return a description of this process with the libtpu that predictions are made with."""
    found = compiler_version(compiler)
    return dataclasses.replace(captured, versions=captured.versions | ({"libtpu": found} if found else {}))


def folder_beside(compiler: str = SUPPORTED_LIBTPU) -> Path:
    """Return the folder, below the user's cache, of a libtpu that only compiles: what `pip install --target` made."""
    return provenance.user_cache_dir() / f"libtpu-{compiler}"


def beside_arguments(compiler: str = SUPPORTED_LIBTPU) -> str:
    """Return what `pip install` needs to put a libtpu into `folder_beside`."""
    return f"--no-deps --target {shlex.quote(str(folder_beside(compiler)))} libtpu=={compiler}"


def is_beside(compiler: str) -> bool:
    """Return whether a libtpu lies in `folder_beside`, and is not the one installed."""
    if installed_version("libtpu") == compiler:
        return False
    found = distributions(name="libtpu", path=[str(folder_beside(compiler))])
    return any(distribution.version == compiler for distribution in found)


def fetch_beside(compiler: str) -> None:
    """Put a libtpu into `folder_beside` by pip, whole or not at all; it changes nothing else, and JAX does not see it.

    Raises:
      UnsupportedVersionError: pip does not get it; the message says how to do so by hand.
    """

    def install(folder: Path) -> None:
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(folder),
        ]
        done = subprocess.run([*pip, f"libtpu=={compiler}"], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["pip failed"]
            raise UnsupportedVersionError(
                f"libtpu {compiler} cannot be fetched ({said[-1]}); by hand: pip install {beside_arguments(compiler)}"
            )

    ensure_folder(folder_beside(compiler), install)


def installed_version(package: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
