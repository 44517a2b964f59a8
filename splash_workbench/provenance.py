"""Records what a figure depends on besides the candidate: versions, flags, commit, and hashes of the sources."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from splash_workbench.files import user_path

REPO_ROOT = Path(__file__).resolve().parents[1]
#: In a checkout a link to configs/; an installed package holds the files.
CONFIG_DIR = Path(__file__).resolve().parent / "configs"

#: A change in one of these can change what a candidate computes or how long it takes.
KERNEL_SOURCES = tuple(
    f"splash_attn/{name}.py" for name in ("kernel", "gates", "tiles", "quantize", "pallas", "api", "types")
)
#: Packages whose version can change a time, or whether a kernel compiles.
COMPILER_PACKAGES = ("jax", "jaxlib", "libtpu")
_PACKAGES = (*COMPILER_PACKAGES, "numpy", "tokamax")
#: "0" leaves the VAE's decoder to XLA's convolutions.
VAE_KERNEL_VARIABLE = "COGVIDEOX_VAE_KERNEL"
_JAX_VARIABLES = ("JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")
#: Environment variables that change a program: those that JAX, XLA and libtpu read, and one of ours.
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", *_JAX_VARIABLES, VAE_KERNEL_VARIABLE)

#: Names the folder of all caches; what is in it can be made again.
CACHE_VARIABLE = "COGVIDEOX_SPLASH_CACHE"

#: CPython 3.11's ast.parse is not safe in threads: "AST constructor recursion depth mismatch" (python/cpython#106905).
_PARSER_LOCK = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where a figure was made. Holds no host name and no path.

    Attributes:
      versions: of Python and of the packages that decide the figure; a package that is absent is left out.
      flags: environment variables that JAX, XLA and libtpu read, where set.
      git_commit, git_dirty: see `git_state`.
      kernel_hash, backend_hash: see `source_hash`; of KERNEL_SOURCES, and of the sources that make the figure.
      host: processor architecture and system, e.g. "x86_64-linux".
    """

    versions: dict[str, str]
    flags: dict[str, str]
    git_commit: str | None
    git_dirty: bool
    kernel_hash: str
    backend_hash: str
    host: str
    cpu_count: int

    @property
    def compiler_versions(self) -> dict[str, str]:
        """Return the versions of COMPILER_PACKAGES."""
        return {name: self.versions[name] for name in COMPILER_PACKAGES if name in self.versions}


def capture(sources: Iterable[str], packages: tuple[str, ...] = _PACKAGES) -> Environment:
    """Describe this process, for figures that the files matching `sources` make (patterns from the root)."""
    commit, dirty = git_state()
    return Environment(
        versions=package_versions(packages),
        flags=flags(),
        git_commit=commit,
        git_dirty=dirty,
        kernel_hash=source_hash(KERNEL_SOURCES),
        backend_hash=source_hash(sources),
        host=f"{platform.machine()}-{platform.system().lower()}",
        cpu_count=os.cpu_count() or 1,
    )


def flags() -> dict[str, str]:
    """Return FLAG_VARIABLES that are set; where a dump goes changes nothing, and the path is nobody's business."""
    found = {name: os.environ[name] for name in FLAG_VARIABLES if os.environ.get(name)}
    return {name: re.sub(r"--xla_jf_dump_to=\S+\s*", "", value).strip() for name, value in found.items()}


def user_cache_dir() -> Path:
    """Return $COGVIDEOX_SPLASH_CACHE, or cogvideox-splash in the user's cache folder, or a temporary one."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return user_path(chosen)
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "cogvideox-splash"
    home = user_path("~")
    if not home.is_absolute():  # as in containers, for a user without an entry
        return Path(tempfile.gettempdir()) / f"cogvideox-splash-{os.getuid()}"
    return home / ".cache" / "cogvideox-splash"


def source_hash(patterns: Iterable[str], root: Path = REPO_ROOT) -> str:
    """Hash Python sources as the interpreter sees them: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    with _PARSER_LOCK:
        for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(_code_of(path.read_text()))
    return digest.hexdigest()[:16]


def parse_source(text: str) -> ast.Module:
    """Return `ast.parse`, in any thread."""
    with _PARSER_LOCK:
        return ast.parse(text)


def stable_hash(text: str) -> str:
    """Return a short hash for names of studies and candidates."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.lru_cache(maxsize=256)  # of texts, not of paths: a file that changes meanwhile is read anew
def _code_of(source: str) -> bytes:
    """Return what the interpreter sees of a source."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]  # type: ignore[attr-defined]
    return ast.dump(tree).encode()


@functools.cache
def package_versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of Python and of packages, without importing them; leave out those that are absent."""
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def git_state() -> tuple[str | None, bool]:
    """Return the commit of this source tree, and whether tracked files differ from it.

    None where the tree is no checkout of its own: installed, it may lie within another repository.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as hooks set it

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(REPO_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)
        if Path(git("rev-parse", "--show-toplevel")).resolve() != REPO_ROOT:
            return None, False
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None, False
