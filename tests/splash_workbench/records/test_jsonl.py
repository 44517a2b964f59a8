"""JSON lines on disk: whole, or an error; and decoding that names the field."""

import os
from pathlib import Path

import msgspec
import pytest

from splash_workbench.records import jsonl


class Line(msgspec.Struct, frozen=True):
    text: str
    number: int = 0


def test_records_survive_the_disk_whatever_their_text_holds(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lines.jsonl"
    lines = [Line("a\u2028b\n"), Line("\udcff"), Line("é", 2)]  # a line separator, half a surrogate pair
    for line in lines:
        jsonl.append(path, line)
    assert jsonl.read(path, Line) == lines
    assert jsonl.read(tmp_path / "absent.jsonl", Line) == []


def test_a_short_write_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:3]))
    jsonl.append(tmp_path / "lines.jsonl", Line("a long text"))
    assert jsonl.read(tmp_path / "lines.jsonl", Line) == [Line("a long text")]


@pytest.mark.parametrize("torn", [b'{"text": "a', '{"text": "é'.encode()[:-1]])
def test_a_torn_line_is_kept_apart_and_skipped_with_a_warning(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "lines.jsonl"
    jsonl.append(path, Line("first"))
    with path.open("ab") as file:
        file.write(torn)
    jsonl.append(path, Line("last"))
    with pytest.warns(UserWarning, match=rf"lines.jsonl:2: skipped a torn line of {len(torn)} bytes"):
        assert jsonl.read(path, Line) == [Line("first"), Line("last")]


def test_a_whole_line_of_another_form_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a", "later": 1}\n\n{"text": "a", "number": "b"}\n')
    with pytest.raises(ValueError, match=r"lines.jsonl:3: not a Line .*got `str` - at `\$\.number`"):
        jsonl.read(path, Line)
