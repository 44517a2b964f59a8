"""Files that are whole or not there."""

import json

import pytest

from splash_workbench.files import append_json_line, atomic_path


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


def test_a_torn_line_stays_apart(tmp_path):
    path = tmp_path / "results" / "lines.jsonl"
    append_json_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": 2, "tor')
    append_json_line(path, {"a": 3})
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"a": 1}
    assert json.loads(lines[2]) == {"a": 3}
