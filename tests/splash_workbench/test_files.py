"""Files that are whole or not there."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splash_workbench.errors import UserError
from splash_workbench.files import (
    atomic_path,
    locked,
    require_writable,
    require_writable_file,
    user_path,
    write_json,
)


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"^run_dir='x': .*link is a link to nothing; mend it"):
        require_writable("run_dir='x'", tmp_path / "link")


def test_the_home_of_a_user_who_is_not_known(monkeypatch):
    assert user_path("~no_such_user/a") == Path("~no_such_user/a")
    monkeypatch.setenv("HOME", "/home/of/me")
    assert user_path("~/a") == Path("/home/of/me/a")


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a" / "x.json"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert list(path.parent.iterdir()) == []
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]


def test_a_folder_in_a_files_place_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=re.escape(f"a folder is in the place of this file: '{tmp_path}'")):
        write_json(tmp_path, {})


def test_a_lock_has_one_holder_and_leaves_nothing(tmp_path):
    path = tmp_path / "run" / ".lock"
    with pytest.raises(FileNotFoundError), locked(path, "busy"):
        with pytest.raises(UserError, match=r"^busy$"), locked(path, "busy"):
            pytest.fail("two holders")
        raise FileNotFoundError  # of the block: not swallowed
    assert list(tmp_path.iterdir()) == []
    with locked(path, "busy"):
        (path.parent / "kept").write_text("")
    assert [entry.name for entry in path.parent.iterdir()] == ["kept"]


def test_the_lock_of_a_process_that_died_is_free(tmp_path):
    path = tmp_path / ".lock"
    code = f"from splash_workbench.files import *\nwith locked(Path({str(path)!r}), ''): print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(UserError, match="busy"), locked(path, "busy"):
        pytest.fail("two holders")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert path.exists()
    with locked(path, "busy"):
        pass


def test_those_who_wait_for_a_lock_have_it_in_turn(tmp_path):
    """Each removes the folder with the lock, in which the next ones wait."""
    order, path = [], tmp_path / "locks" / "x.lock"

    def hold(number):
        with locked(path, None):
            order.append(number)
            time.sleep(0.01)
            order.append(number)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(hold, range(24)))
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(24))


def test_a_lock_that_is_a_link_to_nowhere_is_an_error(tmp_path):
    (tmp_path / "x.lock").symlink_to(tmp_path / "nowhere" / "x.lock")
    with pytest.raises(FileNotFoundError), locked(tmp_path / "x.lock", "busy"):
        pytest.fail("held")


def test_what_cannot_be_written_is_said_without_a_word_too_many(tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"^x=1: cannot write to /dev/null/y \(Not a directory\); name another folder\.$"
    ):
        require_writable("x=1", Path("/dev/null/y"), or_else="which makes no difference")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        UserError, match=r"cannot write 2 MiB to .* device\); make room there, or name another folder\."
    ):
        require_writable("x=1", tmp_path, 2**21)
    for byte_count, amount in ((1023 * 2**20, "1,023 MiB"), (2**30, "1 GiB"), (1000 * 2**26, "62.5 GiB")):
        with pytest.raises(
            UserError, match=f"cannot write {amount} to .*; make room there, or name another folder, or x="
        ):
            require_writable("x=1", tmp_path, byte_count, or_else="x=")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "expected a file, got a folder."),
        ("/dev/null", "expected a file, got a device or a pipe."),
        ("/dev/null/x", "cannot write to /dev/null (Not a directory); name another folder."),
        ("/proc/x", "cannot write to /proc (No such file or directory); name another folder."),
        ("x" * 300, "File name too long; name another file."),
    ],
)
def test_a_file_that_cannot_be_written(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^x=1: {re.escape(message)}$"):
        require_writable_file("x=1", Path(path))
    require_writable_file("x=1", tmp_path / "new" / "file")
    assert list(tmp_path.iterdir()) == []
