import json
from pathlib import Path

import pytest

from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import Outcome

OUTCOME = Outcome(Status.OK, {"figure": 1.5}, None, "", 2.0)


def entry(**fields: object) -> bytes:
    return json.dumps({"status": "ok", "result": {}, "error": None} | fields).encode()


def test_an_outcome_is_made_once(tmp_path: Path) -> None:
    cache = JobCache(tmp_path)
    assert cache.outcome("key", lambda: OUTCOME) == (OUTCOME, False)
    outcome, was_there = cache.outcome("key", lambda: pytest.fail("made again"))
    assert was_there and (outcome.status, outcome.result, cache.trouble) == (Status.OK, {"figure": 1.5}, None)


@pytest.mark.parametrize("status", [Status.TIMEOUT, Status.CRASHED])
def test_what_may_be_the_fault_of_the_machine_is_not_kept(tmp_path: Path, status: Status) -> None:
    JobCache(tmp_path).outcome("key", lambda: Outcome(status, {}, "full", "", 0.0))
    assert JobCache(tmp_path).outcome("key", lambda: OUTCOME) == (OUTCOME, False)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"status": "ok", "resu',
        b"\xff\x00\x80",
        b"[" * 200_000,
        entry(status="fine"),
        entry(status="crashed"),
        entry(result=[1]),
        entry(result=None),
        entry(error=3),
    ],
)
def test_an_entry_that_cannot_be_read_is_made_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key.json").write_bytes(content)
    assert JobCache(tmp_path).outcome("key", lambda: OUTCOME) == (OUTCOME, False)
    assert JobCache(tmp_path).outcome("key", lambda: pytest.fail("made again"))[1]


def test_an_entry_that_the_caller_refuses_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_bytes(entry(result={"time_ms": -1}))

    def accept(outcome: Outcome) -> None:
        if outcome.result["time_ms"] < 0:
            raise ValueError("negative")

    assert JobCache(tmp_path).outcome("key", lambda: OUTCOME, accept) == (OUTCOME, False)


@pytest.mark.parametrize(
    ("in_the_way", "said"),
    [
        ("cache", "/cache (File exists): what is compiled is not kept; set $COGVIDEOX_SPLASH_CACHE to a folder"),
        ("cache/key.json", "/cache/key.json: a folder is in the place of this file; what was compiled is not kept"),
    ],
)
def test_a_cache_that_cannot_write_loses_no_outcome(tmp_path: Path, in_the_way: str, said: str) -> None:
    path = tmp_path / in_the_way
    if path.suffix:
        path.mkdir(parents=True)
    else:
        path.touch()
    cache = JobCache(tmp_path / "cache")
    assert cache.outcome("key", lambda: OUTCOME) == (OUTCOME, False)
    assert cache.trouble is not None and said in cache.trouble
