"""The command lines: what a user sees of a mistake, and that JSON says what is printed."""

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from offline_tpu import libtpu
from splash_attn import tuned
from splash_workbench.records import jsonl
from splash_workbench.trial_status import Status
from tuning import choose, peers, results, sweep
from tuning.trials import records, workloads
from tuning.trials.records import Trial

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command's main with arguments, in an empty folder: (exit code, stdout, stderr)."""

    def run(module: object, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        try:
            code = module.main()  # type: ignore[attr-defined]
        except SystemExit as end:  # Hydra's own, after --help
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("workload=nope", "workload=nope: no such option; expected one of cogvideox_480p, cogvideox_720p"),
        ("backend=nope", "expected one of interpret, measure, offline"),
        ("workers=0", "workers=0: expected at least 1"),
        ("timeout_s=-1", "timeout_s=-1.0: expected a positive number of seconds"),
        ("timeout_s=inf", "timeout_s=inf: expected a positive number of seconds, at most"),
        ("timeout_s=nan", "timeout_s=nan: expected a positive number of seconds"),
        ("timeout_s=1e300", "timeout_s=1e+300: expected a positive number of seconds"),
        ("workers=-3", "workers=-3: expected at least 1"),
        ("search.seed=-1", "search.seed=-1: expected 0 to 4294967295"),
        ("search.seed=99999999999", "search.seed=99999999999: expected 0 to"),
        ("json=.", "json=.: expected a file, got a folder"),
        ("json=/proc/no/file.json", "json=/proc/no/file.json: cannot write"),
        ("results_dir=/proc/results", "results_dir=/proc/results: cannot write"),
        ("logdir=/proc/runs profile=true", "logdir=/proc/runs: cannot write"),
        ("backend=measure backend.measure.min_samples=1", "min_samples=1, max_samples=100: expected 6 <= min"),
        ("backend=measure backend.measure.max_time_s=long", "Expected `float`, got `str` - at `$.max_time_s`"),
        ("backend=measure +backend.measure.samples=9", "samples"),
        ("search.max_trials=0", "search.max_trials=0: expected at least 1"),
        ("search.sampler=guess", "search.sampler='guess': expected one of ('grid', 'random', 'tpe')"),
        ("space.block_q=[100]", "space.block_q=100: expected a positive multiple of 128"),
        ("space.variant.softmax=online", "space.variant.softmax='online': expected a list"),
        ("space.first=[{block_q: 128}]", "space.first block_q=128: expected one of"),
        ("workload.head_dim=60", "head_dim=60: expected a multiple of 8"),
        ("workload.seq_len=99999999999999", "q_seq_len=99999999999999: expected less than 2**31"),
        ("workload.dtype=int3", "dtype='int3': expected one of"),
        ("device=local", "device='local': expected one of"),
        ("promote=yes", "promote='yes': expected true, false or shipped"),
        ("promote=3", "promote=3: expected true, false or shipped"),
        ("workload.name=../../x", "workload.name='../../x': expected at most 100 letters"),
        ("workload.name=a/b", "workload.name='a/b': expected at most 100 letters"),
        ("workload.name=.hidden", "the first a letter or digit"),
        ("workload.name=", "workload.name='': expected at most 100 letters"),
        ("workload.q_seq_len=4680", "workload.q_seq_len=4680: expected workload.seq_len for self-attention, or both"),
        ("workload.kv_seq_len=4680", "workload.kv_seq_len=4680: expected workload.seq_len for self-attention, or both"),
    ],
)
def test_a_mistake_is_one_line(run: Run, argument: str, message: str) -> None:
    code, out, err = run(sweep, *re.split(r" (?=[\w.+]+=)", argument))
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.parametrize("arguments", [("workers=0",), ("timeout_s=inf",), ("json=.",), ("results_dir=/proc/results",)])
def test_a_mistake_of_peers_is_one_line(run: Run, arguments: tuple[str, ...]) -> None:
    code, out, err = run(peers, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {arguments[0]}")


@pytest.mark.parametrize("version", ["0.0.99", None])
@pytest.mark.parametrize("command", [sweep, peers])
def test_another_libtpu_is_one_refusal(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: object, version: str | None
) -> None:
    monkeypatch.setattr(libtpu, "installed_version", lambda package: version)
    code, out, err = run(command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    there = f"libtpu {version}" if version else "no libtpu"
    assert f"{there} is installed, and predictions need libtpu {libtpu.SUPPORTED_LIBTPU}" in err


@pytest.mark.compile
@pytest.mark.parametrize("arguments", [(), ("backend=interpret",), ("backend=measure", "device=local")])
def test_an_unknown_flag_is_one_refusal_with_the_last_words(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_tpu_nonsense=1")
    code, out, err = run(sweep, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "Unknown flag in XLA_FLAGS: --xla_tpu_nonsense=1" in err


def test_measure_needs_a_worker_at_a_time(run: Run) -> None:
    code, _, err = run(sweep, "backend=measure", "device=local", "workers=2")
    assert code == 2
    assert "workers=2: expected 1 with backend=measure" in err


def test_help_is_for_newcomers(run: Run) -> None:
    code, out, _ = run(sweep, "--help")
    assert code == 0
    assert "python -m tuning.sweep " in out
    assert "workload: cogvideox_480p, cogvideox_720p" in out


@pytest.mark.compile
def test_interpret_sweep_end_to_end(run: Run, tmp_path: Path) -> None:
    arguments = ["backend=interpret", "workload=tiny", "space=tiny", "space.block_q=[128]", "space.block_kv=[128,256]"]
    code, out, err = run(sweep, *arguments, "space.block_kv_compute=[128]", "progress=false", "json=out/sweep.json")
    assert code == 0, err
    assert "2 candidates, 0 more pruned" in out
    assert "2 candidates evaluated in " in out
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert content["statuses"] == {"ok": 2}
    assert content["effort"]["jobs"] == 2
    assert content["effort"]["candidates_per_minute"] > 0
    assert content["effort"]["peak_memory_bytes"] is None or content["effort"]["peak_memory_bytes"] > 2**20
    assert content["winner"] is None  # no times, no winner
    assert content["promotion"] is None
    assert all(row["rms_error"] < 0.02 for row in content["trials"])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "results"}


def test_results_filters_and_writes_what_it_prints(run: Run, tmp_path: Path, make_trial: Callable[..., Trial]) -> None:
    path = tmp_path / "results" / "sweeps" / "x" / records.TRIALS_FILE
    jsonl.append(path, make_trial(time_samples_ms=(2.0,)))
    jsonl.append(path, make_trial(time_samples_ms=(1.0,)))
    jsonl.append(path, make_trial(status=Status.TIMEOUT, numerics=None, error="killed after the time limit of 7 s"))
    code, out, _ = run(results, "status=ok", "shape=1x3x1021:1013x64", "json=r.json")
    assert code == 0
    assert "timeout" not in out
    assert [row["predicted_ms"] for row in json.loads((tmp_path / "r.json").read_text())["trials"]] == [1.0, 2.0]
    assert "killed after the time limit of 7 s" in run(results, "status=timeout")[1]
    assert run(results, "status=wrong")[1].strip() == "no trials"
    code, _, err = run(results, "kernel=other")
    assert code == 2
    assert "kernel='other': on record are splash_attn" in err
    jsonl.append(path, make_trial(kernel="other", status=Status.TIMEOUT, numerics=None, error="killed"))
    assert run(results, "kernel=other", "status=ok")[:2] == (0, "no trials\n")


def test_two_shapes_under_one_name_are_never_in_one_ranking(
    run: Run, tmp_path: Path, make_trial: Callable[..., Trial]
) -> None:
    path = tmp_path / "results" / "sweeps" / "x" / records.TRIALS_FILE
    published = workloads.load("cogvideox_720p").shape
    other = dataclasses.replace(published, num_heads=24)
    for number, shape in enumerate((published, other, published, other)):
        jsonl.append(path, make_trial(workload="cogvideox_720p", shape=shape, time_samples_ms=(20.0 + number,)))
    code, out, _ = run(results, "json=r.json")
    rows = json.loads((tmp_path / "r.json").read_text())["trials"]
    assert code == 0
    derived = "cogvideox_720p+1x24x39826x64"
    assert [row["workload"] for row in rows] == ["cogvideox_720p"] * 2 + [derived] * 2
    assert "1x24x39826x64" in out and rows[0]["record_id"][:8] in out
    for arguments in (["workload=cogvideox_720p"], ["shape=1x12x39826x64"]):
        assert derived not in run(results, *arguments)[1]
    assert derived in run(results, "shape=1x24x39826x64")[1]
    code, _, err = run(results, "workload=tiny")
    assert code == 2
    assert "workload=tiny (1x2x1021x64 bfloat16): on record are cogvideox_720p (1x12x39826x64 bfloat16)" in err


@pytest.mark.parametrize("arguments", [["results_dir=nowhere"], ["results_dir=."], ["top=0"], ["top=-1"]])
def test_results_of_nothing_are_one_line(run: Run, arguments: list[str]) -> None:
    code, out, err = run(results, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {arguments[0]}: ") and err.count("\n") == 1


def test_choose_says_what_and_why(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "load", lambda device_kind, directory: ())
    code, out, _ = run(choose, "workload.q_seq_len=1009", "workload.kv_seq_len=77", "json=c.json")
    assert code == 0
    assert "block sizes: 1024/128/128" in out
    assert "default 3328/2816/256" in out
    content = json.loads((tmp_path / "c.json").read_text())
    assert content["block_sizes"] == {"block_q": 1024, "block_kv": 128, "block_kv_compute": 128}
    assert content["entry"] is None


def test_log_handlers_of_others_are_left_alone(run: Run) -> None:
    """Hydra's logging set-up closes every handler of the process; absl's closes the stream that it writes to."""
    closed = []

    class Handler(logging.Handler):
        def close(self) -> None:
            closed.append(self)
            super().close()

    handler = Handler()
    run(sweep, "workers=0")
    assert not closed
    handler.close()
