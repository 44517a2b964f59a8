"""Files that are whole or not there."""

import os
import signal
import subprocess
import sys

import pytest

from splash_workbench.errors import UserError
from splash_workbench.files import atomic_path, locked


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
