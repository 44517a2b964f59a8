"""Make the nodes of a cluster do what this machine would: the same sources and versions, and the user's kernel file."""

import dataclasses
import functools
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splash_workbench.engines.runner import scratch_dir
from splash_workbench.errors import UserError, from_config
from splash_workbench.files import ensure_folder
from splash_workbench.provenance import Environment, package_versions, user_cache_dir
from splash_workbench.records.base import new_id
from tuning.backends.base import Backend
from tuning.kernels import loading


@dataclasses.dataclass(frozen=True)
class OnNode:
    """Turns the payload of a candidate into one for the node on which it is called.

    Attributes:
      environment: of the driver, which its records will have.
      source, files: a user's kernel, see `loading.find`, and what it is made of: name in the folder -> content; None
        and nothing for one of `loading.KERNELS`.
      keep: whether checks of numerics are kept in the node's cache folder, maybe on storage that all nodes share;
        else they are shared by the candidates of this sweep alone.
    """

    backend: Backend
    environment: Environment
    source: str | None
    files: Mapping[str, bytes]
    keep: bool
    sweep_id: str = dataclasses.field(default_factory=new_id)

    def __call__(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Return the payload. Raises UserError where what is installed here is not what the driver has."""
        here, packages = _installed(self.backend, tuple(self.environment.versions))
        different = [(name, packages.get(name), version) for name, version in self.environment.versions.items()]
        different.append(("the sources of the backend", here.backend_hash, self.environment.backend_hash))
        if self.source is None:
            different.append(("the sources of splash_attn", here.kernel_hash, self.environment.kernel_hash))
        for what, found, expected in different:
            if found != expected:
                raise UserError(
                    f"engine=ray: node {socket.gethostname()} has {what} {found}, the driver {expected}; expected the "
                    "same installation on every node."
                )
        folder = user_cache_dir() / "tuning" if self.keep else scratch_dir() / self.sweep_id
        changes: dict[str, Any] = {"cache_dir": str(folder / "numerics")}
        if self.source is not None:
            changes["kernel"] = self._kernel_here(self.source)
        return payload | changes

    def _kernel_here(self, source: str) -> str:
        """Return where the kernel is on this node: the file itself where it is within reach, else a copy."""
        path, expected = loading.file_of(source), self.environment.kernel_hash
        assert path is not None
        if path.is_file() and from_config(lambda: loading.hash_of(source)) == expected:
            return source
        folder = scratch_dir() / "kernels" / expected
        ensure_folder(folder, lambda building: _write(building, self.files))
        return f"{folder / path.name}:{source.rpartition(':')[2]}"


def shipped_files(source: str | None) -> dict[str, bytes]:
    """Return a user's kernel file and the files beside it that it imports: name in the folder -> content."""
    path = loading.file_of(source) if source is not None else None
    if path is None:
        return {}
    return {other.relative_to(path.parent).as_posix(): other.read_bytes() for other in loading.files_of(path)}


@functools.cache
def _installed(backend: Backend, packages: tuple[str, ...]) -> tuple[Environment, dict[str, str]]:
    """Return what is installed on this node."""
    return backend.capture(backend.sources), package_versions(tuple(name for name in packages if name != "python"))


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    for relative, content in files.items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
