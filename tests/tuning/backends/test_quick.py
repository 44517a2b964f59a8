"""A first pass beside whole compiles: predicted for a v6e, on a call that compiles in seconds."""

import concurrent.futures
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offline_tpu.machine import devices
from offline_tpu.machine.constants import FittedConstants
from splash_attn.types import AttentionShape, BlockSizes, Variant
from splash_workbench.trial_status import Status
from tuning.backends import quick
from tuning.backends.base import Target
from tuning.backends.device_times import MeasureSettings
from tuning.backends.evaluate import Evaluator
from tuning.backends.jobs import Request
from tuning.backends.registry import BACKENDS
from tuning.trials import workloads
from tuning.trials.records import Compiled, Trial

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


@pytest.fixture
def estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Returns a first pass of block=64 in 2,048 steps, of which 1 ms is around the kernel."""

    def call(compiled: Compiled, cost: quick.Cost, apart_ms: float = 0.0) -> Any:
        request = Request(
            kernel=f"{Path(__file__).parents[1] / 'kernels' / 'scaled.py'}:Scaled",
            kernel_hash="",
            shape=None,
            dtype="",
            block_sizes=None,
            options={"block": 64, "add_first": False},
            sizes={"rows": 2**17},
            device="v6e",
            cache_dir=str(tmp_path),
            measure=MeasureSettings(),
            compiled=compiled,
        )
        monkeypatch.setattr(quick._Op, "around", "the same")
        monkeypatch.setattr(quick._Op, "kernel_cost", lambda op: cost)
        quick._keep(quick._Op(request, request.config, V6E).rest_path, quick.Cost(time_ms=1.0, apart_ms=apart_ms))
        return quick.predict(request, V6E)

    return call


@pytest.mark.parametrize(("apart_ms", "trusted"), [(0.00009, True), (0.00011, False)])
def test_a_kernel_that_alone_takes_another_time_is_compiled_whole(
    apart_ms: float, trusted: bool, estimate: Callable[..., Any]
) -> None:
    """Of 2,048 steps the first 0.00009 ms each are 1.8 % of the kernel's 10 ms."""
    fields = estimate("kernel", quick.Cost(time_ms=10.0, cycles=1000), apart_ms)
    assert (fields is not None) == trusted
    if fields is not None:
        assert (fields["kernel_time_ms"], fields["time_samples_ms"], fields["compiled"]) == (10.0, [11.0], "kernel")


def test_what_a_candidate_has_more_goes_at_the_steady_pace(estimate: Callable[..., Any]) -> None:
    """The shorter one, block=32, runs 4,096 steps of 100 cycles, 60 at the steady pace, each of which waits 20 ns."""
    issue_hz = FittedConstants.of(V6E).issue_hz(V6E)
    time_ms = 4096 * (100 / issue_hz + 20e-9) * 1e3
    fields = estimate("shorter", quick.Cost(time_ms=time_ms, cycles=409_600, steady_cycles=245_760))
    assert (fields["compiled"], fields["cycles"]) == ("shorter", 2048 * 160)
    assert fields["kernel_time_ms"] == pytest.approx(2048 * (160 / issue_hz + 20e-9) * 1e3)
    assert fields["time_samples_ms"] == [pytest.approx(1.0 + fields["kernel_time_ms"])]


def test_without_work_no_pace_is_told(estimate: Callable[..., Any]) -> None:
    assert estimate("shorter", quick.Cost(time_ms=10.0, cycles=1000)) is None


@pytest.mark.parametrize("softmax", ["fixed_bound", "online"])
def test_the_same_is_around_the_shorter_kernels_of_an_attention(softmax: str, tmp_path: Path) -> None:
    request = Request(
        kernel="splash_attn",
        kernel_hash="",
        shape=AttentionShape(1, 4, 20000, 20000, 64),
        dtype="bfloat16",
        block_sizes=BlockSizes(6656, 1024, 256),
        options={"softmax": softmax, "unroll_q": 3328},
        device="v6e",
        cache_dir=str(tmp_path),
        measure=MeasureSettings(),
    )
    unrolled = request.found.unrolled(request.config, request.workload)
    assert unrolled is not None and unrolled.shorter is not None and unrolled.least is not None
    configs = (request.config, unrolled.shorter, unrolled.least)
    assert len({quick._Op(request, config, V6E).around for config in configs}) == 1
    lengths = [request.found.unrolled(config, request.workload).length for config in configs]  # type: ignore[union-attr]
    assert lengths == [6656, 3072, 1280]


def test_what_is_around_a_kernel_is_compiled_by_one_worker_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first candidates, begun together, need the same: the second finds what the first has left."""
    path = tmp_path / "cache" / "rest.json"
    compiled: list[int] = []

    def need(number: int) -> None:
        with quick._one_at_a_time(path):
            if quick._read(path) is None:
                time.sleep(0.2)  # long enough for the others to be here
                compiled.append(number)
                quick._keep(path, quick.Cost(time_ms=1.0))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(need, range(4)))
    assert len(compiled) == 1
    monkeypatch.setattr(quick, "_PATIENCE_S", 0.1)
    with quick._one_at_a_time(path), quick._one_at_a_time(path):  # while another hangs
        pass
    (tmp_path / "file").touch()
    with quick._one_at_a_time(tmp_path / "file" / "rest.json"):  # no lock can be had there
        pass
