"""What the presets of quality cost: how many steps run the blocks, sums over kinds of steps. Nothing is compiled."""

import dataclasses

import pytest

from pipeline.checkpoints.checks import part_configs, read_configs
from pipeline.checkpoints.loading import resolve_checkpoint
from pipeline.model.denoise_step import StepWork
from pipeline.model.sharding import ParallelPlan
from pipeline.predict.planner import Predictor, VideoPrediction, _check_stored
from pipeline.predict.presets import predict_presets, preset_steps, settle_presets
from pipeline.predict.report import make_report, markdown_table, print_report
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest
from pipeline.requests.reuse import PRESETS, CacheOptions
from splash_workbench.records.jsonl import decode, encode
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Outcome

BIG = "zai-org/CogVideoX1.5-5B"
V6E = "TPU v6 lite"


@pytest.fixture
def request_of_5b():
    return GenerateRequest("any", BIG)


@pytest.fixture(scope="module")
def configs():
    return part_configs(BIG, lambda: pytest.fail("a published checkpoint is not fetched"))[0]


def test_presets_of_a_published_model(request_of_5b, configs):
    settled, refused = settle_presets(request_of_5b, tuple(PRESETS), configs, None, V6E)
    assert not refused
    exact, fast, fastest = settled.values()
    assert exact.schedule.steps == (StepWork(),) * 50 and not exact.schedule.reuse.residual
    assert exact.request.attention.qk_dtype is None and exact.request.quantization is None
    assert (fast.request.attention.qk_dtype, fast.request.quantization) == ("int8", "int8")
    assert fast.schedule.steps_computed == round(50 * 260 / 465) and "authors" in fast.note
    assert fast.schedule.steps[0] == fast.schedule.steps[-1] == StepWork()
    assert fastest.schedule.steps_computed == round(50 * 204 / 465)
    whole = [work for work in fastest.schedule.steps if work.blocks and work.negative]
    assert len(whole) <= fastest.schedule.steps_computed // 2 + 1


def test_a_preset_takes_int8_only_where_matrix_units_have_it(request_of_5b, configs):
    settled, _ = settle_presets(request_of_5b, tuple(PRESETS), configs, None, "TPU7x")
    found = {name: (steps.request.attention.qk_dtype, steps.request.quantization) for name, steps in settled.items()}
    assert found == {"exact": (None, None), "fast": (None, "none"), "fastest": (None, "none")}
    asked = dataclasses.replace(request_of_5b, quantization="int8", attention=AttentionOptions(qk_dtype="int8"))
    steps = preset_steps(asked, "fast", configs, None, "TPU7x").request
    assert (steps.attention.qk_dtype, steps.quantization) == ("int8", "int8")


def test_what_is_not_known_is_refused(request_of_5b, configs):
    far = dataclasses.replace(request_of_5b, cache=CacheOptions("teacache", threshold=0.5))
    with pytest.raises(RequestError, match=r"cache.threshold=0.5: .* thresholds up to 0.3"):
        preset_steps(far, "exact", configs, None, V6E)
    other = dataclasses.replace(request_of_5b, checkpoint="zai-org/CogVideoX-2b")
    small = part_configs("zai-org/CogVideoX-2b", lambda: pytest.fail("fetched"))[0]
    settled, refused = settle_presets(other, tuple(PRESETS), small, None, V6E)
    assert list(settled) == ["exact"]
    assert [text.split(":")[0] for text in refused] == ["quality=fast", "quality=fastest"]
    with pytest.raises(RequestError, match="no ratios are here"):
        preset_steps(dataclasses.replace(request_of_5b, cache=CacheOptions("magcache")), "exact", configs, None, V6E)


def test_a_local_checkpoint_is_read():
    checkpoint = resolve_checkpoint("tiny")
    request = GenerateRequest("any", num_inference_steps=32)
    steps = preset_steps(request, "fast", read_configs(checkpoint), checkpoint, V6E)
    assert steps.note is None and 0 < steps.schedule.steps_computed < 32
    teacache = CacheOptions("teacache", threshold=0.1, coefficients=(1.0, 0.0))
    by_weights = preset_steps(
        dataclasses.replace(request, cache=teacache), "exact", read_configs(checkpoint), checkpoint, V6E
    )
    assert 0 < by_weights.schedule.steps_computed < 32


class _Played(Predictor):
    """Answers with times of its own instead of compiling."""

    def stage(self, stage, plan, work=StepWork()):  # type: ignore[no-untyped-def] # noqa: B008
        if plan.dp == 1 and not work.negative:
            self.say("asked for a step without the negative prompt")
        time_s = (1.0 if work.blocks else 0.01) * (1.0 if work.negative else 0.5)
        return _result(time_s)


def _result(time_s):
    return {
        "time_s": time_s,
        "interval_s": (0.9 * time_s, 1.1 * time_s),
        "breakdown_s": {"attention_kernel": time_s},
        "peak_hbm_bytes": 2**30,
        "hbm_bytes": 2**35,
        "compile_cpu_s": 10.0,
    }


def test_a_total_is_the_sum_over_kinds(request_of_5b, configs):
    settled, _ = settle_presets(request_of_5b, tuple(PRESETS), configs, None, V6E)
    said = []
    predictor = _Played("v6e-8", settled["exact"].request, configs, 60.0, said.append)
    stages = {"text": _result(0.1), "denoise": _result(2.0), "vae": _result(0.4)}
    prediction = VideoPrediction(ParallelPlan("ulysses", 2, 4), stages, {})  # type: ignore[arg-type]
    presets, notes = predict_presets(settled, predictor, prediction, ParallelOptions())
    assert not notes and list(presets) == list(PRESETS)
    assert presets["exact"].total_time_s == pytest.approx(50 * 2.0 + 0.5)
    assert presets["fast"].total_time_s == pytest.approx(28 * 1.0 + 22 * 0.01 + 0.5)
    assert presets["fast"].total_interval_s == pytest.approx((0.9 * (28.22 + 0.5), 1.1 * (28.22 + 0.5)))
    fastest = presets["fastest"]
    assert (fastest.plan.dp, fastest.plan.model) == (1, 8) and said
    assert sum(kind.count for kind in fastest.kinds) == 50
    assert fastest.total_time_s == pytest.approx(sum(kind.count * kind.time_s for kind in fastest.kinds) + 0.5)
    assert presets["fast"].compile_cpu_s == {"text": 10.0, "vae": 10.0, "denoise": 20.0}


def test_a_preset_that_does_not_fit_is_a_note(request_of_5b, configs):
    class Full(_Played):
        def stage(self, stage, plan, work=StepWork()):  # type: ignore[no-untyped-def] # noqa: B008
            raise PipelineError("does not fit")

    settled, _ = settle_presets(request_of_5b, tuple(PRESETS), configs, None, V6E)
    predictor = Full("v6e-8", settled["exact"].request, configs, 60.0, lambda text: None)
    prediction = VideoPrediction(ParallelPlan("ulysses", 2, 4), {"denoise": _result(2.0)}, {})
    presets, notes = predict_presets(settled, predictor, prediction, ParallelOptions())
    assert list(presets) == ["exact"] and presets["exact"].total_time_s is None
    assert notes == ["quality=fast: does not fit", "quality=fastest: does not fit"]


def test_the_table_has_a_line_for_each_preset(request_of_5b, configs, capsys):
    settled, _ = settle_presets(request_of_5b, tuple(PRESETS), configs, None, V6E)
    predictor = _Played("v6e-8", settled["exact"].request, configs, 60.0, lambda text: None)
    stages = {"text": _result(0.1), "denoise": _result(2.0), "vae": _result(0.4)}
    prediction = VideoPrediction(ParallelPlan("ulysses", 2, 4), stages, {})  # type: ignore[arg-type]
    presets, _ = predict_presets(settled, predictor, prediction, ParallelOptions())
    report = make_report(settled["exact"].request, "v6e-8", prediction, "built in", None, presets, ("quality=x: no",))
    lines = markdown_table([report]).splitlines()
    assert "quality=fast, 28 computed" in lines[3] and "quality=fastest, 22 computed" in lines[4]
    assert decode(encode(report), type(report)) == report
    print_report(report)
    printed = capsys.readouterr().out
    assert "exact      50 of 50     2.000    100.00   100.50" in printed
    assert "fast       28 of 50     1.000" in printed and "note: quality=x: no" in printed
    assert "reported                2.130             106.47" in printed


@pytest.mark.parametrize("result", [{"time_s": "abc"}, {}])
def test_a_stored_outcome_that_is_no_prediction_is_made_again(result):
    with pytest.raises(ValueError):
        _check_stored(Outcome(Status.OK, result, None))
