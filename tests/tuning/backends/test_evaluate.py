import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splash_attn.types import BlockSizes, Variant
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from tuning.backends.evaluate import Evaluator

BLOCKS = BlockSizes(block_q=256, block_kv=512, block_kv_compute=128)
MakeEvaluator = Callable[..., Evaluator]


def test_a_wrong_kernel_cannot_pass_for_ok(make_evaluator: MakeEvaluator) -> None:
    trial = make_evaluator("fake_jobs:wrong_that_claims_to_be_ok").evaluate(BLOCKS, {})
    assert (trial.status, trial.conclusive, trial.time_ms) == (Status.CRASHED, False, None)
    assert "expected 'wrong'" in str(trial.error)


@pytest.mark.parametrize("job", ["impossible", "pid"])
def test_a_result_that_contradicts_itself_is_no_fact(make_evaluator: MakeEvaluator, job: str) -> None:
    trial = make_evaluator(f"fake_jobs:{job}").evaluate(BLOCKS, {})
    assert (trial.status, trial.conclusive, trial.time_ms) == (Status.CRASHED, False, None)
    assert "expected" in str(trial.error) or "contradicts" in str(trial.error)


FORGED: tuple[dict[str, Any], ...] = (
    {},
    {"result": {}},
    {"status": "crashed"},
    {"result": {"label": "predicted", "time_samples_ms": [-1.0]}},
    {"time_samples_ms": [1e-9]},
    {"time_samples_ms": [float("nan")]},
    {"time_samples_ms": "fast"},
    {"kernel_time_ms": 1e6},
    {"numerics": None},
    {"notes": 5},
)


@pytest.mark.parametrize("forged", FORGED, ids=str)
def test_a_forged_cache_entry_is_made_again(
    make_evaluator: MakeEvaluator, tmp_path: Path, forged: dict[str, Any]
) -> None:
    evaluator = make_evaluator("fake_jobs:bowl", cache=JobCache(tmp_path / "cache"))
    first = evaluator.evaluate(BLOCKS, {})
    (path,) = (tmp_path / "cache").glob("*.json")
    entry = json.loads(path.read_text())
    top = {name: forged[name] for name in forged if name in entry}
    path.write_text(json.dumps(entry | {"result": entry["result"] | forged} | top if forged else {}))
    again = evaluator.evaluate(BLOCKS, {})
    assert (again.status, again.time_samples_ms, again.notes) == (Status.OK, first.time_samples_ms, first.notes)
    assert any("from the cache" in note for note in evaluator.evaluate(BLOCKS, {}).notes)


@pytest.mark.compile
def test_the_real_check_finds_one_wrong_row(make_evaluator: MakeEvaluator) -> None:
    options = Variant(softmax="online").to_dict()
    right = make_evaluator("tuning.backends.interpret:check_candidate").evaluate(BLOCKS, options)
    assert (right.status, right.error) == (Status.OK, None)
    assert right.numerics is not None and right.numerics.q_seq_len > BLOCKS.block_q
    wrong = make_evaluator("fake_jobs:wrong_kernel").evaluate(BLOCKS, options)
    assert wrong.status is Status.WRONG
    assert wrong.numerics is not None and wrong.numerics.max_row_error > 0.4
    assert wrong.time_ms is None
