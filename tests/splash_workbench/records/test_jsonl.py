"""JSON lines on disk: whole, or an error; and decoding that names the field."""

import math
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from helpers import PLENTY_S
from splash_workbench.errors import UserError
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


class Made(msgspec.Struct, frozen=True):
    created_at: str
    time_s: float
    found: tuple[float | None, ...] = (1.5, None)


def test_a_record_that_stands_there_is_not_appended_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"torn\n[]\n')
    assert jsonl.append_once(path, Made("today", 1.0), ("time_s",))
    assert not jsonl.append_once(path, Made("tomorrow", 2.0), ("time_s",))
    assert jsonl.append_once(path, Made("tomorrow", 2.0))
    assert jsonl.append_once(path, Made("today", 1.0, (1.5, 2.0)), ("time_s",))
    assert len(path.read_text().splitlines()) == 5
    for seconds in (1.0, 2.0):  # what it took, within; and a figure that is none
        jsonl.append_once(path, {"stages": [{"wall_time_s": seconds, "loss": math.nan}]}, ("wall_time_s",))
    assert len(path.read_text().splitlines()) == 6


_APPEND_UNTIL_FULL = """
import resource, signal, sys
from pathlib import Path
from splash_workbench.records import jsonl
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
count = 0
try:
    while True:
        jsonl.append(Path(sys.argv[1]), {"text": "x" * 20, "number": count})
        count += 1
except OSError as error:
    print(f"{count}|{error}")
"""


def test_a_full_disk_loses_nothing_that_was_appended_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    command = [sys.executable, "-c", _APPEND_UNTIL_FULL, str(path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=PLENTY_S).stdout
    count, message = found.split("|")
    assert count == "2"
    assert "the record was not written" in message and str(path) in message and message.count("\n") == 1
    jsonl.append(path, Line("after", 2))  # there is room again
    assert [line.number for line in jsonl.read(path, Line)] == [0, 1, 2]


@pytest.mark.parametrize("failing", ["write", "fsync"])
def test_what_was_half_written_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "lines.jsonl"
    jsonl.append(path, Line("first"))
    before = path.read_bytes()
    write = os.write

    def half(descriptor: int, content: bytes) -> int:
        if len(content) < 15:
            raise OSError(28, "No space left on device")
        return write(descriptor, content[:10])

    def refuse(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, failing, half if failing == "write" else refuse)
    remedy = ": make room, then run the same command again" if failing == "write" else "'?: "
    with pytest.raises(OSError, match=f"the record was not written{remedy}"):
        jsonl.append(path, Line("last"))
    assert path.read_bytes() == before


def test_a_file_of_something_else_is_not_told_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a record\n" * 40)
    with pytest.warns(UserWarning) as said:
        assert jsonl.read(path, Line) == []
    assert [str(w.message).partition("notes.txt")[2] for w in said] == [
        *(f":{number}: skipped a torn line of 12 bytes." for number in (1, 2, 3)),
        ": skipped 37 more torn lines.",
    ]


@pytest.mark.parametrize("torn", [b'{"text": "a', '{"text": "é'.encode()[:-1], b"[" * 200_000])
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


def test_a_line_of_another_kind_is_for_the_user_to_put_right(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": 1}\n')
    with pytest.raises(UserError, match=r"lines.jsonl:1: not a Line that this version reads \(.*; delete this line"):
        jsonl.read(path, Line)


def test_a_folder_is_no_file_of_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a file of records, got a folder; move it away"):
        jsonl.read(tmp_path, Line)
