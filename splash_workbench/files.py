"""Writes files that are either whole or not there; finds and runs those that a user names."""

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from splash_workbench.errors import UserError

#: Errors that room mends.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def user_path(text: str | Path) -> Path:
    """Return a path that a user gave, `~` being their home; of a user who is not known it stays as it is."""
    return Path(os.path.expanduser(text))  # Path.expanduser raises there


def run_file(path: Path, name: str) -> ModuleType:
    """Run a Python file and return it as the module `name`, which no other may have; the folder goes on no path."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Make a temporary path beside `path` to write to; rename it to `path` when the block ends well, else remove it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a folder is in the place of this file", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(*paths: Path) -> None:
    """Remove the temporary files that `atomic_path` of these paths has left where the process was killed."""
    for path in paths:
        for temporary in path.parent.glob(f".{path.stem}-????????{path.suffix}"):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, busy: str | None) -> Iterator[None]:
    """Hold a lock file in the block; remove it then, and its folder if empty. A process that dies holds it no longer.

    Raises UserError with the message `busy` where another process, or thread, holds it; waits for it with None.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            opened = path.open("w")
        except (FileNotFoundError, FileExistsError):
            if path.is_symlink() or path.parent.is_file():  # a link to nowhere, or no folder
                raise
            continue  # whoever held it removed the folder meanwhile
        with opened as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy is not None else 0))
            except BlockingIOError as error:
                assert busy is not None
                raise UserError(busy) from error
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # whoever held it removed it after it was opened here
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
            return


def ensure_folder(folder: Path, write: Callable[[Path], None]) -> Path:
    """Return a folder, written whole if it is not there: `write` fills another, which then gets its name."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as building:
        write(Path(building, "whole"))
        try:
            Path(building, "whole").rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with the same content
                raise
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def require_writable(
    option: str, folder: Path, byte_count: int = 1, or_else: str = "", known: set[Path] | None = None
) -> None:
    """See whether that many bytes can be written to a folder, or to where it would be made. Leaves nothing behind.

    Raises UserError where they cannot; its message begins with `option`. or_else: what needs fewer bytes. known:
    folders that were tried before, which are not tried again: trying one takes some milliseconds. It grows.
    """
    if folder.is_symlink() and not folder.exists():
        raise UserError(f"{option}: {folder} is a link to nothing; mend it, or name another folder.")
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if known is not None and there in known:
            return
        with tempfile.TemporaryFile(dir=there) as file:
            os.posix_fallocate(file.fileno(), 0, byte_count)
        if known is not None:
            known.add(there)
    except OSError as error:
        unit, name = (2**30, "GiB") if byte_count >= 2**30 else (2**20, "MiB")
        amount = f" {round(byte_count / unit, 1):,g} {name}" if byte_count >= unit else ""
        is_full = error.errno in NO_SPACE
        room, less = "make room there, or " if is_full else "", f", or {or_else}" if is_full and or_else else ""
        raise UserError(
            f"{option}: cannot write{amount} to {folder} ({error.strerror}); {room}name another folder{less}."
        ) from error


def require_writable_file(option: str, path: Path) -> None:
    """See whether a file can be written there, as `require_writable` sees it of a folder. Leaves nothing behind."""
    try:
        if path.is_dir():
            raise UserError(f"{option}: expected a file, got a folder.")
        if path.exists() and not path.is_file():  # which a rename would replace
            raise UserError(f"{option}: expected a file, got a device or a pipe.")
        if path.exists() and not os.access(path, os.W_OK):
            raise UserError(f"{option}: may not be written to; expected another file.")
    except OSError as error:  # e.g. of a name that is too long
        raise UserError(f"{option}: {error.strerror}; name another file.") from error
    require_writable(option, path.parent)
