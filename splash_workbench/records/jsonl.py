"""Records as JSON lines: append one, read all, and decode JSON onto typed records."""

import fcntl
import json
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from splash_workbench.errors import TornLineWarning, UserError
from splash_workbench.files import NO_SPACE

T = TypeVar("T")
#: Torn lines of a file that are said one by one: a file of something else has nothing but such.
_SAID = 3
#: Fields that are new in each record.
_AS_MADE = ("record_id", "created_at")


class RecordError(UserError, ValueError):
    """A whole line of a file of records is none that this version reads."""


def decode(fields: Any, kind: type[T]) -> T:
    """Return `fields`, as JSON gives them, as a `kind`; keys that it does not know are ignored.

    Raises ValueError where they do not fit, with the path of the field, as in "$.environment.versions".
    """
    upgrade = getattr(kind, "upgrade", None)  # of records whose earlier schemas had other keys
    try:
        return msgspec.convert(upgrade(fields) if upgrade and isinstance(fields, Mapping) else fields, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def encode(record: Any) -> Any:
    """Return a record as dicts and lists for JSON."""
    return msgspec.to_builtins(record)


def append(path: Path, record: Any) -> None:
    """Append one record as a whole line, and wait for the disk.

    A line that a crash tore stays apart from it, and so does the line of another process that appends meanwhile. Raises
    OSError, and leaves the file as it was, where the line could not be written whole, as on a full disk.
    """
    _append(path, record, None)


def append_once(path: Path, record: Any, apart_from: Collection[str] = ()) -> bool:
    """Append a record unless the same stands there, as where a command is given again; return whether it was appended.

    apart_from: fields at any depth that do not tell records apart, beside those of when and under which id they were
    made. Raises as `append`.
    """
    return _append(path, record, {*_AS_MADE, *apart_from})


def _append(path: Path, record: Any, once_apart_from: Collection[str] | None) -> bool:
    line = json.dumps(encode(record), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if once_apart_from is not None:
            wanted = _compared(line, once_apart_from)
            if any(_compared(other, once_apart_from) == wanted for other in path.read_bytes().split(b"\n")):
                return False
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, size)  # the lock is held: nobody has written behind it
            remedy = ": make room, then run the same command again" if error.errno in NO_SPACE else ""
            raise OSError(error.errno, f"{error.strerror}; the record was not written{remedy}", str(path)) from error
    finally:
        os.close(descriptor)
    return True


def _compared(line: bytes, apart_from: Collection[str]) -> str | None:
    """Return the text by which a record is compared, where NaN is NaN; None of a torn line, which `read` tells of."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return json.dumps(_without(fields, apart_from), sort_keys=True)


def _without(fields: Any, names: Collection[str]) -> Any:
    if isinstance(fields, dict):
        return {name: _without(value, names) for name, value in fields.items() if name not in names}
    return [_without(value, names) for value in fields] if isinstance(fields, list) else fields


def read(path: Path, kind: type[T]) -> list[T]:
    """Return every record of a file, none where there is no file. A line that a crash tore is skipped with a warning.

    Raises RecordError for a whole line that is not a `kind`, with the file, the line, the field and what to do.
    """
    if not path.exists():
        return []
    if path.is_dir():
        raise RecordError(f"{path}: expected a file of records, got a folder; move it away.")
    records: list[T] = []
    torn: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):  # not JSON, or not UTF-8
            torn.append(f"{path}:{number}: skipped a torn line of {len(line)} bytes.")
            continue
        try:
            records.append(decode(fields, kind))
        except ValueError as error:
            remedy = "delete this line, or move the file away"
            line_is = f"{path}:{number}: not a {kind.__name__} that this version reads"
            raise RecordError(f"{line_is} ({error}); {remedy}.") from error
    more = [f"{path}: skipped {len(torn) - _SAID} more torn lines."] if len(torn) > _SAID else []
    for message in torn[:_SAID] + more:
        warnings.warn(message, TornLineWarning, stacklevel=1)  # from here: once, however many read it
    return records
