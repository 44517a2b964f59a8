import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import splash_attn
from splash_attn.types import BlockSizes
from tuning.backends import numerics
from tuning.backends.numerics import CheckKey, check_once

KEY = CheckKey("splash_attn", "h", 64, "bfloat16", BlockSizes(128, 128, 128), {}, "pallas_interpret")
#: In place of the kernel: what is checked is what becomes of the check.
ATTENTION = splash_attn.attention_reference


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "numerics" / f"{KEY.name}.json"


def test_a_check_is_made_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = check_once(KEY, ATTENTION, path.parent)
    assert made.passed
    monkeypatch.setattr(numerics, "check", lambda *arguments: pytest.fail("made again"))
    assert check_once(KEY, ATTENTION, path.parent) == made


def _changed(**fields: object) -> str:
    good = numerics.check(KEY, ATTENTION)
    return json.dumps(dataclasses.asdict(good) | fields)


@pytest.mark.parametrize(
    "fields", [{"rms_error": -1.0}, {"tolerance": 10.0}, {"block_sizes": "256/256/128"}, {"rms_error": "small"}]
)
def test_a_check_that_is_not_of_this_key_is_made_again(path: Path, fields: dict[str, object]) -> None:
    path.parent.mkdir()
    path.write_text(_changed(**fields))
    assert np.isclose(check_once(KEY, ATTENTION, path.parent).tolerance, 2**-6)
    assert json.loads(path.read_text())["rms_error"] >= 0


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff\xfe", b'{"implementation": "pal'])
def test_a_torn_check_is_made_again(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert check_once(KEY, ATTENTION, path.parent).passed
    assert json.loads(path.read_text())


def test_a_check_that_cannot_be_kept_is_not_lost(path: Path) -> None:
    path.parent.touch()  # a file where the folder should be
    assert check_once(KEY, ATTENTION, path.parent).passed
