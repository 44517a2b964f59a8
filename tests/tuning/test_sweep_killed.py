"""Sweeps that die: what is on record stays, nothing runs twice, and no worker is left."""

import dataclasses
import json
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers import PLENTY_S, environment_with_repo, wait_until
from sweeps import job_count, quiet, user_config, with_job
from tuning.kernels import loading
from tuning.search.kernel_settings import kernel_settings
from tuning.search.settings import SweepSettings
from tuning.search.study import SearchSettings
from tuning.sweep import sweep
from tuning.trials import records

MakeSettings = Callable[..., SweepSettings]


pytestmark = pytest.mark.compile  # each sweep starts worker processes


_SWEEP_TO_KILL = """
import pickle, sys
from tuning.kernels import loading
from tuning.sweep import sweep
if __name__ == "__main__":
    for source in sys.argv[2:]:
        loading.find(source)  # its module, which the settings name
    settings = pickle.load(open(sys.argv[1], "rb"))
    sweep(settings, report=lambda line: None)
"""


@pytest.fixture(
    params=["tpe", *(pytest.param(it, marks=pytest.mark.slow("6 s")) for it in ("grid", "grid of a user's kernel"))]
)
def settings(request: pytest.FixtureRequest, make_settings: MakeSettings, tmp_path: Path) -> SweepSettings:
    """Of sweeps with so many candidates: 12, 12 and 6."""
    sampler, _, whose = request.param.partition(" of ")
    search = SearchSettings(sampler=sampler, max_trials=None, seed=0)
    attention = make_settings(search=search)
    if not whose:
        return attention
    kernel = loading.find(f"{Path(__file__).with_name('kernels') / 'scaled.py'}:Scaled")
    return kernel_settings(kernel, user_config(results_dir=str(tmp_path / "results"), search=search))


def test_kill_9_loses_nothing_and_repeats_nothing(
    settings: SweepSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, settings_path = tmp_path / "log", tmp_path / "settings.pickle"
    settings_path.write_bytes(pickle.dumps(with_job("bowl", settings)))
    monkeypatch.setenv("FAKE_JOBS_LOG", str(log))
    monkeypatch.setenv("FAKE_JOBS_HANG_AFTER", "5")
    process = subprocess.Popen(
        [sys.executable, "-c", _SWEEP_TO_KILL, str(settings_path), *filter(None, [settings.source])],
        env=environment_with_repo(),
    )
    trials_glob = "sweeps/*/" + records.TRIALS_FILE

    def four_are_recorded() -> bool:
        assert process.poll() is None, "the sweep ended before it was killed"
        return any(len(p.read_text().splitlines()) >= 4 for p in settings.results_dir.glob(trials_glob))

    wait_until(four_are_recorded, "four records")
    process.send_signal(signal.SIGKILL)
    process.wait(PLENTY_S)
    (records_path,) = settings.results_dir.glob(trials_glob)
    before = records.read(records_path)
    assert 4 <= len(before) <= 5
    monkeypatch.delenv("FAKE_JOBS_HANG_AFTER")

    result = sweep(with_job("bowl", settings), report=quiet)

    after = records.read(records_path)
    assert [trial.record_id for trial in after[: len(before)]] == [trial.record_id for trial in before]
    count = 12 if settings.source is None else 6
    assert len({trial.key for trial in after}) == len(after) == len(result.trials) == count
    assert result.evaluated_count == count - len(before)
    runs = [json.loads(line) for line in log.read_text().splitlines()]
    for trial in before:
        options = trial.variant if trial.block_sizes is None else dataclasses.asdict(trial.block_sizes)
        assert runs.count(options) == 1
    assert not (result.directory / "state" / "work").exists()


def test_workers_die_with_a_killed_sweep(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, settings_path = tmp_path / "log", tmp_path / "settings.pickle"
    settings = make_settings()
    settings_path.write_bytes(pickle.dumps(with_job("bowl", settings)))
    monkeypatch.setenv("FAKE_JOBS_LOG", str(log))
    monkeypatch.setenv("FAKE_JOBS_HANG_AFTER", "0")
    process = subprocess.Popen([sys.executable, "-c", _SWEEP_TO_KILL, str(settings_path)], env=environment_with_repo())

    def two_jobs_run() -> bool:
        assert process.poll() is None
        return job_count(log) == 2

    wait_until(two_jobs_run, "two jobs")
    workers = _worker_pids(settings.results_dir)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)
    process.wait(PLENTY_S)
    wait_until(lambda: not _worker_pids(settings.results_dir), "the end of the workers")
    assert not [p for work in settings.results_dir.glob("sweeps/*/state/work") for p in work.iterdir()]


def _worker_pids(results_dir: Path) -> list[int]:
    """Worker processes whose folder lies under a results folder."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if "splash_workbench.workers.worker" in command and str(results_dir) in command:
                pids.append(int(entry.name))
    return pids


def test_record_written_but_not_told_is_not_run_again(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Death between the record and the study, the narrowest place to die in."""
    from tuning.search import study

    settings = make_settings(search=SearchSettings(sampler="tpe", max_trials=None, seed=0), workers=1)

    def die(*arguments: object) -> None:
        raise SystemError("as if killed")

    with monkeypatch.context() as patched:
        patched.setattr(study.Search, "tell", die)
        with pytest.raises(SystemError):
            sweep(with_job("bowl", settings), report=quiet)
    (path,) = settings.results_dir.rglob(records.TRIALS_FILE)
    recorded_count = len(records.read(path))  # what was asked ahead may be among them
    assert recorded_count >= 1
    result = sweep(with_job("bowl", settings), report=quiet)
    assert result.evaluated_count == 12 - recorded_count
    assert len(result.trials) == 12
