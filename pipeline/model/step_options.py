"""Choose the compiler options of a denoising step: those of the tuned entry of exactly this step, or the default.

Plain Python over JSON files of the entries that `python -m pipeline.tune` keeps: `step_options.json` beside this file
has the shipped ones, the folder of `splash_attn.tuned.user_dir` the user's own, which come first.
"""

import dataclasses
import fcntl
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.requests.errors import RequestError
from splash_attn import tuned
from splash_workbench.files import atomic_path
from splash_workbench.provenance import package_versions, stable_hash

#: The shipped entries.
SHIPPED = Path(__file__).with_name("step_options.json")
_COMPILER = "libtpu"
#: Predicted for v6e at 720p: products read their operands less often with more than libtpu's default (0.35 ms a layer),
#: and the exchange of one of q, k, v runs beside the projection of another (0.75 ms a layer).
DEFAULT = {"xla_tpu_scoped_vmem_limit_kib": "65536", "xla_tpu_enable_async_all_to_all": "true"}
#: With the default's 64 MiB a product of the feed-forward takes 145 CPU s to compile, 22 with this (measured; v6e, 9984
#: rows), and the whole step is predicted to be no faster.
INT8_DEFAULT = DEFAULT | {"xla_tpu_scoped_vmem_limit_kib": "40960"}


@dataclasses.dataclass(frozen=True)
class StepCall:
    """What a denoising step must be for a tuned entry to be its own.

    device_kind: as jax.Device.device_kind. plan: a `ParallelPlan` in words. tokens: of a prompt, text and video.
    channels: of a token. dtype: of the latents. int8_linears, int8_attention: whether these are in int8. work: a
    `StepWork` in words.
    """

    device_kind: str
    num_devices: int
    plan: str
    tokens: int
    channels: int
    dtype: str
    int8_linears: bool
    int8_attention: bool
    work: str


@dataclasses.dataclass(frozen=True)
class Entry:
    """The fastest compiler options known of a step.

    label: how time_s was got, and default_time_s with `default`, None where that does not compile. versions: of
    compiler and libraries. source: a hash of the model's and the kernel's sources. created_at: UTC, ISO 8601.
    """

    call: StepCall
    options: dict[str, str]
    label: str
    time_s: float
    default_time_s: float | None
    versions: dict[str, str]
    source: str
    created_at: str


@dataclasses.dataclass(frozen=True)
class EntryFile:
    """The entries, as they are on disk."""

    schema_version: Literal[1]
    entries: tuple[Entry, ...]


def default(int8_linears: bool) -> dict[str, str]:
    """Return the options of a step that no entry is for."""
    return dict(INT8_DEFAULT if int8_linears else DEFAULT)


def user_path() -> Path:
    """Return where the user's own entries are kept."""
    return tuned.user_dir() / SHIPPED.name


def entry_hashes(step: bool = True) -> list[str]:
    """Return hashes of all tuned entries, of the attention's blocks and of a step's compiler options.

    They decide what a step is compiled to: hosts that share one must have the same. step: also those of a step.
    """
    folders = (tuned.TUNED_DIR, tuned.user_dir())
    files = [path for folder in folders for path in sorted(folder.glob("*.json")) if path.name != SHIPPED.name]
    files += [user_path(), SHIPPED] if step else []
    # What is no text is not taken, and is another's to say; it must not end a run that does without.
    return [stable_hash(path.read_text("utf-8", errors="backslashreplace")) for path in files if path.is_file()]


def read(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a file, none where there is none. Raises RequestError where it cannot be read."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except FileNotFoundError:
        return ()
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise RequestError(f"{path}: unreadable compiler options ({error}); put it right or remove it.") from error


@functools.lru_cache(maxsize=8)
def _read(path: Path, mtime_ns: int) -> tuple[Entry, ...]:
    del mtime_ns  # part of the cache's key only
    return msgspec.json.decode(path.read_bytes(), type=EntryFile).entries


def choose(call: StepCall) -> Mapping[str, str]:
    """Return the compiler options for a step. An entry of another libtpu, which may not know its flags, is left out.

    Raises RequestError where a file of entries cannot be read.
    """
    entry = find(call)
    return entry.options if entry is not None else default(call.int8_linears)


def find(call: StepCall) -> Entry | None:
    """Return the user's entry of a step, else the shipped one, else None. Raises RequestError as `choose` does."""
    libtpu = package_versions((_COMPILER,)).get(_COMPILER)
    for entry in (*read(user_path()), *read(SHIPPED)):
        if entry.call == call and entry.versions.get(_COMPILER) == libtpu:
            return entry
    return None


def keep(path: Path, entry: Entry) -> None:
    """Write an entry in place of the one of the same step. Raises OSError, RequestError for a file that is not ours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        others = [old for old in read(path) if old.call != entry.call]
        ordered = sorted([*others, entry], key=lambda one: str(one.call))
        with atomic_path(path) as temporary:
            content = dataclasses.asdict(EntryFile(1, tuple(ordered)))
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
