"""Keep the winner of a user's kernel in a file of the user's, and look it up from a program."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import msgspec

from offline_tpu.machine import devices
from splash_workbench.files import atomic_path, locked, user_path
from splash_workbench.provenance import stable_hash
from tuning.kernels.loading import file_of, refuse_class, sizes_of, spec_of
from tuning.kernels.protocol import C, Kernel, KernelError, W, tunables


@dataclasses.dataclass(frozen=True)
class Entry:
    """The best configuration known of a kernel for a workload on a kind of device.

    label: how time_ms and default_ms (of the default configuration; None where it has no time) were got. record_id: the
    Trial that won. source: a hash of the kernel's source, versions and backend: only such times can be compared.
    """

    kernel: str
    device_kind: str
    sizes: dict[str, Any]
    config: dict[str, Any]
    label: str
    time_ms: float
    default_ms: float | None
    record_id: str
    source: str
    created_at: str

    @property
    def call(self) -> tuple[str, str, str, str]:
        """What the entry is for."""
        return self.kernel, self.device_kind, json.dumps(self.sizes, sort_keys=True), self.label


@dataclasses.dataclass(frozen=True)
class PromotedFile:
    """The file, as it is on disk."""

    schema_version: Literal[1]
    entries: tuple[Entry, ...]


def default_path(kernel: Kernel[Any, Any]) -> Path:
    """Return where a kernel's winners go unless told otherwise: matmul_tuned.json beside matmul.py."""
    path = file_of(spec_of(kernel))
    if path is None:
        raise KernelError(f"{kernel.name}: expected a kernel in a file of its own.")
    return path.with_name(f"{path.stem}_tuned.json")


def read(path: Path) -> tuple[Entry, ...]:
    """Return the entries of a file, none where there is none. Raises KernelError where it cannot be read."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=PromotedFile).entries
    except FileNotFoundError:
        return ()
    except (msgspec.DecodeError, OSError) as error:
        raise KernelError(f"{path}: unreadable tuned entries ({error}); put them right, or remove the file.") from error


def lookup(
    kernel: Kernel[C, W],
    workload: W,
    *,
    device_kind: str | None = None,
    path: Path | str | None = None,
    default: C | None = None,
) -> C:
    """Return the promoted configuration of a kernel for exactly this workload, a measured one before a predicted one.

    Args:
      device_kind: as jax.Device.device_kind, or a name as "v6e"; None: that of JAX's default device.
      path: of the file; None: `default_path`.
      default: what to return where there is no such entry, or it is no longer one that the kernel calls valid.

    Raises:
      KernelError: there is no such entry, or no longer, and no default; what is given is not of this kernel.
    """
    refuse_class(kernel)
    if not isinstance(workload, kernel.Workload):
        raise KernelError(f"{kernel.name}: expected a workload of {kernel.Workload.__name__}, got {workload!r}.")
    if default is not None and not isinstance(default, kernel.Config):
        raise KernelError(f"{kernel.name}: default={default!r}: expected a {kernel.Config.__name__}.")
    named = devices.DEVICES.get(device_kind or "")
    kind = named.device_kind if named else device_kind or jax.devices()[0].device_kind
    file = user_path(path) if path is not None else default_path(kernel)
    sizes = sizes_of(kernel, workload)
    entries = [e for e in read(file) if (e.kernel, e.device_kind, e.sizes) == (kernel.name, kind, sizes)]
    reason = f"no entry of {kernel.name} for {sizes} on {kind!r}; tune it"
    for entry in sorted(entries, key=lambda entry: entry.label != "measured"):
        config = _config_of(kernel, workload, entry)
        if not isinstance(config, str):
            return config
        reason = f"{entry.config} {config}; tune it again"
    if default is not None:
        return default
    raise KernelError(f"{file.name}: {reason}, or give a default.")


def _config_of(kernel: Kernel[C, W], workload: W, entry: Entry) -> C | str:
    """Return the configuration of an entry, or why it is none of the kernel as it is now."""
    values = tunables(kernel)
    kinds = {name: {type(value) for value in listed} for name, listed in values.items()}
    is_none = f"is no configuration of {kernel.name} as it is now"
    if entry.config.keys() != values.keys() or any(type(entry.config[name]) not in kinds[name] for name in values):
        return is_none
    try:
        config = kernel.config_of(None, entry.config)
    except (ValueError, NotImplementedError, AssertionError):
        return is_none
    verdict = kernel.is_valid(config, workload)
    if isinstance(verdict, str):
        return f"is not valid ({verdict})"
    return config if verdict else "is refused by is_valid"


def promote(path: Path, new: Entry) -> tuple[bool, str]:
    """Write an entry if it beats the one in its place. Return whether it was written, and why or why not."""
    try:
        with locked(path.with_name(f".{path.stem}.lock"), None):
            entries = read(path)
            old = next((entry for entry in entries if entry.call == new.call), None)
            if old is not None and (old.record_id, old.source) == (new.record_id, new.source):
                return False, "it is the entry there"
            if old is not None and old.source == new.source and old.time_ms <= new.time_ms:
                return False, f"not better than the {old.time_ms:.4g} ms of the entry there"
            kept = [entry for entry in entries if entry.call != new.call]
            ordered = sorted([*kept, new], key=lambda entry: entry.call)
            content = dataclasses.asdict(PromotedFile(1, tuple(ordered)))
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        return False, f"cannot be written ({error}); tuned=PATH names another file"
    except KernelError as error:
        return False, str(error)
    return True, "it beats the default configuration" if new.default_ms else "the default configuration has no time"


def source_of(kernel_hash: str, backend_hash: str, versions: dict[str, str]) -> str:
    """Return the hash of what makes times comparable."""
    return stable_hash(json.dumps([kernel_hash, backend_hash, versions], sort_keys=True))
