"""Choose block sizes and variant for a shape: the tuned entry nearest to it, or the stated default.

Plain Python over one JSON file per device kind, `tpu_v6_lite.json` for `TPU v6 lite`:

    {"schema_version": 1, "device_kind": "TPU v6 lite",
     "entries": [{"shape": {...}, "dtype": "bfloat16", "block_sizes": {...}, "variant": {...}, "provenance": {...}}]}

An entry is keyed by shape, dtype, softmax, qk_dtype and the label of its time (predicted and measured stand side by
side). The entries of `tuned/` are shipped; the user's own are in `user_dir()`.
"""

import dataclasses
import functools
import logging
import math
import os
import re
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from splash_attn.types import LANES, SEED_BLOCK_SIZES, AttentionShape, BlockSizes, QkDtype, Variant, clamp, round_up

logger = logging.getLogger(__name__)

#: The shipped entries.
TUNED_DIR = Path(__file__).parent / "tuned"
#: Names the folder of the user's entries.
USER_VARIABLE = "COGVIDEOX_SPLASH_TUNED"
#: An entry serves sequences up to so many times as long as its own.
_MAX_STRETCH = 8

#: How a time can have been got, the most trusted first.
LABELS = ("measured", "predicted", "reported")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where an entry comes from.

    label: how its time was got, one of LABELS. time_ms: one call of the whole op at the entry's shape. workload: the
    one that was swept, by name. record_id: the Trial in results/ that won. kernel_hash: of the kernel's source.
    git_commit: None outside a checkout. versions: of compiler and libraries. created_at: UTC, ISO 8601.
    """

    label: str
    time_ms: float
    workload: str
    record_id: str
    kernel_hash: str
    git_commit: str | None
    versions: dict[str, str]
    created_at: str

    def __post_init__(self) -> None:
        if self.label not in LABELS:
            raise ValueError(f"label={self.label!r}: expected one of {', '.join(LABELS)}.")
        if not 0 < self.time_ms < math.inf:
            raise ValueError(f"time_ms={self.time_ms}: expected a positive number.")


@dataclasses.dataclass(frozen=True)
class TunedEntry:
    """The best known way to run one shape in one dtype with one softmax and qk_dtype."""

    shape: AttentionShape
    dtype: str
    block_sizes: BlockSizes
    variant: Variant
    provenance: Provenance

    @property
    def source(self) -> tuple[str, dict[str, str]]:
        """Kernel source, compiler and cost model; only times of the same source can be compared."""
        return self.provenance.kernel_hash, self.provenance.versions

    def rivals(self, other: Self) -> bool:
        """Return whether the entries are for the same call, with times that cannot be compared."""
        calls = [(one.shape, one.dtype, one.variant.qk_dtype, one.provenance.label) for one in (self, other)]
        return calls[0] == calls[1] and self.source != other.source

    def to_dict(self) -> dict[str, Any]:
        """Return the entry as JSON has it."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class TunedFile:
    """The entries of one device kind, as they are on disk."""

    schema_version: Literal[1]
    device_kind: str
    entries: tuple[TunedEntry, ...]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Blocks and variant to run, the entry they are from (None: the default), and the reason in one sentence."""

    block_sizes: BlockSizes
    variant: Variant
    entry: TunedEntry | None
    reason: str


def user_dir() -> Path:
    """Return $COGVIDEOX_SPLASH_TUNED, or cogvideox-splash/tuned in the user's configuration folder."""
    if chosen := os.environ.get(USER_VARIABLE):
        return Path(os.path.expanduser(chosen))
    # Not Path.home(), which raises where there is none, as in some containers.
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "cogvideox-splash" / "tuned"


def path_for(device_kind: str, directory: Path = TUNED_DIR) -> Path:
    """Return e.g. `tuned/tpu_v6_lite.json` for "TPU v6 lite"."""
    return directory / (re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json")


def load(device_kind: str, directory: Path | None = None) -> tuple[TunedEntry, ...]:
    """Return the entries of a folder for a device kind, empty where there is no file. Cached until the file changes.

    Without a folder: the user's, then the shipped ones, each unless a later one is for the same call from another
    kernel source or compiler.

    Raises:
      ValueError: a file is not what this version reads, or is named for another device kind than it is of.
    """
    if directory is not None:
        return _entries(path_for(device_kind, directory))
    _tell_of_missing(os.environ.get(USER_VARIABLE))
    every = [entry for folder in (user_dir(), TUNED_DIR) for entry in _entries(path_for(device_kind, folder))]
    return tuple(
        entry
        for entry in every
        if not any(entry.rivals(other) and entry.provenance.created_at < other.provenance.created_at for other in every)
    )


def read_file(path: Path) -> TunedFile:
    """Return the content of one of the JSON files.

    Raises:
      ValueError: it is not what this version reads; the message gives the path of the field.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=TunedFile)
    except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path}: unreadable tuned entries ({error}); put them right, or remove the file.") from error


def _entries(path: Path) -> tuple[TunedEntry, ...]:
    try:
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # the home of another user
        return ()
    except OSError as error:  # a link to itself
        raise ValueError(f"{path}: unreadable tuned entries ({error}); put them right, or remove it.") from error
    return _read(path, stat.st_mtime_ns, stat.st_size).entries


@functools.lru_cache(maxsize=32)
def _read(path: Path, mtime_ns: int, size: int) -> TunedFile:
    """Read a file; the other arguments are part of the cache's key only."""
    file = read_file(path)
    if path_for(file.device_kind, path.parent) != path:
        raise ValueError(f"{path}: its device_kind is {file.device_kind!r}; expected that of its name; rename it.")
    return file


@functools.cache
def _tell_of_missing(folder: str | None) -> None:
    """Tell once of a folder that is not there: it is misspelt, or nothing was promoted to it yet."""
    if folder and not user_dir().is_dir():
        logger.warning("%s=%s: there is no such folder; only the shipped entries are read", USER_VARIABLE, folder)


def fit_block_q(block_q: int, q_seq_len: int) -> int:
    """Return the shortest block_q that needs no more blocks: rows past the sequence are computed for nothing."""
    return round_up(-(-q_seq_len // -(-q_seq_len // block_q)), LANES)


def fit(block_sizes: BlockSizes, shape: AttentionShape) -> BlockSizes:
    """Return the blocks clamped, with block_q from `fit_block_q`. The last block of keys costs only what it holds."""
    clamped = clamp(block_sizes, shape)
    return dataclasses.replace(clamped, block_q=fit_block_q(clamped.block_q, shape.q_seq_len))


def choose(
    device_kind: str,
    shape: AttentionShape,
    dtype: str,
    *,
    variant: Variant | None = None,
    qk_dtype: QkDtype = "bfloat16",
    directory: Path | None = None,
) -> Choice:
    """Return block sizes and variant for a shape on a device.

    Entries count with the same head_dim, dtype and qk_dtype (and softmax, where a variant is asked for), so that int8
    is never chosen unless asked for, whose own sequences are long enough to say anything about the shape's: an entry
    serves shorter sequences, and up to eight times longer ones if it had room for the default's blocks. Of them the
    least |log(q/q')| + |log(kv/kv')| wins; then the same batch * heads; then measured before predicted before reported;
    then the least time per head. For another shape than the entry's its blocks are fitted to it. Without one the choice
    is SEED_BLOCK_SIZES, fitted, with the asked or the default variant, and `entry` is None.

    device_kind: of `jax.Device`. dtype: of q, k and v, e.g. "bfloat16". variant: what to run, whatever qk_dtype says;
    only its block sizes are chosen. directory: of the JSON files; None: the user's and the shipped ones.

    Raises:
      ValueError: as `load`.
    """
    entries = load(device_kind, directory)
    qk_dtype = qk_dtype if variant is None else variant.qk_dtype
    matching = [
        entry
        for entry in entries
        if (entry.shape.head_dim, entry.dtype, entry.variant.qk_dtype) == (shape.head_dim, dtype, qk_dtype)
        and (variant is None or entry.variant.softmax == variant.softmax)
        and _serves(entry.shape, shape)
    ]
    if not matching:
        variant = variant or Variant(qk_dtype=qk_dtype)
        return Choice(
            block_sizes=fit(SEED_BLOCK_SIZES, shape),
            variant=variant,
            entry=None,
            reason=f"default {SEED_BLOCK_SIZES}, fitted to the sequences: "
            f"{len(entries)} tuned entries for {device_kind}, "
            f"none with head_dim {shape.head_dim}, {dtype} and {variant}, for such lengths.",
        )
    entry = min(matching, key=lambda entry: _rank(entry, shape))
    provenance = entry.provenance
    origin = f"{provenance.label} {provenance.time_ms:.3f} ms at {entry.shape} ({provenance.workload})"
    if variant not in (None, entry.variant):
        origin += f", there with {entry.variant}"
    blocks, reason = fit(entry.block_sizes, shape), f"nearest tuned shape by sequence lengths: {origin}."
    if entry.shape == shape:
        blocks, reason = entry.block_sizes, f"tuned for this shape: {origin}."
    return Choice(blocks, variant or entry.variant, entry, reason)


def _serves(tuned_shape: AttentionShape, shape: AttentionShape) -> bool:
    """Return whether blocks tuned for one shape can be good ones for the other: its lengths did not limit them."""
    lengths = (
        (tuned_shape.q_seq_len, shape.q_seq_len, SEED_BLOCK_SIZES.block_q),
        (tuned_shape.kv_seq_len, shape.kv_seq_len, SEED_BLOCK_SIZES.block_kv),
    )
    return all(
        length <= round_up(tuned_length, LANES) or (tuned_length >= block and length <= _MAX_STRETCH * tuned_length)
        for tuned_length, length, block in lengths
    )


def _rank(entry: TunedEntry, shape: AttentionShape) -> tuple[float, bool, int, float]:
    heads = entry.shape.batch_size * entry.shape.num_heads
    ratios = entry.shape.q_seq_len / shape.q_seq_len, entry.shape.kv_seq_len / shape.kv_seq_len
    return (
        sum(abs(math.log(ratio)) for ratio in ratios),
        heads != shape.batch_size * shape.num_heads,
        LABELS.index(entry.provenance.label),
        entry.provenance.time_ms / heads,
    )
