"""Comparisons of synthetic profiles with planted differences, and of records."""

import csv
import json
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from splash_workbench.errors import UserError
from splash_workbench.profiles import reader, sessions
from splash_workbench.profiles.sessions import Session
from splash_workbench.profiles.xla_pb2 import XSpace
from splash_workbench.provenance import Environment
from splash_workbench.records import jsonl
from splash_workbench.records.prediction import Plan, PredictionRecord, StagePrediction
from splash_workbench.trial_status import Label, Status
from tuning.compare import __main__ as compare
from tuning.compare.inputs import resolve
from tuning.compare.table import MIN_STEPS, Run, notes_of, rows_of
from tuning.trials import records

ENVIRONMENT = Environment({}, {}, None, False, "k", "b", "x86_64-linux", 2)
#: Microseconds of a step.
TIMES = {"denoise/blocks/attention": 600, "denoise/blocks/feed_forward": 300, "denoise/embed": 50}
STEPS = 9


def space(times: Mapping[str, float], seed: int, noise: float = 0.02):
    """STEPS steps on a TPU's plane, each with an op a scope, whose time varies by `noise`."""
    made, draw = XSpace(), random.Random(seed)
    plane = made.planes.add(name="/device:TPU:0")
    plane.stat_metadata[1].name = "tf_op"
    steps, ops = plane.lines.add(name="Steps"), plane.lines.add(name="XLA Ops")
    for number, scope in enumerate(times, start=1):
        metadata = plane.event_metadata[number]
        metadata.name = f"fusion.{draw.randrange(999)}"  # names of ops differ between compilations
        metadata.stats.add(metadata_id=1, str_value=f"jit(step)/{scope}/dot_general")
    now = 0
    for step in range(STEPS):
        start = now
        for number, time_us in enumerate(times.values(), start=1):
            duration = round(time_us * 1e6 * draw.uniform(1 - noise, 1 + noise))
            ops.events.add(metadata_id=number, offset_ps=now, duration_ps=duration)
            now += duration
        plane.event_metadata[100 + step].name = str(step)
        steps.events.add(metadata_id=100 + step, offset_ps=start, duration_ps=now - start)
    return made


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., None]:
    """Writes a session of a run into tmp_path / "runs"."""

    def write(
        run: str, times: Mapping[str, float], seed: int, repeat: int = 1, part: str = "denoise", **changes
    ) -> None:
        values = {"label": Label.MEASURED, "device": "TPU v6 lite", "made_by": None, "config": {"seed": 1}}
        session = Session(run=run, part=part, repeat=repeat, environment=ENVIRONMENT, **{**values, **changes})
        made = space(times, seed)
        made.hostnames.append("vm")
        sessions.write_session(tmp_path / "runs", session, made)

    return write


def column(tmp_path: Path, run: str) -> Run:
    return resolve(run, tmp_path / "runs", tmp_path / "results")


def verdicts(tmp_path: Path, *runs: str) -> dict[str, str]:
    return {row.scope: row.verdicts[0] for row in rows_of([column(tmp_path, run) for run in runs])}


@pytest.mark.parametrize(("factor", "expected"), [(1.3, "slower"), (0.7, "faster")])
def test_a_planted_difference_is_found_in_its_scope_and_nowhere_else(write, tmp_path, factor, expected):
    for repeat in (1, 2, 3):
        write("a", TIMES, seed=repeat, repeat=repeat)
        write("b", TIMES | {"denoise/blocks/attention": 600 * factor}, seed=10 + repeat, repeat=repeat)
    assert verdicts(tmp_path, "a", "b") == {
        "denoise (step)": expected,
        "denoise (all ops)": expected,
        "denoise/blocks/attention": expected,
        "denoise/blocks/feed_forward": "noise",
        "denoise/embed": "noise",
    }
    row = next(
        row for row in rows_of([column(tmp_path, "a"), column(tmp_path, "b")]) if row.scope.endswith("attention")
    )
    assert row.ratios == (pytest.approx(factor, rel=0.02),)
    assert row.cells[0].median_s == pytest.approx(600e-6, rel=0.02)
    assert row.cells[0].count == 3 * (STEPS - 1)  # the first of each session is left out


def test_the_same_run_again_differs_nowhere(write, tmp_path):
    for seed in range(20):
        write("a", TIMES, seed=2 * seed)
        write("b", TIMES, seed=2 * seed + 1)
        found = set(verdicts(tmp_path, "a", "b").values())
        assert found == {"noise"}, seed


def test_what_varies_between_sessions_is_noise(write, tmp_path):
    slower = {scope: 1.2 * time for scope, time in TIMES.items()}
    write("a", TIMES, seed=1)
    write("b", slower, seed=2)
    assert set(verdicts(tmp_path, "a", "b").values()) == {"slower"}
    assert any("one session of a, b" in note for note in notes_of([column(tmp_path, "a"), column(tmp_path, "b")]))
    write("a", slower, seed=3, repeat=2)  # the machine was busy when it ran again
    assert set(verdicts(tmp_path, "a", "b").values()) == {"noise"}


def test_scopes_that_one_run_lacks(write, tmp_path):
    write("a", TIMES, seed=1)
    write("b", {scope: time for scope, time in TIMES.items() if scope != "denoise/embed"} | {"denoise/new": 20}, seed=2)
    found = verdicts(tmp_path, "a", "b")
    assert (found["denoise/embed"], found["denoise/new"]) == ("gone", "only here")


def test_depth_sums_the_scopes_below(write, tmp_path):
    write("a", TIMES, seed=1)
    rows = {row.scope: row.cells[0].median_s for row in rows_of([column(tmp_path, "a")], depth=2)}
    assert rows["denoise/blocks"] == pytest.approx(900e-6, rel=0.02)
    assert "denoise (step)" in rows and "denoise/embed" in rows


def test_few_steps_say_nothing():
    short = Run("a", Label.MEASURED, "cpu", None, ({"x": [1.0]},))
    other = Run("b", Label.MEASURED, "cpu", None, ({"x": [9.0, 9.0]},))
    assert rows_of([short, other])[0].verdicts == ("?",)
    assert any("too few to tell" in note for note in notes_of([short, other]))
    enough = (
        Run(name, Label.MEASURED, "cpu", None, ({"x": [time] * MIN_STEPS},)) for name, time in (("a", 1.0), ("b", 9.0))
    )
    assert rows_of(list(enough))[0].verdicts == ("slower",)


def test_measured_and_predicted_are_kept_apart(write, make_trial, tmp_path):
    write("a", TIMES, seed=1)
    trial = make_trial(
        ops=(_op("fusion.1", "jit(step)/denoise/blocks/attention/dot", 550e-6),), time_samples_ms=(0.55,)
    )
    path = tmp_path / "results" / "sweeps" / "s" / records.TRIALS_FILE
    jsonl.append(path, trial)
    for source in (trial.record_id[:8], f"{path}:{trial.record_id}", f"{path}:1", f"{path}:-1"):
        predicted = resolve(f"p={source}", tmp_path / "runs", tmp_path / "results")
        assert (predicted.name, predicted.label) == ("p", Label.PREDICTED)
        assert predicted.sessions[0]["denoise/blocks/attention"] == [550e-6]
    columns = [column(tmp_path, "a"), predicted]
    assert any("the prediction's error, not a speed-up" in note for note in notes_of(columns))
    assert predicted.title == "p (predicted by libtpu of unknown version, TPU v6 lite)"


def _op(name: str, scope: str, time_s: float) -> dict:
    return {"name": name, "scope": scope, "category": "kernel", "time_s": time_s, "start_s": 0.0, "calls": 1}


def run_command(monkeypatch, tmp_path: Path, *runs: str) -> int:
    folders = ["--logdir", str(tmp_path / "runs"), "--results-dir", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", ["compare", *runs, *folders])
    return compare.main()


def test_command_prints_saves_and_pairs(write, tmp_path, monkeypatch, capsys):
    for repeat in (1, 2):
        write("a", TIMES, seed=repeat, repeat=repeat)
        write("b", TIMES | {"denoise/embed": 90}, seed=10 + repeat, repeat=repeat)
    write("a", {"vae/decoder": 70}, seed=5, part="vae")
    assert run_command(monkeypatch, tmp_path, "a", "b") == 0
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("denoise/embed"))
    assert line.endswith("slower")
    assert "a (measured, TPU v6 lite); sessions: 2, steps: 16" in printed
    folder = tmp_path / "results" / "compare"
    with (folder / "a_vs_b.csv").open() as file:
        rows = {row["scope"]: row for row in csv.DictReader(file)}
    assert float(rows["denoise/embed"]["b.ratio"]) == pytest.approx(1.8, rel=0.05)
    assert rows["denoise/embed"]["b.verdict"] == "slower" and rows["vae/decoder"]["b.verdict"] == "gone"
    assert float(rows["denoise/embed"]["a.measured_s"]) == pytest.approx(50e-6, rel=0.05)
    saved = json.loads((folder / "a_vs_b.json").read_text())
    assert [run["label"] for run in saved["runs"]] == ["measured", "measured"]
    assert "| denoise/embed |" in (folder / "a_vs_b.md").read_text()
    # Both runs as hosts of one session, of the part that both have.
    pair = tmp_path / "runs" / "plugins" / "profile" / "a_vs_b-denoise"
    assert sorted(path.name for path in pair.iterdir()) == ["a.xplane.pb", "b.xplane.pb"]
    assert len(reader.read(pair / "b.xplane.pb").steps) == STEPS
    assert list(reader.parse(pair / "b.xplane.pb").hostnames) == ["b"]
    assert "run=a_vs_b-denoise&tag=trace_viewer@&hosts=a,b#profile" in printed
    assert "run=b-denoise.2&tag=overview_page&host=vm&base_session_id=a-denoise.2#profile" in printed
    assert "--host 127.0.0.1" in printed


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (("a", "nope"), "'nope': expected a run in .*there are: a"),
        (("a", "a"), "expected different names; name one: other=a"),
        (("a", "missing.jsonl:1"), "missing.jsonl: no such file"),
        (("a", "other="), "'other=': names no run; expected a name, a folder, a file, or LABEL=any of these"),
        (("a", ""), "'': names no run"),
        (("logdir=",), "logdir=: expected --logdir=VALUE; see --help"),
        (("a", "a", "results_dir=x"), "results_dir=x: expected --results-dir=x; see --help"),
        (("a", "a", "--output="), "argument --output: '': expected a folder; see --help"),
        (("a", "/"), "'/': a folder that holds no profile; expected one with \\*.xplane.pb in it"),
    ],
)
def test_errors_are_one_line(write, tmp_path, monkeypatch, capsys, runs, message):
    write("a", TIMES, seed=1)
    assert run_command(monkeypatch, tmp_path, *runs) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize("option", ["--logdir", "--results-dir"])
def test_an_empty_folder_is_not_the_one_it_runs_in(monkeypatch, capsys, option):
    monkeypatch.setattr("sys.argv", ["compare", "a", "b", f"{option}="])
    assert compare.main() == 2
    assert capsys.readouterr().err == f"error: argument {option}: '': expected a folder; see --help\n"


def test_a_folder_without_runs_is_one_line(tmp_path, monkeypatch, capsys):
    assert run_command(monkeypatch, tmp_path, "a", "b") == 2
    assert re.fullmatch(r"error: 'a': expected a run in .*runs \(there are: none\), .*\n", capsys.readouterr().err)


def test_a_trial_without_a_time_is_refused(make_trial, tmp_path):
    trial = make_trial(status=Status.WRONG)
    jsonl.append(tmp_path / "results" / records.TRIALS_FILE, trial)
    with pytest.raises(UserError, match="ended as wrong"):
        resolve(trial.record_id, tmp_path / "runs", tmp_path / "results")


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff", b'{"run": 1}'])
def test_a_folder_whose_description_is_broken_is_refused(write, tmp_path, content):
    write("a", TIMES, seed=1)
    folder = sessions.profile_dir(tmp_path / "runs") / "a-denoise"
    (folder / sessions.SESSION_FILE).write_bytes(content)
    with pytest.raises(
        UserError, match=r"session\.json: not the description of a session \(.*\); remove its folder"
    ) as error:
        column(tmp_path, str(folder))
    assert "\n" not in str(error.value)


def test_lines_that_hold_no_record_keep_their_numbers(make_trial, tmp_path):
    path = tmp_path / records.TRIALS_FILE
    ops = (_op("fusion.1", "jit(step)/attention/dot", 550e-6),)
    first, last = make_trial(ops=ops), make_trial(ops=ops, notes=("one\u2028line",))
    jsonl.append(path, first)
    broken = b'{"record_id": "to', b'{"a": "\xff"}', b"[1, 2]", b"null"
    path.write_bytes(path.read_bytes() + b"\n".join(broken) + b"\n")
    jsonl.append(path, last)
    for selector, trial in ((1, first), (6, last), (-1, last), (-6, first), (last.record_id, last)):
        assert resolve(f"{path}:{selector}", tmp_path, tmp_path).notes == trial.notes
    for selector, shown in ((2, '{"record_id": "to'), (3, '{"a": "\ufffd"}'), (4, "[1, 2]"), (-2, "null")):
        expected = f"{path}:{selector}: expected a JSON object on one line, got {shown!r}; name another record."
        with pytest.raises(UserError, match=f"^{re.escape(expected)}$"):
            resolve(f"{path}:{selector}", tmp_path, tmp_path)
    for selector, message in (("7", "the file has 6 lines"), ("--1", "0 begin so"), ("\u00b2", "0 begin so")):
        with pytest.raises(UserError, match=message):
            resolve(f"{path}:{selector}", tmp_path, tmp_path)


def test_repeats_of_other_code_are_said(write, tmp_path):
    write("a", TIMES, seed=1)
    write("a", TIMES, seed=2, repeat=2, config={"seed": 7})
    assert "its sessions differ in seed" in column(tmp_path, "a").notes


def test_a_record_of_the_pipelines_prediction(tmp_path):
    path = tmp_path / "predict.jsonl"
    breakdown_s = {"matmul": 0.5, "collective": 0.3}
    record = PredictionRecord(
        label=Label.PREDICTED,
        environment=ENVIRONMENT,
        request={},
        topology="v6e-8",
        plan=Plan("ulysses", 2, 4, "replicated"),
        step_time_s=0.8,
        stages={"denoise": StagePrediction(time_s=0.8, breakdown_s=breakdown_s, peak_hbm_bytes=1)},
        reported=None,
        notes=(),
    )
    jsonl.append(path, record)
    found = resolve(f"{path}:-1", tmp_path / "runs", tmp_path)
    assert found.name == "v6e-8-ulysses" and found.label is Label.PREDICTED
    assert found.sessions[0] == {
        "denoise (step)": [0.8],
        "denoise: kind matmul": [0.5],
        "denoise: kind collective": [0.3],
    }
