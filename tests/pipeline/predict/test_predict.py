import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import PLENTY_S
from offline_tpu.options import CompilerOptionError
from pipeline import predict_table
from pipeline.checkpoints.checks import part_configs
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.model import step_options
from pipeline.model.denoise_step import EVERYTHING
from pipeline.model.latents import TokenLayout
from pipeline.model.sharding import ParallelPlan
from pipeline.model.transformer import TransformerShape
from pipeline.predict import __main__ as predict
from pipeline.predict import planner
from pipeline.predict.jobs import step_flops, together
from pipeline.predict.planner import Predictor, VideoPrediction
from pipeline.predict.report import make_report, markdown_table, print_report
from pipeline.requests.errors import PipelineError, RequestError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, GenerateRequest
from splash_attn.types import BlockSizes, Variant
from splash_workbench.records.jsonl import decode, encode
from splash_workbench.records.prediction import PredictionRecord
from splash_workbench.trial_status import Status
from splash_workbench.workers.cache import JobCache
from splash_workbench.workers.pool import Outcome

REPO = Path(__file__).parents[3]
FULL = {"checkpoint": "zai-org/CogVideoX1.5-5B", "height": 720, "width": 1280, "num_frames": 81}


def _result(time_s: float, **more) -> dict:
    return {
        "time_s": time_s,
        "interval_s": (0.9 * time_s, 1.2 * time_s),
        "breakdown_s": {"attention_kernel": 0.7 * time_s, "projections": 0.3 * time_s},
        "peak_hbm_bytes": 8 * 2**30,
        "hbm_bytes": 32 * 2**30,
        "hbm_traffic_bytes": 10**11,
        "link_bytes": 10**9,
        "compile_time_s": 60.0,
        "compile_cpu_s": 50.0,
        "compile_peak_rss_bytes": 10**9,
        "ops": [{"name": "fusion"}],
        **more,
    }


def _denoise(time_s: float) -> dict:
    attention = {"shape": "1x12x39826x64", "resolution": "pallas_tpu"}
    return _result(time_s, mfu_fraction=0.4, num_layers=42, attention=attention)


def _report(request_of, plan: str = "ulysses", **stages) -> PredictionRecord:
    request = request_of(**FULL, dtype="bfloat16", num_inference_steps=50)
    return make_report(request, "v6e-8", VideoPrediction(ParallelPlan(plan, 2, 4), stages, {}), "built in")


def test_total_is_all_steps_and_the_stages_around_them(request_of):
    report = _report(request_of, text=_result(0.01), denoise=_denoise(0.9), vae=_result(0.7))
    assert report.label == "predicted"
    assert report.step_time_s == 0.9
    assert report.total_time_s == pytest.approx(0.01 + 50 * 0.9 + 0.7)
    assert report.peak_hbm_gib == 8
    assert report.reported.total_time_s == 106.47


def test_there_is_no_total_without_all_stages(request_of):
    assert _report(request_of, denoise=_denoise(0.9)).total_time_s is None


def test_the_seeds_own_kernel_stands_in_for_ours(request_of):
    report = _report(request_of, plan="seed_tp", denoise=_denoise(1.0))
    assert report.step_time_s == pytest.approx(1.0 - 0.7 + 42 * 0.024)
    assert report.step_time_own_kernel_s == 1.0
    assert "replaced by the seed's" in report.notes[0]


def test_the_table_has_one_line_a_case_and_says_what_was_reported(request_of):
    old, new = (_report(request_of, denoise=_denoise(time_s)) for time_s in (0.9, 0.8))
    table = markdown_table([decode(encode(report.without_ops()), PredictionRecord) for report in (old, new)])
    (ours,) = [line for line in table.splitlines() if "ulysses" in line]
    assert "0.800" in ours
    assert "predicted" in ours
    assert "106.47" in table.splitlines()[-1]
    assert "reported" in table.splitlines()[-1]


def test_compiler_options_are_in_the_record_and_in_the_table(request_of, capsys):
    request = request_of(**FULL, dtype="bfloat16", num_inference_steps=50)
    prediction = VideoPrediction(ParallelPlan("ulysses", 2, 4), {"denoise": _denoise(0.9)}, {})
    report = make_report(request, "v6e-8", prediction, "built in", {"xla_a": "1"})
    print_report(report)
    assert "compiler options xla_a=1" in capsys.readouterr().out
    plain = _report(request_of, denoise=_denoise(0.8))
    lines = [line for line in markdown_table([report, plain]).splitlines() if "ulysses" in line]
    assert len(lines) == 2 and sum("on v6e-8, xla_a=1 |" in line for line in lines) == 1
    older = encode(plain.without_ops())
    del older["compiler_options"]
    assert decode(older, PredictionRecord).compiler_options == {}


def test_two_models_of_one_size_have_a_line_each(request_of):
    prediction = VideoPrediction(ParallelPlan("ulysses", 2, 4), {"denoise": _denoise(0.9)}, {})
    requests = [request_of(**FULL | {"checkpoint": f"zai-org/{name}"}) for name in ("CogVideoX-5b", "CogVideoX-2b")]
    table = markdown_table([make_report(request, "v6e-8", prediction, "built in") for request in requests])
    assert [f"| CogVideoX-{name}, 1280x720x81" in table for name in ("2b", "5b")] == [True, True]


def test_the_table_has_a_line_for_every_plan_that_was_tried(request_of):
    request = request_of(**FULL, dtype="bfloat16", num_inference_steps=50)
    others = {"megatron dp=2 x model=4": 1.25, "ulysses dp=2 x model=4, weights sharded": "does not fit"}
    outcome = VideoPrediction(ParallelPlan("ulysses", 2, 4), {"denoise": _denoise(0.9)}, others)
    lines = markdown_table([make_report(request, "v6e-8", outcome, "built in")]).splitlines()
    (megatron,) = [line for line in lines if "megatron" in line]
    assert "| 1.250 |" in megatron
    again = VideoPrediction(ParallelPlan("ulysses", 2, 4), {"denoise": _denoise(0.8)}, {})  # of that plan alone
    reports = [make_report(request, "v6e-8", each, "built in") for each in (outcome, again)]
    assert megatron in markdown_table(reports).splitlines()
    assert not [line for line in lines if "sharded" in line]


def test_a_stage_that_does_not_fit_is_said_and_the_others_are_kept(request_of, capsys):
    request = request_of(**FULL, dtype="bfloat16", num_inference_steps=50)
    full = _denoise(7.0) | {"peak_hbm_bytes": 30 * 2**30}
    refused = {"vae": "vae on v6e-1: does not fit a chip's 32 GiB; try more chips"}
    report = make_report(
        request, "v6e-1", VideoPrediction(ParallelPlan("ulysses", 1, 1), {"denoise": full}, {}, refused), ""
    )
    assert report.total_time_s is None
    assert not report.hbm_has_margin
    print_report(report)
    output = capsys.readouterr().out
    assert "does not fit a chip's 32 GiB" in output
    assert "HBM peak 30.00 GiB a chip over denoise: MORE THAN 90% of the chip's 32 GiB" in output
    assert "does not fit" in markdown_table([report])


def test_predictor_goes_on_after_a_stage_that_does_not_fit(monkeypatch, request_of):
    configs, _ = part_configs(FULL["checkpoint"], lambda: pytest.fail("nothing is to be fetched"))

    def run(self, stage, plan):
        if stage == "vae" or plan.plan == "ulysses":
            raise PipelineError(f"{stage} {plan}: does not fit")
        return _denoise(0.9)

    monkeypatch.setattr(Predictor, "stage", run)
    predictor = Predictor("v6e-8", request_of(), configs, timeout_s=1, say=lambda text: None)
    outcome = predictor.predict(["text", "denoise", "vae"], ParallelOptions())
    assert outcome.plan.plan == "megatron"
    assert list(outcome.stages) == ["text", "denoise"]
    assert list(outcome.failures) == ["vae"]
    assert "does not fit" in outcome.others["ulysses dp=2 x model=4, weights replicated"]
    with pytest.raises(PipelineError, match=r"vae .* does not fit"):
        predictor.predict(["vae"], ParallelOptions())


@pytest.mark.parametrize(
    ("topology", "expected"),
    [
        ("v6e-32", ["ulysses dp=2 x model=16, weights replicated", "megatron dp=2 x model=16"]),
        ("v6e-64", ["ulysses_allgather dp=2 x model=16 x kv=2, weights replicated"]),
        ("v6e-256", ["ulysses_allgather dp=2 x model=16 x kv=8, weights replicated"]),
    ],
)
def test_auto_tries_what_takes_so_many_devices(monkeypatch, request_of, topology, expected):
    configs, _ = part_configs(FULL["checkpoint"], lambda: pytest.fail("nothing is to be fetched"))
    tried = []

    def run(self, stage, plan, work=EVERYTHING):
        tried.append(str(plan))
        return _denoise(0.9)

    monkeypatch.setattr(Predictor, "stage", run)
    predictor = Predictor(topology, request_of(), configs, timeout_s=1, say=lambda text: None)
    outcome = predictor.predict(["denoise"], ParallelOptions())
    assert tried == expected and str(outcome.plan) == expected[0]
    both, _ = predictor.step(outcome.plan, ParallelOptions(dp=1), EVERYTHING)
    assert both.plan == "ulysses_allgather" and both.num_devices == outcome.plan.num_devices


def test_records_hold_no_list_of_ops(request_of):
    report = _report(request_of, denoise=_denoise(0.9), vae=together([_result(0.1), _result(0.2)], [1, 9]))
    assert '"ops"' not in json.dumps(encode(report.without_ops()))
    assert report.stages["vae"].time_s == pytest.approx(0.1 + 9 * 0.2)
    assert report.stages["vae"].interval_s == pytest.approx((0.9 * 1.9, 1.2 * 1.9))


def test_what_depends_on_data_is_given_at_both_ends(request_of, capsys):
    stages = {"text": _result(0.01), "denoise": _denoise(0.9) | {"slow_time_s": 1.1}, "vae": _result(0.7)}
    report = _report(request_of, **stages)
    assert report.slow_total_time_s == pytest.approx(report.total_time_s + 50 * 0.2)
    print_report(report)
    said = capsys.readouterr().out
    assert "0.900 s a step (0.810 to 1.080); 1.100 where every head needs the online softmax" in said
    assert "; 55.71 s where every head needs the online softmax" in said
    # The published plan has another kernel.
    assert _report(request_of, "seed_tp", **stages).slow_total_time_s is None


def test_a_request_survives_json(request_of):
    options = AttentionOptions(block_sizes=BlockSizes(256, 512, 128), variant=Variant(softmax="online"))
    request = request_of(attention=options)
    assert decode(json.loads(json.dumps(dataclasses.asdict(request))), GenerateRequest) == request


def test_a_runs_name_that_cannot_be_is_refused_before_any_work(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "video_of", lambda *_: pytest.fail("work began"))
    for arguments, message in (
        (("profile=true", "profile_run=../x"), "profile_run='../x': expected a run's name of letters"),
        (("profile=true", "profile_run="), "profile_run='': expected a run's name of letters"),
        (("profile_run=x",), "profile_run='x': only with profile=true"),
    ):
        monkeypatch.setattr(sys, "argv", ["predict", *arguments])
        assert predict.main() == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert list(tmp_path.iterdir()) == []


def test_another_quality_is_refused_with_those_of_a_prediction(monkeypatch, capsys):
    monkeypatch.setattr(Predictor, "predict", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(sys, "argv", ["predict", "model=tiny", "quality=x"])
    assert predict.main() == 2
    assert capsys.readouterr().err == "error: quality='x': expected one of exact, fast, fastest, all\n"


@pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])
def test_another_attention_than_the_kernel_is_refused_before_any_stage(monkeypatch, capsys, implementation):
    monkeypatch.setattr(Predictor, "predict", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(sys, "argv", ["predict", "model=tiny", f"attention.implementation={implementation}"])
    assert predict.main() == 2
    assert capsys.readouterr().err.startswith(f"error: attention.implementation='{implementation}': a prediction is of")


def test_options_that_the_compiler_does_not_take_are_refused_before_any_stage(monkeypatch, capsys):
    asked = []

    def check(device, options):
        asked.extend([device.name, *options])
        raise CompilerOptionError("compiler_options.xla_tpu_foo: libtpu takes no such option")

    monkeypatch.setattr(predict, "check_with_compiler", check)
    monkeypatch.setattr(Predictor, "predict", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(sys, "argv", ["predict", "model=cogvideox1.5-5b", "compiler_options.xla_tpu_foo=1"])
    assert predict.main() == 2
    assert capsys.readouterr().err == "error: compiler_options.xla_tpu_foo: libtpu takes no such option\n"
    assert asked == ["v6e", {"xla_tpu_foo": "1"}]


def test_flops_of_the_full_step():
    shape = TransformerShape.from_config(
        part_configs(FULL["checkpoint"], lambda: pytest.fail("nothing is to be fetched"))[0]["transformer"]
    )
    flops = step_flops(shape, TokenLayout(226, 39600, 4), 2)
    # 42 layers x 2 prompts: 113 M weights in products with 39826 tokens, and 39826^2 scores of 48 x 64, twice.
    expected = 84 * (2 * 113.2e6 * 39826 + 4 * 39826**2 * 3072)
    assert flops == pytest.approx(expected, rel=1e-3)


def test_the_built_in_configuration_is_the_published_one(request_of):
    configs, checkpoint = part_configs(FULL["checkpoint"], lambda: pytest.fail("nothing is to be fetched"))
    assert checkpoint is None
    assert configs["transformer"]["num_layers"] == 42
    assert set(configs) == set(PUBLISHED_CONFIGS[FULL["checkpoint"]])


@pytest.mark.parametrize("topology", ["v6e-7", "v9x-8", "v7x-4", "banana", "v4-8", "v6e:2x", "v6e:axb", "", "v6e:0x4"])
def test_an_unknown_topology_is_refused(topology, request_of):
    configs, _ = part_configs(FULL["checkpoint"], lambda: pytest.fail("nothing is to be fetched"))
    predictor = Predictor(topology, request_of(), configs, timeout_s=1, say=lambda text: None)
    with pytest.raises(RequestError, match=rf"^topology='{topology}': (not supported: .*; )?expected"):
        predictor.predict(["denoise"], ParallelOptions())


@pytest.fixture
def compiled(monkeypatch):
    """Lets every job take no time; the payloads of those that ran."""
    ran = []

    def run(self, target, payload, **more):
        ran.append(payload)
        status = Status.TIMEOUT if payload["stage"] == "vae" else Status.OK
        return Outcome(status, _denoise(0.9), None, "", 0.0)

    monkeypatch.setattr(planner.Runner, "run", run)
    return ran


def test_what_was_compiled_is_not_compiled_again(compiled, request_of, tmp_path):
    configs, _ = part_configs(FULL["checkpoint"], lambda: pytest.fail("nothing is to be fetched"))
    plan, said = ParallelPlan("ulysses", 2, 4), []

    def predictor(**changes) -> Predictor:
        cache = JobCache(tmp_path)
        return Predictor("v6e-8", request_of(**changes), configs, 1.0, said.append, cache=cache)

    first = predictor().stage("denoise", plan)
    again = predictor(prompt="another", seed=8).stage("denoise", plan)
    assert first["time_s"] == again["time_s"] == 0.9 and len(compiled) == 1
    assert said[0].startswith("denoise: compiling for v6e-8") and "on record" in said[1]
    predictor().stage("denoise", plan, short_attention=True)
    predictor(height=64).stage("denoise", plan)
    dataclasses.replace(predictor(), compiler_options={"xla_a": "1"}).stage("denoise", plan)
    dataclasses.replace(predictor(), step_options={"xla_a": "1"}).stage("denoise", plan)
    predictor().stage("denoise", ParallelPlan("megatron", 2, 4))
    assert len(compiled) == 6
    for count in (7, 8):  # that time ran out says nothing of the next time
        with pytest.raises(PipelineError, match="timeout"):
            predictor().stage("vae", plan)
        assert len(compiled) == count


def test_an_entry_of_compiler_options_is_compiled_anew(compiled, request_of, tmp_path):
    configs, _ = part_configs(FULL["checkpoint"], lambda: pytest.fail("nothing is to be fetched"))
    predictor = Predictor("v6e-8", request_of(), configs, 1.0, lambda text: None, cache=JobCache(tmp_path))
    given = dataclasses.replace(predictor, step_options={"xla_a": "1"})
    plan = ParallelPlan("ulysses", 2, 4)
    predictor.stage("denoise", plan)
    given.stage("denoise", plan)
    step_options.user_path().parent.mkdir(parents=True, exist_ok=True)
    step_options.user_path().write_text("{}")
    predictor.stage("denoise", plan)
    given.stage("denoise", plan)  # goes by no entry
    assert len(compiled) == 3


@pytest.mark.slow("2 min")
def test_the_command_predicts_a_small_model(tmp_path):
    path = tmp_path / "prediction.json"
    command = [sys.executable, "-m", "pipeline.predict", "model=tiny", "topology=v6e-4", "stages=text,denoise,vae"]
    command += [f"json={path}", "results_path=null", f"cache_dir={tmp_path}", "parallel=ulysses", "dtype=bfloat16"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=False, timeout=PLENTY_S)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(path.read_text())
    assert report["label"] == "predicted"
    assert 0 < report["step_time_s"] < report["total_time_s"]
    assert report["plan"] == {"plan": "ulysses", "dp": 2, "model": 2, "weights": "replicated", "kv": 1}
    assert {"attention_kernel", "projections", "collectives"} <= set(report["stages"]["denoise"]["breakdown_s"])
    assert "predicted" in done.stdout


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08"])
def test_a_file_without_predictions_makes_no_table(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "predict.jsonl"
    path.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["predict_table", str(path)])
    assert predict_table.main() == 2
    assert "predict.jsonl: no predictions; run python -m pipeline.predict first" in capsys.readouterr().err
