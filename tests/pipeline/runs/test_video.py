"""Videos as files: their tags, and what ffmpeg refuses."""

import numpy as np
import pytest

from pipeline.requests.errors import PipelineError
from pipeline.runs.video import MAX_TAG_LENGTH, write_mp4
from videos import probe, tags


def test_tags_hold_any_text(tmp_path):
    title = 'it\'s "red"; 50% = #1 \\ 日本\nsecond line'
    write_mp4(tmp_path / "video.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8, {"title": title, "comment": "x" * 200_000})
    found = tags(tmp_path / "video.mp4")
    assert found["title"] == title
    assert found["comment"] == "x" * MAX_TAG_LENGTH


def test_ffmpegs_refusal_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(PipelineError, match="ffmpeg could not encode 15x16 at 8 fps"):
        write_mp4(tmp_path / "video.mp4", np.zeros((2, 16, 15, 3), np.uint8), 8)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_as_such(tmp_path, monkeypatch):
    fake = tmp_path / "ffmpeg"
    fake.write_text("#!/bin/sh\ncat >/dev/null\necho 'av_write: No space left on device' >&2\necho last >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(fake))
    with pytest.raises(OSError, match=r"No space left on device: '.*video.mp4'"):
        write_mp4(tmp_path / "out" / "video.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(("fps", "expected"), [(23.976, 23.98), (29.97, 29.97), (12.5, 12.5), (1, 1)])
def test_a_fractional_rate(tmp_path, fps, expected):
    write_mp4(tmp_path / "video.mp4", np.zeros((3, 16, 16, 3), np.uint8), fps)
    assert probe(tmp_path / "video.mp4")[0]["fps"] == expected
