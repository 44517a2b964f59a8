"""Rows of times that others measured: a call of a named program on a chip, and how long it took."""

import collections
import difflib
import json
import logging
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from tuning.trials.microbenchmarks import Microbenchmark, MicrobenchmarkFile, Milliseconds, Positive
from tuning.trials.reported import DEFAULT_PATH, Reported, ReportedRow, Text

#: The public rows that come with the project.
SHIPPED_DIR = DEFAULT_PATH.parent / "measured"
#: The program of the rows that Reported.read reads.
SPLASH = "splash_attention"
#: Programs of which the collective alone was timed: the benchmarks that published them look for its own event.
COLLECTIVES = ("all_gather", "psum")

_TOKAMAX = "openxla/tokamax"
#: By chip and op, the libtpu nearest to what its rows were timed with, as the days on which they were published and the
#: memory that they report say; no time has a part in it (docs/predictions.md).
_TOKAMAX_LIBTPU = (
    ("TPU7x", re.compile(r"triangle_multiplication|normalization(_vjp)?"), "0.0.36"),
    ("TPU7x", re.compile(r"(?!.*(cross_entropy|ragged_dot)).*"), "0.0.45"),
    ("TPU v5", re.compile(r".*"), "0.0.45"),
    ("TPU v6 lite", re.compile(r".*"), "0.0.46"),
)

#: How like two names are, of 1, for one to be the other misspelt: a letter. Names that only end otherwise are less.
_ALIKE = 0.88

logger = logging.getLogger(__name__)

#: Arguments that change nothing that a table's reader looks for.
_UNSAID = ("precision", "logits_dtype", "logits_scale", "normalize_output", "epsilon", "zero_initialize")

Megabytes = Positive


class MeasuredRow(msgspec.Struct, frozen=True, kw_only=True):
    """One call and its times.

    Attributes:
      id: unique within a set, e.g. "tpu7x-ragged_dot-0034": the file and the row's number in it.
      source: who measured, where it is published, and how.
      device_kind: of the chip, as JAX says it.
      op: the program; one of tokamax's ops, or of `tuning.validate.plain`.
      arguments, config: of the op; arrays as "bf16[1024,64]".
      times_ms: each run; one where only a median is published.
      compiler_options: flags of libtpu that it was compiled with.
      p_state: the power state that the chip's clock was set to; None: the default.
      notes: what a reader of the time must know.
      peak_memory_mb: the most HBM that the program held, as reported, in 10^6 or 2^20 bytes; None: it is not told. It
        tells programs apart that different compilers made of the same op.
      libtpu: version of the compiler that it was timed with; None: it is not told.
    """

    id: str
    source: str
    device_kind: str
    op: str
    arguments: dict[str, Any]
    times_ms: tuple[Milliseconds, ...]
    config: dict[str, Any] = {}
    compiler_options: dict[str, str] = {}
    p_state: int | None = None
    notes: tuple[str, ...] = ()
    peak_memory_mb: Megabytes | None = None
    libtpu: str | None = None

    @property
    def timed_with(self) -> str | None:
        """Version of libtpu that it was timed with, told or inferred for its source; None: not known."""
        if self.libtpu or not self.source.startswith(_TOKAMAX):
            return self.libtpu
        known = (
            version for kind, ops, version in _TOKAMAX_LIBTPU if kind == self.device_kind and ops.fullmatch(self.op)
        )
        return next(known, None)

    @property
    def time_ms(self) -> float:
        """Median of the times."""
        return statistics.median(self.times_ms)

    @property
    def call(self) -> dict[str, Any]:
        """Return what the prediction depends on: neither the times nor where they are from."""
        names = ("device_kind", "op", "arguments", "config", "compiler_options", "p_state", "peak_memory_mb")
        return {name: getattr(self, name) for name in names}

    @property
    def shape(self) -> str:
        """Arrays and sizes in one string for tables; what is at its default says nothing."""
        if self.op == SPLASH:
            return self.splash.shape
        shown = {name: value for name, value in self.arguments.items() if name not in _UNSAID and value}
        return " ".join(_described(name, value) for name, value in shown.items())

    @property
    def settings(self) -> str:
        """Configuration and compiler options in one string for tables."""
        if self.op == SPLASH:
            return self.splash.config
        both = [f"{name}={value}" for name, value in (self.config | self.compiler_options).items()]
        return " ".join([*both, *([f"p_state={self.p_state}"] if self.p_state is not None else [])])

    @property
    def splash(self) -> ReportedRow:
        """Return the call of a row of SPLASH, without its time."""
        return ReportedRow(**self.arguments, median_time_ms=1.0)


def _described(name: str, value: Any) -> str:
    if name == "ragged_dot_dimension_numbers" and isinstance(value, Mapping):
        name, value = "contracted", value["dot_dimension_numbers"][0]
    if isinstance(value, Mapping):
        inside = [_described(key, item) for key, item in value.items() if item]
        return f"{name}({' '.join(inside)})"
    if isinstance(value, list) and len(value) > 4:
        return f"{name}=[{len(value)}]"
    return name if value is True else f"{name}={value}".replace(" ", "").replace("'", "")


class _OpRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row of a file of one op; what it says of itself goes before what the file says."""

    arguments: dict[str, Any]
    times_ms: Annotated[tuple[Milliseconds, ...], msgspec.Meta(min_length=1)]
    config: dict[str, Any] | None = None
    id: Text | None = None
    op: Text | None = None
    device_kind: Text | None = None
    source: Text | None = None
    compiler_options: dict[str, str] = {}
    p_state: int | None = None
    notes: tuple[str, ...] = ()
    peak_memory_mb: Megabytes | None = None
    libtpu: Text | None = None


class _OpFile(msgspec.Struct, frozen=True):
    """The form of tokamax's rows: source, device_kind, op, and rows of arguments, config and times_ms."""

    rows: Annotated[tuple[_OpRow, ...], msgspec.Meta(min_length=1)]
    source: Text | None = None
    device_kind: Text | None = None
    op: Text | None = None
    libtpu: Text | None = None

    def measured(self, stem: str) -> Iterator[MeasuredRow]:
        for number, row in enumerate(self.rows):
            fields = msgspec.structs.asdict(row)
            for name in ("op", "device_kind", "source"):
                if not (value := fields[name] or getattr(self, name)):
                    raise ValueError(f"expected `{name}`, of the file or of the row - at `$.rows[{number}]`")
                fields[name] = value
            fields["libtpu"] = row.libtpu or self.libtpu
            yield MeasuredRow(**fields | {"id": row.id or f"{stem}-{number:04d}", "config": row.config or {}})


def read(path: Path) -> list[MeasuredRow]:
    """Return the rows of a file, or of every JSON file of a folder, in the order of their names.

    A file has one of three forms: that of `SHIPPED_DIR`'s files of an op, that of its microbenchmarks.json, and that of
    `tuning.trials.reported.DEFAULT_PATH`. Of a folder, files without rows are left out, with a warning for each.

    Raises:
      ValueError: there is no such file, none in the folder, or one is of none of these forms; the message is one line
        that names the file and the field.
    """
    if not path.exists():
        raise ValueError(f"measured={path}: there is no such file or folder.")
    paths = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not paths:
        raise ValueError(f"measured={path}: expected files of rows, *.json, in the folder.")
    if path.is_dir():
        with_rows = [each for each in paths if not _has_no_rows(each)]
        for each in paths if with_rows else ():
            if each not in with_rows:
                logger.warning("measured=%s: left out, it has no rows", each)
        paths = with_rows or paths
    rows = [row for each in paths for row in _read_file(each)]
    counts = collections.Counter(row.id for row in rows)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"measured={path}: more than one row has the id {twice[0]!r}; expected one each.")
    return rows


def read_shipped() -> list[MeasuredRow]:
    """Return the public rows that come with the project."""
    return [*read(SHIPPED_DIR), *read(DEFAULT_PATH)]


def _read_file(path: Path) -> list[MeasuredRow]:
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or not isinstance(content.get("rows"), list):
            raise ValueError("expected an object with `rows`")
        keys = set().union(*(row for row in content["rows"] if isinstance(row, dict)))
        if "program" in keys:
            _look_at_names(path, keys, Microbenchmark.__struct_fields__)
            found = msgspec.convert(content, MicrobenchmarkFile).measured(path.stem)
            return [MeasuredRow(**fields) for fields in found]
        if "op" in content or keys & {"arguments", "times_ms", "op"}:
            _look_at_names(path, keys, _OpRow.__struct_fields__)
            return list(msgspec.convert(content, _OpFile).measured(path.stem))
    except OSError as error:
        raise ValueError(f"measured={path}: cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise ValueError(f"measured={path}: {error}; expected the form of the files in tuning/data.") from error
    return _splash_rows(path)


def _has_no_rows(path: Path) -> bool:
    """Return whether a file is JSON without rows: something else, or of an op of which none was timed."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # which `_read_file` says
        return False
    return not isinstance(content, dict) or not content.get("rows")


def _look_at_names(path: Path, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError for a field that is misspelt; tell of one that is not known, as more may be written down."""
    for name in sorted(set(names) - set(known)):
        if meant := difflib.get_close_matches(name, known, 1, _ALIKE):
            raise ValueError(f"a row has `{name}`: expected `{meant[0]}`, or another name for what is not used")
        logger.warning("measured=%s: `%s` of rows is not used", path, name)


def _splash_rows(path: Path) -> list[MeasuredRow]:
    reported = Reported.read(path)
    return [
        MeasuredRow(
            id=f"{path.stem}-{number:04d}",
            source=reported.source,
            device_kind=reported.device_kind,
            op=SPLASH,
            arguments={n: value for n, value in msgspec.structs.asdict(row).items() if n != "median_time_ms"},
            times_ms=(row.median_time_ms,),
        )
        for number, row in enumerate(reported.rows)
    ]
