import dataclasses
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S
from splash_attn import tuned
from splash_workbench import provenance
from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from splash_workbench.workers.pool import Outcome, Runner
from sweeps import job_count, quiet, with_job
from tuning import passes
from tuning.backends import evaluate
from tuning.backends.registry import BACKENDS
from tuning.search.settings import SweepSettings
from tuning.search.space import Space
from tuning.search.study import SearchSettings
from tuning.sweep import sweep
from tuning.trials import heatmap, records, tables
from tuning.trials.promote import todays_choice

MakeSettings = Callable[..., SweepSettings]

pytestmark = pytest.mark.compile  # each sweep starts worker processes
#: Of fake_jobs.by_block_q.
HANGING_BLOCK_Q = 384


def test_grid_evaluates_every_candidate_once_and_finds_the_best(make_settings: MakeSettings) -> None:
    result = sweep(with_job("bowl", make_settings()), report=quiet)
    assert result.evaluated_count == len(result.trials) == len(result.candidates.valid) == 12
    assert len({trial.key for trial in result.trials}) == 12
    assert result.winner is not None and str(result.winner.block_sizes) == "384/512/128"
    on_disk = records.read(result.directory / records.TRIALS_FILE)
    assert {trial.record_id for trial in on_disk} == {trial.record_id for trial in result.trials}


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_search_repeats_nothing_and_goes_on_where_it_was(
    make_settings: MakeSettings, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_JOBS_LOG", str(log))

    def run(max_trials: int | None) -> int:
        settings = make_settings(search=SearchSettings(sampler=sampler, max_trials=max_trials, seed=1))
        result = sweep(with_job("bowl", settings), report=quiet)
        assert len({trial.key for trial in result.trials}) == len(result.trials) == (max_trials or 12)
        return result.evaluated_count

    assert run(5) == 5
    assert run(5) == 0
    assert run(None) == 7
    assert job_count(log) == 12


def test_another_study_of_the_same_context_takes_what_is_on_record(make_settings: MakeSettings) -> None:
    sweep(with_job("bowl", make_settings()), report=quiet)
    other = make_settings(search=SearchSettings(sampler="tpe", max_trials=6, seed=3))
    result = sweep(with_job("abort", other), report=quiet)
    assert result.evaluated_count == 0
    assert all(trial.status is Status.OK for trial in result.trials)


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_second_sweep_elsewhere_costs_nothing(
    make_settings: MakeSettings, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_JOBS_LOG", str(log))
    search = SearchSettings(sampler=sampler, max_trials=9, seed=1)
    first = sweep(with_job("bowl_of_uneven_speed", make_settings(search=search, reuse=True)), report=quiet)
    assert (first.evaluated_count, first.usage.job_count, job_count(log)) == (9, 9, 9)
    elsewhere = make_settings(search=search, reuse=True, results_dir=tmp_path / "elsewhere")
    second = sweep(with_job("bowl_of_uneven_speed", elsewhere), report=quiet)
    # The search asks for the same candidates, whichever worker was faster.
    assert {trial.key for trial in second.trials} == {trial.key for trial in first.trials}
    assert (second.evaluated_count, second.usage.job_count, job_count(log)) == (9, 0, 9)
    assert [trial.time_ms for trial in second.trials] == [trial.time_ms for trial in first.trials]
    assert all("from the cache" in trial.notes[-1] for trial in second.trials)
    effort = second.effort()
    assert (effort["from_cache"], effort["candidates_per_minute"]) == (9, None)
    one = SearchSettings(sampler="grid", max_trials=1, seed=1)
    off = dataclasses.replace(elsewhere, reuse=False, results_dir=tmp_path / "off", search=one)
    assert sweep(with_job("bowl", off), report=quiet).usage.job_count == 1


@pytest.fixture
def hang_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the job that never ends has little time: what becomes of the others depends on no clock."""
    run = Runner.run

    def run_in_time(self: Runner, target: str, payload: Mapping[str, Any], *, timeout_s: float, **rest: Any) -> Outcome:
        hangs = payload["block_sizes"]["block_q"] == HANGING_BLOCK_Q
        outcome = run(self, target, payload, timeout_s=0.5 if hangs else timeout_s, **rest)
        return dataclasses.replace(outcome, wall_time_s=timeout_s) if hangs else outcome

    monkeypatch.setattr(Runner, "run", run_in_time)


@pytest.mark.usefixtures("hang_times_out")
def test_only_what_would_come_again_is_cached(make_settings: MakeSettings, tmp_path: Path) -> None:
    choices = {"block_q": (128, 256, 384, 512, 1024), "block_kv": (256,), "block_kv_compute": (256,)}
    settings = make_settings(space=Space("fates", choices), workers=4, reuse=True)
    first = sweep(with_job("by_block_q", settings), report=quiet)
    assert first.usage.job_count == 5
    second = sweep(with_job("by_block_q", dataclasses.replace(settings, results_dir=tmp_path / "else")), report=quiet)
    fresh = {trial.status for trial in second.trials if not any("from the cache" in note for note in trial.notes)}
    assert fresh == {Status.TIMEOUT, Status.CRASHED}
    assert second.usage.job_count == 2
    assert {trial.key: trial.status for trial in first.trials} == {trial.key: trial.status for trial in second.trials}


def test_what_ran_out_of_time_is_tried_again_with_more(make_settings: MakeSettings, tmp_path: Path) -> None:
    space = Space("slow", {"block_q": (HANGING_BLOCK_Q,), "block_kv": (256,), "block_kv_compute": (256,)})
    settings = make_settings(space=space, timeout_s=0.5)
    assert sweep(with_job("by_block_q", settings), report=quiet).trials[0].status is Status.TIMEOUT
    assert sweep(with_job("by_block_q", settings), report=quiet).evaluated_count == 0
    again = sweep(with_job("bowl", dataclasses.replace(settings, timeout_s=PLENTY_S)), report=quiet)
    assert again.evaluated_count == 1 and again.winner is not None


@pytest.mark.parametrize("what", ["disk", "memory", "module", "compiler's memory", "all memory"])
def test_trouble_with_the_machine_is_no_fact_about_a_candidate(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    search = SearchSettings(sampler="tpe", max_trials=2, seed=0)
    settings = with_job("short_of_something", make_settings(search=search, reuse=True))
    monkeypatch.setenv("FAKE_JOBS_SHORT_OF", what)
    first = sweep(settings, report=quiet)
    assert {(trial.status, trial.conclusive) for trial in first.trials} == {(Status.CRASHED, False)}
    monkeypatch.delenv("FAKE_JOBS_SHORT_OF")
    second = sweep(settings, report=quiet)
    assert {(trial.status, trial.conclusive) for trial in second.trials} == {(Status.OK, True)}
    assert {trial.key for trial in second.trials} == {trial.key for trial in first.trials}
    assert sweep(settings, report=quiet).evaluated_count == 0


def _break(path: Path, content: bytes | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("content", [b"not a database, but a good many bytes of something else" * 9, None])
def test_a_broken_study_is_one_refusal(make_settings: MakeSettings, content: bytes | None) -> None:
    settings = with_job("bowl", make_settings(search=SearchSettings(sampler="grid", max_trials=1, seed=0)))
    directory = sweep(settings, report=quiet).directory
    _break(directory / "state" / "study.sqlite3", content)
    with pytest.raises(UserError, match=r"study\.sqlite3: this study cannot be read or written \(.*delete it"):
        sweep(settings, report=quiet)


def test_a_broken_record_is_one_refusal(make_settings: MakeSettings) -> None:
    settings = with_job("bowl", make_settings(search=SearchSettings(sampler="grid", max_trials=1, seed=0)))
    path = sweep(settings, report=quiet).directory / records.TRIALS_FILE
    path.write_text(path.read_text().replace('"time_samples_ms":[', '"time_samples_ms":[-').replace(": [", ": [-", 1))
    with pytest.raises(UserError, match=r"trials\.jsonl:1: not a Trial"):
        sweep(settings, report=quiet)


def test_a_results_folder_that_cannot_be_written_is_one_refusal(make_settings: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", Path("/proc/results")):
        with pytest.raises(UserError, match=r"results_dir=.*: cannot write .* to .*; name another folder"):
            sweep(with_job("bowl", make_settings(results_dir=folder)), report=quiet)


def test_a_disk_too_small_for_so_many_workers_names_them(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    for workers, amount, end in ((1000, "1,000 MiB", ", or fewer workers= than 1000"), (1, "1 MiB", "")):
        message = rf"^results_dir=.*: cannot write {amount} to .*; make room there, or name another folder{end}\.$"
        with pytest.raises(UserError, match=message):
            sweep(with_job("bowl", make_settings(workers=workers)), report=quiet)


def test_a_disk_that_fills_up_ends_the_sweep_at_once(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(option: str, folder: Path, byte_count: int = 1) -> None:
        raise UserError(f"{option}: cannot write to {folder} (No space left on device); make room there.")

    monkeypatch.setattr(passes, "require_writable", full)
    monkeypatch.setenv("FAKE_JOBS_SHORT_OF", "disk")
    settings = with_job("short_of_something", make_settings(workers=1))
    with pytest.raises(UserError, match="No space left on device"):
        sweep(settings, report=quiet)
    (path,) = settings.results_dir.rglob(records.TRIALS_FILE)
    assert [trial.status for trial in records.read(path)] == [Status.CRASHED]


def test_damaged_tuned_entries_are_one_refusal(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tuned.USER_VARIABLE, str(tmp_path))
    settings = with_job("bowl", make_settings(promote=True))
    for content in ("", "{", '{"schema_version": 1, "device_kind": "TPU v6 lite", "entries": [3]}'):
        (tmp_path / "tpu_v6_lite.json").write_text(content)
        with pytest.raises(UserError, match=r"tpu_v6_lite\.json: unreadable tuned entries \(.*or remove the file"):
            sweep(settings, report=quiet)
    assert not list(settings.results_dir.rglob(records.TRIALS_FILE))


def test_a_cache_that_cannot_write_costs_nothing(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()
    monkeypatch.setenv(provenance.CACHE_VARIABLE, str(tmp_path / "cache"))
    lines: list[str] = []
    result = sweep(with_job("bowl", make_settings(reuse=True)), report=lines.append)
    assert len(result.trials) == 12 and result.winner is not None
    assert "cannot write to" in lines[-1]


def test_measured_times_are_never_cached(make_settings: MakeSettings, tmp_path: Path, cache_folder: Path) -> None:
    search = SearchSettings(sampler="grid", max_trials=2, seed=0)
    settings = make_settings(device="local", backend=BACKENDS["measure"], workers=1, reuse=True, search=search)
    assert sweep(with_job("bowl", settings), report=quiet).usage.job_count == 2
    settings = dataclasses.replace(settings, results_dir=tmp_path / "elsewhere")
    assert sweep(with_job("bowl", settings), report=quiet).usage.job_count == 2
    assert not list(cache_folder.rglob("*.json"))


def test_first_candidates_come_first(make_settings: MakeSettings) -> None:
    first = ({"block_q": 384, "block_kv": 256, "block_kv_compute": 256}, {"block_q": 256, "block_kv": 512})
    space = Space("test", {"block_q": (128, 256, 384), "block_kv": (256, 512), "block_kv_compute": (128, 256)}, first)
    settings = make_settings(space=space, search=SearchSettings(sampler="tpe", max_trials=2, seed=0))
    result = sweep(with_job("bowl", settings), report=quiet)
    assert {str(trial.block_sizes) for trial in result.trials} == {"384/256/256", "256/512/128"}


@pytest.mark.parametrize(("promote", "count"), [(False, 12), (True, 13), ("shipped", 13)])
def test_what_would_run_today_is_evaluated_too(make_settings: MakeSettings, promote: bool | str, count: int) -> None:
    settings = with_job("bowl", make_settings(promote=promote))
    result = sweep(settings, report=quiet)
    assert (len(result.trials), result.evaluated_count) == (12, count)
    assert result.winner is not None
    trials = records.read(result.directory / records.TRIALS_FILE)
    choice = todays_choice(result.winner)
    assert choice is not None
    assert [trial.block_sizes for trial in trials[12:]] == [choice.block_sizes] * (count - 12)
    assert sweep(settings, report=quiet).evaluated_count == 0


@pytest.mark.usefixtures("hang_times_out")
def test_every_fate_is_recorded_and_only_ok_can_win(make_settings: MakeSettings, tmp_path: Path) -> None:
    choices = {"block_q": (128, 256, 384, 512, 640, 768, 896, 1024), "block_kv": (256,), "block_kv_compute": (256,)}
    settings = make_settings(space=Space("fates", choices), workers=4)
    result = sweep(with_job("by_block_q", settings), report=quiet)
    fates = {trial.block_sizes.block_q: trial.status for trial in result.trials if trial.block_sizes}
    assert fates == {
        128: Status.WRONG,
        256: Status.OUT_OF_MEMORY,
        HANGING_BLOCK_Q: Status.TIMEOUT,
        512: Status.CRASHED,
        640: Status.CRASHED,
        768: Status.CRASHED,
        896: Status.CRASHED,
        1024: Status.OK,
    }
    assert all(trial.time_ms is None for trial in result.trials if trial.status is not Status.OK)
    assert result.winner is not None and result.winner.block_sizes is not None
    assert result.winner.block_sizes.block_q == 1024
    table = tables.table(result.trials)
    assert all(status.value in table for status in set(fates.values()))
    assert heatmap.draw(result.trials) is not None


def test_compiler_options_are_on_record_and_make_a_context_of_their_own(make_settings: MakeSettings) -> None:
    without = sweep(with_job("bowl", make_settings()), report=quiet)
    options = {"xla_tpu_scoped_vmem_limit_kib": "65536"}
    settings = with_job("bowl", make_settings())
    timed = dataclasses.replace(settings.backend, timed=True)
    said: list[str] = []
    result = sweep(dataclasses.replace(settings, backend=timed, compiler_options=options), report=said.append)
    assert {tuple(trial.compiler_options.items()) for trial in result.trials} == {tuple(options.items())}
    assert result.directory != without.directory
    assert "compiler options: xla_tpu_scoped_vmem_limit_kib=65536" in said
    with pytest.raises(ValueError, match="compiler_options: expected none with backend=interpret"):
        dataclasses.replace(settings, compiler_options=options)


def test_two_sweeps_of_one_context_do_not_mix(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = with_job("bowl", make_settings(search=SearchSettings(sampler="grid", max_trials=1, seed=0)))
    with pytest.raises(UserError, match="another sweep"):
        sweep(settings, report=lambda line: sweep(settings, report=quiet))


def test_a_changed_kernel_starts_afresh(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_settings(search=SearchSettings(sampler="grid", max_trials=2, seed=0))
    first = sweep(with_job("bowl", settings), report=quiet)
    monkeypatch.setattr(provenance, "source_hash", lambda patterns: "another")
    monkeypatch.setattr(evaluate, "source_hash", lambda patterns: "another")
    second = sweep(with_job("bowl", settings), report=quiet)
    assert second.evaluated_count == 2
    assert first.directory != second.directory


def test_a_kernel_that_changes_during_the_sweep_ends_it(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "source_hash", lambda patterns: "edited meanwhile")
    with pytest.raises(UserError, match=r"splash_attn/kernel\.py.*changed while this ran"):
        sweep(with_job("bowl", make_settings()), report=quiet)
    assert not list(make_settings().results_dir.rglob(records.TRIALS_FILE))


def test_measure_refuses_a_device_that_is_not_here() -> None:
    with pytest.raises(UserError, match=r"device=v6e backend=measure: the device here is 'cpu'"):
        BACKENDS["measure"].find_target("v6e")
    assert BACKENDS["measure"].find_target("local").device_kind == "cpu"


def test_offline_needs_a_named_device() -> None:
    with pytest.raises(UserError, match="device='local': expected one of v6e, v5e, v5p, v7x"):
        BACKENDS["offline"].find_target("local")
