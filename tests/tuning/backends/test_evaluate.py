from collections.abc import Callable

import pytest

from splash_attn.types import BlockSizes, Variant
from splash_workbench.status import Status
from tuning.backends.evaluate import Evaluator

BLOCKS = BlockSizes(block_q=256, block_kv=512, block_kv_compute=128)
MakeEvaluator = Callable[[str], Evaluator]


def test_a_wrong_kernel_cannot_pass_for_ok(make_evaluator: MakeEvaluator) -> None:
    with pytest.raises(ValueError, match="expected 'wrong'"):
        make_evaluator("fake_jobs:wrong_that_claims_to_be_ok").evaluate(BLOCKS, {})


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
