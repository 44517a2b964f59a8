"""The command that searches compiler options, with a made-up compiler, and its entries where steps look for them."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading

import pytest

import pipeline.tune.__main__ as command
from helpers import PLENTY_S
from offline_tpu.options import CompilerOptionError
from pipeline.model import step_options
from pipeline.model.step_options import StepCall
from pipeline.predict.planner import Predictor
from pipeline.requests.errors import PipelineError
from splash_workbench.errors import EXIT_INTERRUPTED
from splash_workbench.provenance import REPO_ROOT
from splash_workbench.records import jsonl
from splash_workbench.records.step_search import StepSearchRecord

VMEM = "xla_tpu_scoped_vmem_limit_kib"


@pytest.fixture
def stages(monkeypatch):
    """Lets a step take less the nearer to 48 MiB it is; what was asked for, in order."""
    asked = []

    def stage(self, stage, plan, work, short_attention):
        assert stage == "denoise" and self.step_options is not None
        memory = int(self.step_options[VMEM])
        asked.append((str(plan), str(work), memory, short_attention))
        if memory > 60_000:
            raise PipelineError("denoise on v6e-8: does not fit\nand a log")
        call = StepCall(
            device_kind="TPU v6 lite",
            num_devices=plan.num_devices,
            plan=str(plan),
            tokens=39826,
            channels=3072,
            dtype="bfloat16",
            int8_linears=self.request.int8_linears,
            int8_attention=self.request.attention.qk_dtype == "int8",
            work=str(work),
        )
        time_s = 0.7 + abs(memory - 49152) / 1e6 + (0.1 if short_attention else 0)
        return {"time_s": time_s, "step_call": dataclasses.asdict(call), "compile_cpu_s": 100.0}

    monkeypatch.setattr(Predictor, "stage", stage)
    monkeypatch.setattr(command, "check_with_compiler", lambda device, options: None)
    monkeypatch.setattr(command.step_options, "DEFAULT", step_options.DEFAULT | {VMEM: "57344"})
    return asked


@pytest.fixture
def tune(monkeypatch, capsys):
    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline.tune", *arguments])
        code = command.main()
        return code, *capsys.readouterr()

    return run


def test_the_winner_is_what_steps_find_from_then_on(stages, tune, tmp_path):
    path = tmp_path / "steps.jsonl"
    code, said, _ = tune("quality=exact", f"results_path={path}", "workers=1")
    assert code == 0
    (record,) = jsonl.read(path, StepSearchRecord)
    assert record.winner.options[VMEM] == "49152" and record.label == "predicted"
    assert record.winner.time_s < record.default.time_s
    call = jsonl.decode(record.call, StepCall)
    assert step_options.choose(call)[VMEM] == "49152"
    assert step_options.choose(dataclasses.replace(call, tokens=1)) == step_options.DEFAULT
    assert "best:    0.7000 s a step (-1.2%)" in said and "kept: every such step takes them" in said
    assert "no time (denoise on v6e-8: does not fit)" in said and "at most" in said and "predicted" in said


def test_each_kind_of_step_is_searched_once(stages, tune, tmp_path):
    path = tmp_path / "steps.jsonl"
    assert tune("quality=all", f"results_path={path}", "promote=false")[0] == 0
    calls = [jsonl.decode(record.call, StepCall) for record in jsonl.read(path, StepSearchRecord)]
    found = [(call.int8_linears, call.work, call.plan.split(",")[0]) for call in calls]
    assert found == [
        (False, "computed", "ulysses dp=2 x model=4"),
        (True, "computed", "ulysses dp=2 x model=4"),
        (True, "computed", "ulysses dp=1 x model=8"),
        (True, "computed, positive prompt only", "ulysses dp=1 x model=8"),
    ]
    assert step_options.read(step_options.user_path()) == ()


def test_flags_of_the_command_line_are_tried_too(stages, tune, tmp_path):
    path = tmp_path / "steps.jsonl"
    space = f"flags={{{VMEM}:[45056,57344],xla_tpu_rwb_fusion:['',false]}}"
    assert tune("quality=exact", f"results_path={path}", "promote=false", space)[0] == 0
    (record,) = jsonl.read(path, StepSearchRecord)
    assert {tried.options[VMEM] for tried in record.tried} == {"45056", "57344"}
    assert {tried.options.get("xla_tpu_rwb_fusion") for tried in record.tried} == {None, "false"}


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("promote=perhaps", "promote='perhaps': expected true, false or shipped"),
        ("promote=[true]", "promote=[True]: expected true, false or shipped"),
        ("flags.xla_tpu_rwb_fusion=false", "flags.xla_tpu_rwb_fusion=False: expected a list of values"),
        ("flags.9=[1]", "got '9'; expected a flag's name"),
        ("workers=0", "workers=0: expected at least 1"),
        ("topology=v6e-7", "topology='v6e-7': expected"),
        ("quality=best", "quality='best'"),
        ("prompt=cat", "prompt"),
        ("attention.implementation=xla", "attention.implementation='xla': a prediction is of the TPU's kernel"),
    ],
)
def test_bad_input_is_told_before_any_work(stages, tune, argument, said):
    code, _, error = tune(argument)
    assert code == 2 and said in error and not stages


def test_a_step_that_never_compiles_is_one_line(stages, tune, monkeypatch):
    monkeypatch.setattr(command.step_options, "DEFAULT", step_options.DEFAULT | {VMEM: "65536"})
    code, _, error = tune("quality=exact", f"flags.{VMEM}=[65536]", "promote=false")
    assert code == 2 and "does not fit" in error and "Traceback" not in error


def test_a_step_that_compiles_with_other_options_alone_is_kept(stages, tune, monkeypatch, tmp_path):
    """So the next run of it compiles."""
    monkeypatch.setattr(command.step_options, "DEFAULT", step_options.DEFAULT | {VMEM: "65536"})
    path = tmp_path / "steps.jsonl"
    code, said, _ = tune("quality=exact", f"flags.{VMEM}=[49152,65536]", f"results_path={path}")
    (record,) = jsonl.read(path, StepSearchRecord)
    call = jsonl.decode(record.call, StepCall)
    assert code == 0 and step_options.choose(call)[VMEM] == "49152"
    (kept,) = step_options.read(step_options.user_path())
    assert kept.default_time_s is None and kept.time_s == record.winner.time_s
    assert "default: no time (denoise on v6e-8: does not fit)" in said and "best:    0.7000 s a step, 100 CPU s" in said


def test_ctrl_c_ends_what_is_being_compiled(tune, monkeypatch):
    """In other threads, which would else be waited for."""
    ended = []

    def stage(self, *arguments):
        interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        try:
            self.runner.run("fake_jobs:hang", {}, timeout_s=PLENTY_S)
        finally:
            ended.append(arguments)

    monkeypatch.setattr(Predictor, "stage", stage)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, error = tune("quality=exact", "promote=false", "workers=1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == EXIT_INTERRUPTED and "interrupted" in error and len(ended) == 1


def test_flags_that_the_compiler_does_not_take_are_refused_before_any_step(stages, tune, monkeypatch):
    asked = []

    def check(device, options):
        asked.extend([device.name, *options])
        raise CompilerOptionError("compiler_options.xla_tpu_foo: libtpu takes no such option")

    monkeypatch.setattr(command, "check_with_compiler", check)
    code, _, error = tune("quality=exact", "promote=false", 'flags.xla_tpu_foo=["",1,true]')
    assert (code, error) == (2, "error: compiler_options.xla_tpu_foo: libtpu takes no such option\n")
    assert asked == ["v6e", {"xla_tpu_foo": "1"}, {"xla_tpu_foo": "true"}] and stages == []


@pytest.mark.slow("3 min")
def test_the_command_compiles_a_small_step(tmp_path):
    path = tmp_path / "steps.jsonl"
    arguments = [f"flags.{VMEM}=[32768,65536]", "flags.xla_tpu_enable_async_all_to_all=[true]", f"results_path={path}"]
    arguments += ["model=tiny", "topology=v6e-4", "quality=exact", "dtype=bfloat16", f"cache_dir={tmp_path}"]
    words = [sys.executable, "-m", "pipeline.tune", *arguments]
    done = subprocess.run(words, cwd=REPO_ROOT, capture_output=True, text=True, check=False, timeout=PLENTY_S)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert 0 < record["winner"]["time_s"] <= record["default"]["time_s"]
    assert record["call"]["num_devices"] == 4 and record["call"]["device_kind"] == "TPU v6 lite"
