"""A first pass beside whole compiles: predicted for a v6e, on a call that compiles in seconds."""

from collections.abc import Callable

import pytest

from offline_tpu.machine import devices
from splash_attn.types import BlockSizes, Variant
from splash_workbench.trial_status import Status
from tuning.backends.base import Target
from tuning.backends.evaluate import Evaluator
from tuning.backends.registry import BACKENDS
from tuning.trials import workloads
from tuning.trials.records import Trial

pytest.importorskip("libtpu")

V6E = devices.by_name("v6e")


@pytest.mark.slow("1 min")
@pytest.mark.compile
def test_a_first_pass_comes_near(make_evaluator: Callable[..., Evaluator]) -> None:
    workload = workloads.load("cogvideox_720p")  # operands that VMEM does not hold
    target = Target("v6e", V6E.device_kind, V6E)
    evaluator = make_evaluator(BACKENDS["offline"].job, backend=BACKENDS["offline"], target=target, workload=workload)

    def trial(compiled: str) -> Trial:
        blocks, options = BlockSizes(4096, 512, 256), Variant().to_dict()
        found = evaluator.evaluate(blocks, options, compiled=compiled)  # type: ignore[arg-type]
        assert (found.status, found.error, found.compiled) == (Status.OK, None, compiled)
        return found

    whole, shorter = map(trial, ("whole", "shorter"))
    assert shorter.time_ms == pytest.approx(whole.time_ms, rel=0.05)
    assert shorter.numerics is not None and whole.numerics is not None
    assert (shorter.numerics.block_sizes, whole.numerics.block_sizes) == ("768/512/256", "4096/512/256")
