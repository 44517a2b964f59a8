import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import splash_attn
from splash_attn.types import AttentionShape, BlockSizes
from tuning.backends import numerics
from tuning.backends.device_times import MeasureSettings
from tuning.backends.jobs import Request
from tuning.backends.numerics import check_path
from tuning.trials.records import Numerics

#: In place of the kernel: what is checked is what becomes of the check.
ATTENTION = splash_attn.attention_reference


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    shape, blocks, folder = AttentionShape(1, 2, 131, 137, 64), BlockSizes(128, 128, 128), str(tmp_path / "numerics")
    return Request("splash_attn", "h", shape, "bfloat16", blocks, {}, "v6e", folder, MeasureSettings())


@pytest.fixture
def path(request_: Request) -> Path:
    return check_path(request_, "pallas_interpret")


@pytest.fixture
def check_once(request_: Request) -> Callable[[], Numerics]:
    return lambda: numerics.check_once(request_, "pallas_interpret", ATTENTION)


def test_a_check_is_made_once(check_once: Callable[[], Numerics], monkeypatch: pytest.MonkeyPatch) -> None:
    made = check_once()
    assert made.passed
    monkeypatch.setattr(numerics, "check", lambda *arguments: pytest.fail("made again"))
    assert check_once() == made


@pytest.mark.parametrize(
    "fields", [{"rms_error": -1.0}, {"tolerance": 10.0}, {"block_sizes": "256/256/128"}, {"rms_error": "small"}]
)
def test_a_check_that_is_not_of_this_key_is_made_again(
    check_once: Callable[[], Numerics], path: Path, fields: dict[str, object]
) -> None:
    path.parent.mkdir()
    path.write_text(json.dumps(dataclasses.asdict(check_once()) | fields))
    assert np.isclose(check_once().tolerance, 2**-6)
    assert json.loads(path.read_text())["rms_error"] >= 0


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"\xff\xfe", b'{"implementation": "pal'])
def test_a_torn_check_is_made_again(check_once: Callable[[], Numerics], path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    assert check_once().passed
    assert json.loads(path.read_text())


def test_a_check_that_cannot_be_kept_is_not_lost(check_once: Callable[[], Numerics], path: Path) -> None:
    path.parent.touch()  # a file where the folder should be
    assert check_once().passed
