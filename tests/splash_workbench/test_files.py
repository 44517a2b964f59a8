"""Files that are whole or not there."""

import pytest

from splash_workbench.files import atomic_path


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
