"""Find a kernel by its name, or in a file of the user's, and refuse one that cannot be tuned."""

import ast
import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from splash_workbench.errors import OF_USERS_CODE, line_of
from splash_workbench.files import run_file, user_path
from splash_workbench.provenance import KERNEL_SOURCES, REPO_ROOT, parse_source, source_hash, stable_hash
from tuning.kernels.attention import ATTENTION_KERNELS
from tuning.kernels.protocol import Kernel, KernelError, tunables

#: Kernels by name.
KERNELS: dict[str, Kernel[Any, Any]] = {kernel.name: kernel for kernel in ATTENTION_KERNELS}
#: Set while a kernel's file is run, which must not start a sweep itself.
_loading: contextvars.ContextVar[str | None] = contextvars.ContextVar("loading", default=None)


def find(spec: str) -> Kernel[Any, Any]:
    """Return the kernel of a name in KERNELS or of "FILE.py:CLASS". Raises KernelError in one line."""
    if spec in KERNELS:
        return KERNELS[spec]
    text, colon, name = spec.rpartition(":")
    if not colon or not text.endswith(".py"):
        raise KernelError(f"kernel={spec}: expected {', '.join(KERNELS)}, or FILE.py:CLASS.")
    path = user_path(text).absolute()
    if not path.is_file():
        raise KernelError(f"kernel={spec}: there is no file {text}.")
    return _from_file(path, path.stat().st_mtime_ns, name)


def spec_of(kernel: Kernel[Any, Any]) -> str:
    """Return the text with which another process finds a kernel. Raises KernelError where it has no file."""
    if KERNELS.get(kernel.name) is kernel:
        return kernel.name
    try:
        path = inspect.getsourcefile(type(kernel))
    except (OSError, TypeError):
        path = None
    if path is None or not path.endswith(".py") or not Path(path).is_file():
        raise KernelError(f"{kernel.name}: expected a class in a .py file, which the worker processes can read.")
    return f"{Path(path).absolute()}:{type(kernel).__qualname__}"


def file_name(spec: str) -> str:
    """Return a kernel's "FILE.py:CLASS" without the folder."""
    path, colon, name = spec.rpartition(":")
    return f"{Path(path).name}{colon}{name}"


def file_of(spec: str) -> Path | None:
    """Return the file of a user's kernel; None for one of KERNELS."""
    return None if spec in KERNELS else user_path(spec.rpartition(":")[0]).absolute()


def hash_of(spec: str) -> str:
    """Return the hash of a kernel's sources: the user's file and the files beside it that it imports."""
    path = file_of(spec)
    if path is None:
        return source_hash(KERNEL_SOURCES)
    return stable_hash(" ".join(source_hash((other.name,), other.parent) for other in files_of(path)))


def files_of(path: Path) -> list[Path]:
    """Return a kernel's file and those beside it that it imports, of a package all of its modules, in order."""
    found = set()
    for other in _imported_files(path):
        found |= set(other.parent.rglob("*.py")) if other.name == "__init__.py" else {other}
    return sorted(found)


def _imported_files(path: Path) -> set[Path]:
    """Return a file and those beside it that it imports; of a package its __init__.py."""
    found, unread = {path}, [path]
    while unread:
        path = unread.pop()
        for name in _imported(path):
            for other in (path.parent / f"{name}.py", path.parent / name / "__init__.py"):
                if other.is_file() and path.parent != REPO_ROOT and other not in found:
                    found.add(other)
                    unread.append(other)
    return found


def refuse_class(kernel: Any) -> None:
    """Raise KernelError for the class of a kernel in the place of one."""
    if isinstance(kernel, type):
        raise KernelError(f"{kernel.__name__}: expected a kernel, as {kernel.__name__}(), got its class.")


def refuse_while_loading() -> None:
    """Raise KernelError inside a kernel's file that is being loaded: each worker would start a sweep of its own."""
    if (path := _loading.get()) is not None:
        raise KernelError(f'{path} tunes when it is imported; put that under `if __name__ == "__main__":`.')


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(parse_source(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


@functools.lru_cache(maxsize=8)
def _from_file(path: Path, mtime_ns: int, name: str) -> Kernel[Any, Any]:
    module = _run(path, mtime_ns)
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not issubclass(kind, Kernel) or kind is Kernel:
        kinds = {n: k for n, k in vars(module).items() if isinstance(k, type) and k is not Kernel}
        there = ", ".join(n for n, k in kinds.items() if issubclass(k, Kernel)) or "none"
        raise KernelError(f"{path.name}: no kernel {name!r}; its subclasses of Kernel are: {there}.")
    return checked(kind)


@functools.cache
def _run(path: Path, mtime_ns: int) -> types.ModuleType:
    """Return the module of a file, under a name that no other module has; the same for all kernels of the file.

    Run again, the file would make other classes of the same names, and instances of the first could not be pickled.
    """
    del mtime_ns  # part of the cache's key only
    name = f"_kernel_{path.stem}_{stable_hash(str(path))}"
    sys.path.insert(0, str(path.parent))
    token = _loading.set(path.name)
    try:
        return run_file(path, name)
    except KernelError:
        raise
    except (Exception, SystemExit) as error:
        raise KernelError(f"{line_of(error, path)}: {type(error).__name__}: {error}") from error
    finally:
        _loading.reset(token)
        sys.path.remove(str(path.parent))


def checked(kind: type[Kernel[Any, Any]]) -> Kernel[Any, Any]:
    """Return a kernel of a class, with its tunables and workload checked. Raises KernelError in one line."""
    name = kind.__name__
    if missing := sorted(getattr(kind, "__abstractmethods__", ())):
        raise KernelError(f"{name}: expected the method{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    for part in ("Config", "Workload"):
        found = getattr(kind, part, None)
        if not isinstance(found, type) or not dataclasses.is_dataclass(found):
            raise KernelError(f"{name}.{part}: expected a frozen dataclass, got {found!r}.")
        if not found.__dataclass_params__.frozen or found.__hash__ is None:  # type: ignore[attr-defined]
            raise KernelError(f"{name}.{part}: not hashable; expected @dataclasses.dataclass(frozen=True).")
    try:
        kernel = kind()
    except TypeError as error:
        raise KernelError(f"{name}: cannot be made without arguments ({error}).") from error
    except OF_USERS_CODE as error:
        raise KernelError(f"{name}(): {type(error).__name__}: {error}") from error
    if not isinstance(kernel.requires, tuple | list):
        raise KernelError(f"{name}.requires={kernel.requires!r}: expected a tuple of names of packages.")
    if not isinstance(kernel.op_name, str):
        raise KernelError(f"{name}.op_name={kernel.op_name!r}: expected text.")
    for package in kernel.requires:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            raise KernelError(f"{name}: {package} is not installed.")
    for limit in ("tolerance", "row_tolerance"):
        value = getattr(kernel, limit)
        if not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise KernelError(f"{name}.{limit}={value!r}: expected a number above 0.")
    grows_with = kernel.vmem_grows_with
    if not isinstance(grows_with, tuple) or not set(grows_with) <= set(tunables(kernel)):
        there = ", ".join(tunables(kernel))
        raise KernelError(f"{name}.vmem_grows_with={grows_with!r}: expected a tuple of some of its tunables, {there}.")
    if not tunables(kernel):
        raise KernelError(f"{name}.Config: expected tunables, as in `block_m: int = one_of(128, 256)`.")
    for tunable, values in tunables(kernel).items():
        where = f"{name}.Config.{tunable}"
        if not values:
            raise KernelError(f"{where}: expected values, as in `{tunable}: int = one_of(128, 256)`.")
        check_values(where, values)
        default = next(f.default for f in dataclasses.fields(kernel.Config) if f.name == tunable)
        if default not in values:
            raise KernelError(f"{where}: its default {default!r} is not one of its values {list(values)}.")
    try:
        kernel.Config()
    except OF_USERS_CODE as error:
        raise KernelError(f"{name}.Config(), the default: {type(error).__name__}: {error}") from error
    return kernel


def sizes_of(kernel: Kernel[Any, Any], workload: Any) -> dict[str, Any]:
    """Return the fields of a workload. Raises KernelError for one that a record would not have so."""
    sizes = {field.name: getattr(workload, field.name) for field in dataclasses.fields(workload) if field.init}
    for name, value in sizes.items():
        if type(value) not in (bool, int, float, str, type(None)):
            raise KernelError(
                f"{kernel.name}.Workload.{name}={value!r}: a {type(value).__name__} is kept in no record; expected a "
                'number, text, or None: sizes one by one, a dtype as "bfloat16".'
            )
    return sizes


def check_values(where: str, values: tuple[Any, ...]) -> None:
    """Raise KernelError for values of a tunable that are not plain, or stand there twice."""
    for value in values:
        if not isinstance(value, int | float | str | None):
            kind = type(value).__name__
            raise KernelError(f"{where}={value!r}: a {kind} is kept in no record; expected a number, text, or None.")
    if len(set(values)) != len(values):
        raise KernelError(f"{where}={list(values)}: expected each value once.")


def of_own_types(where: str, values: Sequence[Any], own: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return values of a tunable as the types that its own values have: 128.0 as 128 where they are whole numbers.

    A winner of another type would be none of the kernel's when it is looked up. Raises KernelError for such a value.
    """
    kinds = list(dict.fromkeys(map(type, own)))

    def of_own_type(value: Any) -> Any:
        if type(value) in kinds or not isinstance(value, int | float | str | None):
            return value
        for kind in (int, float):
            if kind in kinds and isinstance(value, int | float) and not isinstance(value, bool):
                with contextlib.suppress(OverflowError, ValueError):  # of infinity, NaN and what is beyond them
                    if kind(value) == value:
                        return kind(value)
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise KernelError(f"{where}={value!r}: expected values of type {names}, as the kernel's own {list(own)}.")

    return tuple(map(of_own_type, values))
