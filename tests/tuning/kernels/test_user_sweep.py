"""Sweeps of a user's kernel: what the attention kernel has, it has."""

import concurrent.futures
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Outcome, Runner
from sweeps import quiet, user_config, with_job
from tuning import hparams, kernel_sweeps, sweep
from tuning.autotune import Best, autotune
from tuning.kernels import KernelError, loading, promoted
from tuning.search.kernel_settings import kernel_settings
from tuning.traces import of_sweep
from tuning.trials import heatmap, records, tables

pytestmark = pytest.mark.compile  # each starts worker processes

SCALED = f"{Path(__file__).with_name('scaled.py')}:Scaled"
KIND = "TPU v6 lite"
#: Too many for VMEM.
ROWS = 2**17


#: Of both sweeps of the six configurations.
GRID: dict[str, Any] = {"sampler": "grid", "max_trials": None, "workers": 1, "reuse": False, "progress": False}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Best[Any], Path, Path]:
    """A sweep of six configurations, predicted for a v6e: (the best, results, tuned entries)."""
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("user")
    kernel = loading.find(SCALED)
    best = autotune(
        kernel,
        kernel.Workload(rows=ROWS),
        promote=True,
        tuned_path=folder / "tuned.json",
        results_dir=folder / "results",
        **GRID,
    )
    return best, folder / "results", folder / "tuned.json"


def test_the_winner_was_compiled_whole_beside_its_estimate(tuned: tuple[Best[Any], Path, Path]) -> None:
    best, results, _ = tuned
    assert len(best.trials) == 6 and {trial.status for trial in best.trials} == {Status.OK}
    assert best.trial.compiled == "whole" and best.label == "predicted"
    assert best.trial.estimate_ms == pytest.approx(best.time_ms, rel=0.5)
    assert best.config.block == 64  # the fewest steps
    assert {trial.compiled for trial in best.trials} > {"whole"}
    assert best.trial.bound_ms is not None and best.trial.bound_ms < best.time_ms
    (path,) = results.rglob(records.TRIALS_FILE)
    of_64 = [trial for trial in records.read(path) if trial.tunables["block"] == 64]
    assert of_64[0].compiled == "shorter" and of_64[-1].compiled == "whole"
    assert of_64[0].cycles == pytest.approx(of_64[-1].cycles, rel=0.15)  # of a kernel that mostly starts and ends
    assert "add_first" in tables.table(best.trials)
    assert heatmap.draw(best.trials, ("add_first", "block")) is not None
    assert best.trial.numerics is not None and "block=64" in best.trial.numerics.config


def test_it_is_promoted_and_looked_up(tuned: tuple[Best[Any], Path, Path]) -> None:
    best, _, path = tuned
    kernel = loading.find(SCALED)
    assert best.promoted == "it beats the default configuration"
    found = promoted.lookup(kernel, kernel.Workload(rows=ROWS), device_kind=KIND, path=path)
    assert found == best.config
    assert promoted.lookup(kernel, kernel.Workload(rows=ROWS), device_kind="v6e", path=path) == best.config
    with pytest.raises(KernelError, match=r"tuned\.json: no entry of Scaled for \{'rows': 64\} on 'TPU v6 lite'"):
        promoted.lookup(kernel, kernel.Workload(rows=64), device_kind=KIND, path=path)
    with pytest.raises(KernelError, match=r"expected a workload of Sizes, got 3"):
        promoted.lookup(kernel, 3, device_kind=KIND, path=path)
    with pytest.raises(KernelError, match=r"expected a kernel, as Scaled\(\), got its class"):
        promoted.lookup(type(kernel), kernel.Workload(rows=ROWS), device_kind=KIND, path=path)
    default = kernel.Config()
    assert promoted.lookup(kernel, kernel.Workload(rows=64), device_kind=KIND, path=path, default=default) is default
    (entry,) = promoted.read(path)
    assert promoted.promote(path, dataclasses.replace(entry, time_ms=entry.time_ms * 2))[0] is False
    assert promoted.promote(path, dataclasses.replace(entry, time_ms=entry.time_ms * 2, source="other"))[0] is True


def test_an_entry_of_other_tunables_is_none(tuned: tuple[Best[Any], Path, Path], tmp_path: Path) -> None:
    kernel, default = loading.find(SCALED), loading.find(SCALED).Config()
    (entry,) = promoted.read(tuned[2])
    path = tmp_path / "tuned.json"
    promoted.promote(path, dataclasses.replace(entry, config={"rows_at_once": 8}))
    workload = kernel.Workload(rows=ROWS)
    assert promoted.lookup(kernel, workload, device_kind=KIND, path=path, default=default) is default
    with pytest.raises(KernelError, match=r"tuned\.json: \{'rows_at_once': 8\} is no configuration of Scaled as it is"):
        promoted.lookup(kernel, workload, device_kind=KIND, path=path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"block": "64", "add_first": False}, "is no configuration of Scaled as it is now"),
        ({"block": 64}, "is no configuration of Scaled as it is now"),
        ({"block": 48, "add_first": False}, r"is not valid \(block does not divide rows\)"),
    ],
)
def test_an_entry_that_the_kernel_would_not_take(
    tuned: tuple[Best[Any], Path, Path], tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    kernel, path = loading.find(SCALED), tmp_path / "tuned.json"
    (entry,) = promoted.read(tuned[2])
    promoted.promote(path, dataclasses.replace(entry, config=config))
    where: Any = {"device_kind": KIND, "path": path}
    with pytest.raises(KernelError, match=rf"tuned\.json: .* {reason}; tune it again, or give a default"):
        promoted.lookup(kernel, kernel.Workload(rows=ROWS), **where)
    default = kernel.Config()
    assert promoted.lookup(kernel, kernel.Workload(rows=ROWS), default=default, **where) is default
    promoted.promote(path, dataclasses.replace(entry, label="measured"))
    assert promoted.lookup(kernel, kernel.Workload(rows=ROWS), **where) == tuned[0].config
    with pytest.raises(KernelError, match=r"Scaled: default=\{'block': 8\}: expected a Config"):
        promoted.lookup(kernel, kernel.Workload(rows=ROWS), default={"block": 8}, **where)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_trials": "3"}, "max_trials='3': expected a whole number, or None"),
        ({"quick": "no"}, "quick='no': expected True or False"),
        ({"space": [8, 16]}, r"space=\[8, 16\]: expected a dict"),
        ({"space": {"block": "16"}}, r"space\['block'\]='16': expected a list of values"),
        ({"results_dir": None}, "results_dir=None: expected a folder"),
        ({"timeout_s": True}, "timeout_s=True: expected a number of seconds"),
    ],
)
def test_arguments_of_another_type_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^{message}\.$"):
        autotune(loading.find(SCALED), **options)


def test_a_class_is_no_kernel() -> None:
    with pytest.raises(UserError, match=r"^Scaled: expected a kernel, as Scaled\(\), got its class"):
        autotune(type(loading.find(SCALED)))  # type: ignore[arg-type]


def test_many_promote_at_once_and_none_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "tuned.json", promoted.read

    def read_slowly(path: Path) -> tuple[promoted.Entry, ...]:
        entries = read(path)
        time.sleep(0.01)  # long enough for another to write between
        return entries

    monkeypatch.setattr(promoted, "read", read_slowly)

    def promote_five(first: int) -> list[bool]:
        return [promoted.promote(path, _entry(rows))[0] for rows in range(first, first + 5)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert [*pool.map(promote_five, range(0, 20, 5))] == [[True] * 5] * 4
    assert sorted(entry.sizes["rows"] for entry in read(path)) == list(range(20))
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.json"]


def _entry(rows: int) -> promoted.Entry:
    return promoted.Entry("Scaled", KIND, {"rows": rows}, {"block": 8}, "predicted", 1.0, 2.0, "id", "source", "today")


def test_the_same_again_evaluates_nothing(tuned: tuple[Best[Any], Path, Path]) -> None:
    best, results, path = tuned
    kernel = loading.find(SCALED)
    (trials,) = results.rglob(records.TRIALS_FILE)
    before = trials.read_bytes()
    again = autotune(kernel, kernel.Workload(rows=ROWS), results_dir=results, tuned_path=path, **GRID)
    assert again.trial.record_id == best.trial.record_id and trials.read_bytes() == before


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run the command in an empty folder: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tuning.sweep", *arguments])
        code = sweep.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_command_checks_a_kernel_and_says_what_it_does(run: Run, tmp_path: Path) -> None:
    arguments = (f"kernel={SCALED}", "workload.rows=64", "space.block=[8,16]", "backend=interpret", "workers=1")
    code, out, err = run(*arguments, "search=grid", "json=out.json")
    assert code == 0, err
    assert "Scaled-rows64 on TPU v6 lite, backend interpret" in out
    assert "4/4 block=16" in err and ": ok" in err
    found = json.loads((tmp_path / "out.json").read_text())
    assert (found["candidates"], found["evaluated"], found["statuses"]) == (4, 4, {"ok": 4})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("kernel=absent.py:A",), "kernel=absent.py:A: there is no file absent.py"),
        ((f"kernel={SCALED}", "workload.columns=3"), "workload.columns: Scaled.Workload has rows"),
        ((f"kernel={SCALED}", "space.block=8"), "space.block=8: expected a list"),
        (
            (f"kernel={SCALED}", "space.block=[8,'16']"),
            "space.block='16': expected values of type int, as the kernel's own [8, 16, 64]",
        ),
        ((f"kernel={SCALED}", "space.block=[8.5]"), "space.block=8.5: expected values of type int"),
        ((f"kernel={SCALED}", "space.add_first=[0,1]"), "space.add_first=0: expected values of type bool"),
        (
            (f"kernel={SCALED}", "workload=tiny"),
            "workload=tiny: workloads with a name are splash_attn's; expected",
        ),
        ((f"kernel={SCALED}", "space=small"), "space=small: spaces with a name are splash_attn's; expected space.NAME"),
        ((f"kernel={SCALED}", "tuned="), "tuned='': expected a file, or null"),
        ((f"kernel={SCALED}", "heatmap=[block,rows]"), "heatmap=['block', 'rows']: expected two of block, add_first"),
        (
            (f"kernel={SCALED}", "workload.rows=12"),
            "Scaled, rows12: no candidate of space=Scaled can be valid: 6 block",
        ),
        ((f"kernel={SCALED}", "vmem_pruning=true"), "vmem_pruning: no such key"),
    ],
)
def test_a_mistake_is_one_line(run: Run, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("flops", r"Scaled\.flops\(Sizes\(rows=128\)\) returns -1: expected a number from 0, or None"),
        ("hbm_bytes", r"Scaled\.hbm_bytes\(Sizes\(rows=128\)\) returns 'many': expected a number from 0, or None"),
        (
            "reference",
            r"Scaled\.hbm_bytes\(Sizes\(rows=128\)\): ZeroDivisionError: integer division or modulo by zero$",
        ),
    ],
)
def test_what_a_bound_is_made_of_is_checked(method: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = loading.find(SCALED)
    wrong = {"flops": lambda self, workload: -1, "hbm_bytes": lambda self, workload: "many"}
    wrong["reference"] = lambda self, x: x * (1 // 0)
    monkeypatch.setattr(type(kernel), method, wrong[method])
    made = kernel_settings(kernel, user_config())
    with pytest.raises(UserError, match=message):
        kernel_sweeps.bound_ms(made, made.backend.find_target("v6e"))


def test_a_look_that_hangs_says_at_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "run", lambda *args, **options: Outcome(Status.TIMEOUT, {}, "killed", "", 1.0))
    with pytest.raises(
        UserError, match=r"look at its default configuration Config\(.*\): killed; give it a check_work"
    ):
        autotune(loading.find(SCALED), backend="interpret", results_dir=tmp_path, workers=1, progress=False)


def test_a_worker_lost_at_the_look_is_tried_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[str] = []

    def run(self: Runner, target: str, payload: dict[str, Any], **options: Any) -> Outcome:
        targets.append(target)
        return Outcome(Status.CRASHED, {}, "the worker died of SIGKILL", "", 1.0)

    monkeypatch.setattr(Runner, "run", run)
    message = r"Scaled: the look at its default configuration Config\(.*\): the worker died of SIGKILL\.$"
    with pytest.raises(UserError, match=message):
        autotune(loading.find(SCALED), backend="interpret", results_dir=tmp_path, workers=1, progress=False)
    assert targets == ["tuning.backends.preflight:look"] * 2


def test_sys_exit_in_a_kernel_does_not_end_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = loading.find(SCALED)
    made = kernel_settings(kernel, user_config())
    monkeypatch.setattr(type(kernel), "is_valid", lambda *args: sys.exit(0))
    with pytest.raises(KernelError, match=r"Scaled\.is_valid\(Config\(.*\): SystemExit: 0"):
        made.space.candidates(made.workload)
    monkeypatch.setattr(type(kernel), "flops", lambda *args: sys.exit("no"))
    with pytest.raises(UserError, match=r"Scaled\.flops\(.*\): SystemExit: no"):
        kernel_sweeps.bound_ms(made, made.backend.find_target("v6e"))


@pytest.mark.parametrize("content", [b"{", None])
def test_damaged_tuned_entries_are_refused_before_any_work(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tuned.json"
    path.mkdir() if content is None else path.write_bytes(content)
    kernel = loading.find(SCALED)
    options = GRID | {"results_dir": tmp_path / "results", "tuned_path": path, "promote": True}
    with pytest.raises(
        UserError, match=r"tuned\.json: unreadable tuned entries \(.*put them right, or remove the file"
    ):
        autotune(kernel, kernel.Workload(rows=ROWS), **options)
    assert not list(tmp_path.rglob(records.TRIALS_FILE))


def test_a_gpus_kernel_is_not_predicted() -> None:
    with pytest.raises(KernelError, match="GpuAttention is for a GPU: backend=offline predicts TPUs"):
        kernel_settings(_gpu(), user_config(backend="offline"))


@pytest.mark.parametrize(
    ("job", "status"),
    [("abort", Status.CRASHED), pytest.param("out_of_memory", Status.OUT_OF_MEMORY, marks=pytest.mark.slow("5 s"))],
)
def test_a_kernel_that_fails_costs_only_its_trial(tmp_path: Path, job: str, status: Status) -> None:
    made = kernel_settings(loading.find(SCALED), user_config(results_dir=str(tmp_path), max_trials=2))
    result = sweep.sweep(with_job(job, made), report=quiet)
    assert {trial.status for trial in result.trials} == {status}
    assert {trial.kernel for trial in result.trials} == {"Scaled"}


def test_a_wrong_kernel_ends_before_its_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALED_IS_WRONG", "1")
    with pytest.raises(UserError, match="disagrees with the reference"):
        autotune(loading.find(SCALED), backend="interpret", results_dir=tmp_path, workers=1, progress=False)
    assert not list(tmp_path.rglob(records.TRIALS_FILE))


def _gpu() -> Any:
    path = Path(__file__).parents[3] / "examples/kernels/gpu_attention.py"
    return loading.find(f"{path}:GpuAttention")


def test_a_candidate_that_writes_half_of_its_result_is_wrong(tmp_path: Path) -> None:
    """Which its check of other sizes does not show: it does less, and would win."""
    kernel = loading.find(SCALED.replace("Scaled", "Partly"))
    space = {"block": [8, 16], "add_first": [False, True]}
    options = GRID | {"backend": "interpret", "space": space, "results_dir": tmp_path}
    trials = autotune(kernel, kernel.Workload(rows=24), **options).trials
    assert {(t.variant["block"], t.status) for t in trials} == {(8, Status.OK), (16, Status.WRONG)}
    (error, *_) = {t.error for t in trials if t.error}
    assert error == "writes only 1 of the 2 blocks of float32[24,128] (rows=24)"


def test_its_trials_go_to_tensorboard(tuned: tuple[Best[Any], Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    best, _, _ = tuned
    lines = list(of_sweep.write([best.trial], tmp_path, top=1, kernel=SCALED))
    assert "predicted timeline" in lines[0]
    assert hparams.write(best.trials, tmp_path, "user").exists()


@pytest.mark.slow("10 s")  # as of the attention kernel, in test_sweep.py
def test_trouble_with_the_machine_is_no_fact_about_its_candidates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = with_job("short_of_something", kernel_settings(loading.find(SCALED), user_config(results_dir=str(tmp_path))))
    monkeypatch.setenv("FAKE_JOBS_SHORT_OF", "disk")
    first = sweep.sweep(made, report=quiet)
    assert {(trial.status, trial.conclusive) for trial in first.trials} == {(Status.CRASHED, False)}
    monkeypatch.delenv("FAKE_JOBS_SHORT_OF")
    second = sweep.sweep(made, report=quiet)
    assert {trial.status for trial in second.trials} == {Status.OK}
    assert {trial.key for trial in second.trials} == {trial.key for trial in first.trials}
    assert sweep.sweep(made, report=quiet).evaluated_count == 0
