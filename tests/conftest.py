"""Shared by all tests."""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports JAX: these tests need no accelerator, and libtpu would complain that there is none.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hydra._internal.hydra import Hydra

from helpers import XLA_FLAGS, set_aside
from splash_attn import tuned
from splash_workbench.provenance import CACHE_VARIABLE, REPO_ROOT

#: Bytes of compiled programs to keep for the next run; above it those used longest ago go.
_COMPILED_BYTES = 2**30
#: Seconds of compiling under which a program is not worth a file.
_LEAST_COMPILE_S = 0.1

with pytest.MonkeyPatch.context() as _patch:
    # XLA reads its flags once. Processes that the tests start are the user's, and a compiler for TPU is among them.
    _patch.setenv("XLA_FLAGS", f"{XLA_FLAGS} {os.environ.get('XLA_FLAGS', '')}".strip())
    jax.devices()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse slow tests that do not say how slow."""
    for item in items:
        mark = item.get_closest_marker("slow")
        if mark is not None and not mark.args:
            raise pytest.UsageError(f'{item.nodeid}: expected its time, as @pytest.mark.slow("4 min").')


@pytest.fixture(scope="session", autouse=True)
def compiled(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory):
    """Compile each program once: tests, parallel workers and later runs share one folder of them.

    Only this process and processes that are told use it: a compiler for TPU must run, to leave its schedule.
    """
    cache = getattr(pytestconfig, "cache", None)  # absent with `-p no:cacheprovider`
    folder = cache.mkdir("jax") if cache else tmp_path_factory.mktemp("jax")
    # Without the time of its use, of a process that was killed or had no limit, one entry keeps JAX from adding others.
    for entry in folder.glob("*-cache"):
        if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
            entry.unlink(missing_ok=True)
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": _LEAST_COMPILE_S,
        "jax_compilation_cache_max_size": _COMPILED_BYTES,  # a limit also makes JAX lock the folder
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    set_aside()
    yield folder
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def shared_programs(compiled: Path) -> dict[str, str]:
    """Return the variables with which a process compiles as the tests do, finds their programs, and adds its own."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(_LEAST_COMPILE_S),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(_COMPILED_BYTES),
        "XLA_FLAGS": XLA_FLAGS,
    }


@pytest.fixture(scope="session", autouse=True)
def configurations_are_composed_once():
    """Leave out that Hydra composes a configuration to read hydra.mode, which no command sets, and then once more.

    Commands in processes of their own do it twice.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Hydra, "get_mode", lambda self, config_name, overrides: None)
        yield


@pytest.fixture(scope="session")
def cache_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return names of folders, one for each test; `mktemp` would read those of all tests before it."""
    folder = tmp_path_factory.mktemp("caches")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def cache_folder(cache_folders: Iterator[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a folder of tuned entries of the test's own, instead of the user's."""
    folder = next(cache_folders)
    folder.mkdir()
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    monkeypatch.setenv(tuned.USER_VARIABLE, str(folder / "tuned"))
    return folder


@pytest.fixture(autouse=True)
def fake_jobs_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes find tests/fake_jobs.py as module `fake_jobs`."""
    here = str(REPO_ROOT / "tests")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
