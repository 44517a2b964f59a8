"""A record's commit is that of this repository, or none."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from splash_workbench import provenance
from splash_workbench.provenance import REPO_ROOT


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def copy_package(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(REPO_ROOT / "splash_workbench", folder / "splash_workbench", symlinks=True)
    return folder


def git_state_in(root: Path, **variables: str) -> str:
    code = "from splash_workbench.provenance import git_state; print(git_state())"
    environment = os.environ | {"PYTHONPATH": str(root)} | variables
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize("place", ["venv/lib/site-packages", "."], ids=["below", "untracked at its root"])
def test_another_repository_is_not_ours(tmp_path: Path, place: str) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "theirs")
    assert git_state_in(copy_package(tmp_path / place)) == "(None, False)"


def test_tracked_in_a_folder_of_another_repository(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    root = copy_package(tmp_path / "vendored")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "theirs")
    assert git_state_in(root) == "(None, False)"


def test_a_checkout_in_the_hook_of_another_repository(tmp_path: Path) -> None:
    """Git sets GIT_DIR for hooks, and would believe it rather than the folder."""
    for name in ("ours", "theirs"):
        copy_package(tmp_path / name)
        git(tmp_path / name, "init", "-q")
        git(tmp_path / name, "add", ".")
        git(tmp_path / name, "commit", "-q", "-m", name)
    commit = git(tmp_path / "ours", "rev-parse", "HEAD")
    state = git_state_in(tmp_path / "ours", GIT_DIR=str(tmp_path / "theirs" / ".git"))
    assert state == f"({commit!r}, False)"


def test_a_user_without_a_home_has_a_temporary_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COGVIDEOX_SPLASH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user has no entry
    assert provenance.user_cache_dir() == Path(tempfile.gettempdir()) / f"cogvideox-splash-{os.getuid()}"
