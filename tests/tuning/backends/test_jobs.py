"""Real candidates: compiled for a TPU that is not here, and timed on what is."""

from collections.abc import Callable

import pytest

from offline_tpu.machine import devices
from splash_attn.types import AttentionShape, BlockSizes, Variant
from splash_workbench.trial_status import Status
from tuning.backends.base import Target
from tuning.backends.evaluate import Evaluator
from tuning.backends.registry import BACKENDS
from tuning.trials import workloads
from tuning.trials.records import Label, Trial

V6E = devices.by_name("v6e")
BLOCKS = BlockSizes(block_q=256, block_kv=512, block_kv_compute=128)

pytest.importorskip("libtpu")


@pytest.fixture
def trial_of(make_evaluator: Callable[..., Evaluator]) -> Callable[..., Trial]:
    """Predicts a candidate of the small shape for a v6e; keyword arguments are fields of its variant."""

    def trial_of(**variant: object) -> Trial:
        target = Target("v6e", V6E.device_kind, V6E)
        evaluator = make_evaluator(BACKENDS["offline"].job, backend=BACKENDS["offline"], target=target)
        return evaluator.evaluate(BLOCKS, Variant(**({"softmax": "online"} | variant)).to_dict())

    return trial_of


@pytest.mark.compile
def test_offline_predicts_and_checks(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of(softmax="fixed_bound")
    assert (trial.status, trial.error, trial.label) == (Status.OK, None, Label.PREDICTED)
    assert trial.time_ms is not None
    assert trial.slow_time_ms is not None
    assert trial.time_ms < trial.slow_time_ms < 2 * trial.time_ms  # all heads to the online softmax
    assert trial.kernel_time_ms is not None
    # 3 heads of 1021 x 1013 scores: some microseconds on a v6e, and the kernel is most but not all of it
    assert 1e-3 < trial.kernel_time_ms < trial.time_ms < 1
    assert trial.cycles
    assert trial.vmem_bytes
    assert trial.peak_hbm_bytes
    assert any("splash_attention" in op.name for op in trial.ops)
    assert trial.numerics is not None
    assert trial.numerics.passed


@pytest.mark.compile
def test_too_much_vmem_is_out_of_memory(trial_of: Callable[..., Trial]) -> None:
    trial = trial_of(vmem_limit_bytes=128 * 1024)
    assert trial.status is Status.OUT_OF_MEMORY
    assert trial.time_ms is None
    assert "vmem" in str(trial.error).lower()


@pytest.mark.compile
def test_measuring_on_a_cpu_says_what_it_is_worth(make_evaluator: Callable[..., Evaluator]) -> None:
    workload = workloads.Workload("small", AttentionShape(1, 1, 131, 137, 64), "bfloat16")
    changes = {"backend": BACKENDS["measure"], "target": Target("cpu", "cpu", None), "workload": workload}
    evaluator = make_evaluator(BACKENDS["measure"].job, **changes)
    trial = evaluator.evaluate(BlockSizes(128, 256, 128), Variant(softmax="online").to_dict())
    assert (trial.status, trial.error, trial.label) == (Status.OK, None, Label.MEASURED)
    assert len(trial.time_samples_ms) >= 6
    assert any("interpret mode on cpu: compares nothing" in note for note in trial.notes)


@pytest.mark.parametrize("name", workloads.names())
def test_named_workloads_load(name: str) -> None:
    assert workloads.load(name).name == name


def test_workloads_are_the_models_own() -> None:
    assert workloads.load("cogvideox_720p").shape == AttentionShape(1, 12, 39826, 39826, 64)
    assert workloads.load("wan_720p").shape == AttentionShape(1, 5, 75600, 75600, 128)
    with pytest.raises(ValueError, match="workload='nope': expected one of cogvideox_480p"):
        workloads.load("nope")
