"""The command line. Most is tested on Hydra's composition in this process, the rest in real processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from helpers import PLENTY_S
from pipeline import generate
from pipeline.requests import default_model
from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.request import to_request
from pipeline.runs import request_run
from pipeline.runs.request_run import GenerateResult
from pipeline.stages.progress import StageEvent
from pipeline.terminal import Terminal

ROOT = Path(generate.__file__).resolve().parents[1]


def _compose(*arguments: str) -> GenerateConfig:
    """What the command would run."""
    taken: list[GenerateConfig] = []

    def keep(settings: GenerateConfig, *_: object) -> int:
        taken.append(settings)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["generate", *arguments])
        patch.setattr(generate, "_generate", keep)
        patch.setattr(generate, "_set_up_logging", lambda verbose: None)
        assert generate.main() == 0
    return taken[0]


@pytest.mark.parametrize(
    ("event", "said"),
    [
        (StageEvent("denoise", "run", 1, 2, 1.0), "in denoise after step 1 of 2; the same command goes on from there"),
        (StageEvent("vae", "run", 1, 2, 1.0), "in vae after step 1 of 2; the same command goes on from what is saved"),
        (StageEvent("encode", "run", 0, 1), "in encode; the same command goes on from what is saved"),
        (StageEvent("denoise", "load"), "in denoise; the same command goes on from what is saved"),
    ],
)
def test_an_interrupt_promises_only_the_steps_that_are_kept(event, said, monkeypatch, capsys):
    def interrupted(settings: GenerateConfig, engine: None, terminal: Terminal) -> int:
        if event.phase == "run":
            terminal(StageEvent(event.stage, "run", 0, event.total_steps))
        else:
            terminal(event)
        os.kill(os.getpid(), signal.SIGTERM)
        terminal(event)
        pytest.fail("went on")

    monkeypatch.setattr(sys, "argv", ["generate", "prompt=x"])
    monkeypatch.setattr(generate, "_generate", interrupted)
    monkeypatch.setattr(generate, "_set_up_logging", lambda verbose: None)
    assert generate.main() == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted {said}"


def _run(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "pipeline.generate", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=PLENTY_S
    )


@pytest.mark.parametrize(
    "prompt",
    ['it\'s "red", [50%] {x} ${oc.env:HOME}', "日本 — ü", "123", "a,b", "x=y", '"a cat"', "'tis", '"C:\\"'],
)
def test_prompts_are_taken_literally(prompt):
    assert to_request(_compose(f"prompt={prompt}")).prompt == prompt


def test_quotes_are_text_and_brackets_and_null_are_hydras():
    assert _compose("prompt='a, b'").prompt == "'a, b'"
    assert _compose("prompt=x", "stages=[text,vae]").stages == ["text", "vae"]
    assert _compose("prompt=x", "run_dir=null").run_dir is None


def test_paths_and_stages_may_hold_commas():
    config = _compose("prompt=x", "stages=text,vae", "run_dir=a, b/c=d")
    assert (config.stages, config.run_dir) == ("text,vae", "a, b/c=d")


def test_defaults_of_the_full_model_are_the_published_ones():
    request = to_request(_compose("prompt=a cat", "model=cogvideox1.5-5b"))
    assert request.checkpoint == "zai-org/CogVideoX1.5-5B"
    assert (request.height, request.width, request.num_frames, request.fps) == (720, 1280, 81, 16)
    assert (request.num_inference_steps, request.guidance_scale, request.seed) == (50, 6.0, 42)
    assert request.dtype == "bfloat16"


def test_the_command_line_comes_before_the_models_defaults():
    request = to_request(_compose("prompt=a cat", "num_frames=17", "model=tiny", "checkpoint=some/where"))
    assert (request.num_frames, request.checkpoint) == (17, "some/where")


@pytest.mark.parametrize(("backend", "expected"), [("tpu", "cogvideox1.5-5b"), ("cpu", "tiny"), ("gpu", "tiny")])
def test_the_default_model_goes_by_the_device(backend, expected, monkeypatch):
    monkeypatch.setattr(default_model, "accelerator_visible", lambda: True)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert default_model.default_model() == expected
    assert to_request(_compose("prompt=x")).dtype == ("bfloat16" if expected == "cogvideox1.5-5b" else "float32")


def test_attention_options():
    request = to_request(
        _compose(
            "prompt=x",
            "attention.block_sizes={block_q:256,block_kv:512,block_kv_compute:128}",
            "attention.variant={softmax:online}",
            "attention.k_smooth=false",
        )
    )
    assert request.attention.block_sizes.block_kv == 512
    assert request.attention.variant.softmax == "online"
    assert request.attention.k_smooth is False


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "attention.block_sizes={block_q:100,block_kv:128,block_kv_compute:128}",
            r"attention\.block_sizes\.block_q=100: expected",
        ),
        ("attention.block_sizes={block_q:128}", r"attention\.block_sizes={'block_q': 128}: expected {block_q: ..., "),
        ("attention.block_sizes=[1,2,3]", r"attention\.block_sizes=\[1, 2, 3\]: expected {block_q: ..., block_kv: "),
        ("attention.block_sizes=7", r"attention\.block_sizes=7: expected {block_q: ..., block_kv: "),
        ("attention.variant={nope:1}", r"attention\.variant={'nope': 1}: expected some of {softmax: ..., qk_dtype: "),
        ("attention.variant=foo", r"attention\.variant='foo': expected some of {softmax: ..., qk_dtype: "),
        ("attention.variant=3", r"attention\.variant=3: expected some of {softmax: ..., qk_dtype: "),
        ("attention.variant={lp_scheduler:1}", r"attention\.variant\.lp_scheduler=1: expected True or False"),
    ],
)
def test_bad_attention_options(argument, message):
    with pytest.raises(RequestError, match=message):
        to_request(_compose("prompt=x", argument))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), 'error: prompt=null: expected some text, e.g. prompt="a red circle moves right"'),
        (("prompt=null",), "error: prompt=null: expected some text"),
        (("prompt=", "width=2416"), "error: width=2416: the rotary table of checkpoint='tiny' ends at 2400"),
        (("prompt=x", "fps=0.5"), "error: fps=0.5: expected a number from 1 to 240"),
        (("prompt=", "prompts=y"), "error: prompts='y' and prompt='': expected one of them"),
        (("prompt=x", "num_frames=50"), "error: num_frames=50: expected 8k + 1"),
        (("prompt=x", "stages=text,foo"), "error: stages=text,foo: expected some of text,denoise,vae; unknown: 'foo'"),
        (("prompts=nowhere",), "error: prompts='nowhere': No such file or directory; expected a file of JSON lines"),
        (("prompt=x", "prompts=y"), "error: prompts='y' and prompt='x': expected one of them"),
        (("prompt=x", "name=a/b"), "error: name='a/b': expected the name of one folder"),
        (("prompt=x", "checkpoint=./nowhere"), "error: checkpoint='./nowhere': no such folder"),
        (("prompt=x", "model=nope"), "error: model=nope: no such option; expected one of cogvideox-2b, cogvideox-5b, "),
        (("prompt=x", "sead=1"), "error: sead: no such key; did you mean seed? See --help"),
        (("prompt=x", "height=tall"), "error: height=tall: Value 'tall'"),
        (("prompt=a", "cat"), "error: cat: expected key=value"),
        (("prompt=x", "stages=text,text"), "error: stages=text,text: expected each of text,denoise,vae at most once"),
        (("prompt=x", "name={seed:>9999999999}"), "error: name='{seed:>9999999999}': a width of more than 200 in"),
        (("prompts=",), "error: prompts='': expected a file, or null."),
        (("prompt=x", "run_dir="), "error: run_dir='': expected a folder, or null."),
        (("prompt=x", "output_dir="), "error: output_dir='': expected a folder."),
        (("prompt=x", "profile_run=x"), "error: profile_run='x': only with profile=true."),
        (("prompt=x", "strength=0.5"), "error: strength=0.5: only with video=...; leave it out"),
        (("prompt=x", "context_overlap=8"), "error: context_overlap=8: only with context_frames=...; leave it out"),
        (("prompt=x", "cache.threshold=0.3"), "error: cache.threshold=0.3: only with cache=teacache, "),
        (("prompt=x", "cache=none", "cache.threshold=0.3"), "error: cache.threshold=0.3: only with cache=teacache, "),
        (("prompt=x", "cache.max_reused=2"), "error: cache.max_reused=2: only with cache=magcache, or quality=fast; "),
        (("prompt=x", "quality=fast", "cache.ratios=x"), "error: cache.ratios='x': only with cache=magcache; leave it"),
        (
            ("prompt=x", "cache=teacache", "cache.first_steps=0.3"),
            "error: cache.first_steps=0.3: only with cache=magcache",
        ),
        (
            ("prompt=x", "cache=teacache", "cache.method=none"),
            "error: cache=teacache and cache.method='none': expected one of them",
        ),
        (("prompt=x", "parallel.plan=megatron", "parallel=ulysses"), "error: parallel=ulysses and parallel.plan='mega"),
        (
            ("prompt=x", "cache=unconditional", "guidance_scale=1"),
            "error: cache.unconditional_every=2: only with guidance_scale above 1 (it is 1), which computes a negative",
        ),
        (
            ("prompt=x", "num_frames=9", "context_frames=17"),
            "error: context_frames=17: only up to num_frames (it is 9), which the model then sees at a time",
        ),
        (
            ("prompt=x", "attention.implementation=xla", "attention.variant={softmax:online}"),
            "error: attention.variant={'softmax': 'online'}: only for the kernel, which attention.implementation=xla ",
        ),
        (
            (
                *("prompt=x", "attention.implementation=xla"),
                "attention.block_sizes={block_q:128,block_kv:128,block_kv_compute:128}",
            ),
            "error: attention.block_sizes={'block_q': 128, 'block_kv': 128, 'block_kv_compute': 128}: only for the",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_users_error_is_one_line(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate", *arguments])
    assert generate.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.compile
def test_a_process_ends_with_the_code_of_a_users_error(tmp_path):
    done = _run(tmp_path, "prompt=x", "height=tall")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.compile
def test_help_names_every_key_and_starts_nothing(tmp_path):
    done = _run(tmp_path, "--help")
    assert done.returncode == 0
    for name in GenerateConfig.__dataclass_fields__:
        assert name in done.stdout, name
    assert 'python -m pipeline.generate prompt="a red circle moves right"' in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argument", "ends"),
    [
        ("results_path=/proc/nowhere/x.jsonl", "(No such file or directory); name another folder."),
        ("results_path=.", "expected a file, got a folder."),
        ("output_dir=/proc/nowhere", "; name another folder."),
        ("run_dir=/dev/null/x", "(Not a directory); name another folder."),
        ("logdir=/proc/nowhere", "; name another folder."),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(argument, ends, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate", "prompt=x", "profile=true", "compilation_cache=false", argument])
    assert generate.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {argument.partition('=')[0].replace('output_dir', 'run_dir')}=")
    assert line.endswith(ends)
    assert list(tmp_path.iterdir()) == []


def test_runs_of_a_multirun_have_a_folder_each(monkeypatch, tmp_path, capsys):
    folders: list[Path] = []

    def run(request, *, run_dir, **options):
        folders.append(run_dir)
        return GenerateResult(run_dir, None, ())

    monkeypatch.setattr(request_run, "generate", run)
    monkeypatch.chdir(tmp_path)
    command = ["generate", "-m", "seed=1,2", "prompt=a cat, red", "results_path=null", "compilation_cache=false"]
    for more, names, message in (
        ((), ("a-cat-red-96x64x17-seed1-", "a-cat-red-96x64x17-seed2-"), ""),
        (("name={seed}",), ("1", "2"), ""),
        (("run_dir=x",), ("x",), "error: run_dir='x': an earlier one of these runs went there; leave it out"),
        (("name=y",), ("y",), "error: name='y': an earlier one of these runs went there"),
    ):
        folders.clear()
        monkeypatch.setattr(sys, "argv", [*command, *more])
        assert generate.main() == (2 if message else 0)
        assert [folder.name.startswith(name) for folder, name in zip(folders, names, strict=True)] == [True] * len(
            names
        )
        assert capsys.readouterr().err.startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.compile
def test_from_the_command_to_the_video(tmp_path, tiny_folder, shared_programs, monkeypatch, capsys):
    """In a process of its own, without JAX_PLATFORMS: nothing of libtpu's may show. Once more in this one: reused."""
    arguments = (
        "prompt=it's a cat, or not",
        f"checkpoint={tiny_folder}",
        "height=48",
        "width=80",
        "num_frames=9",
        "num_inference_steps=2",
        "fps=5",
    )
    done = _run(tmp_path, *arguments, JAX_PLATFORMS="", **shared_programs)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results", "videos"]
    (run_dir,) = (tmp_path / "videos").iterdir()
    assert f"video: videos/{run_dir.name}/video.mp4" in done.stdout
    assert "model tiny (the default without a TPU" in done.stdout
    assert "s a step" in done.stdout
    (line,) = (tmp_path / "results" / "generate.jsonl").read_text().splitlines()
    assert json.loads(line)["request"]["prompt"] == "it's a cat, or not"
    for noise in ("Warning", "libtpu", "TPU_ACCELERATOR_TYPE", "deprecat", "torchvision", "Traceback"):
        assert noise not in done.stderr
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pipeline.generate", *arguments, "stages=vae", "fps=6"])
    assert generate.main() == 0
    assert "reused" in capsys.readouterr().out
    assert len((tmp_path / "results" / "generate.jsonl").read_text().splitlines()) == 1
