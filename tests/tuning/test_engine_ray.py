"""Sweeps on the nodes of a Ray cluster: nodes that die, drivers that die, nodes that are not alike."""

import dataclasses
import json
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_jobs import on_any_node, on_no_node
from helpers import PLENTY_S, environment_with_repo, wait_until
from ray_nodes import ray_nodes
from splash_workbench.engines.cluster import connected
from splash_workbench.engines.runner import ClusterRunner
from splash_workbench.engines.settings import EngineSchema, EngineSettings, engine_from
from splash_workbench.errors import UserError
from splash_workbench.trial_status import Status
from sweeps import quiet, with_job
from tuning import kernel_sweeps
from tuning.backends.measure import MEASURE
from tuning.kernels import loading
from tuning.on_nodes import OnNode, shipped_files
from tuning.search.settings import SweepSettings
from tuning.search.space import Space
from tuning.search.study import SearchSettings
from tuning.sweep import SweepResult, sweep
from tuning.trials import records
from tuning.trials.records import Trial, best_of

MakeSettings = Callable[..., SweepSettings]
SPACE_OF_24 = Space(
    "24", {"block_q": (128, 256, 384, 512), "block_kv": (256, 512, 768), "block_kv_compute": (128, 256)}
)


@pytest.mark.compile
def test_a_sweep_on_a_cluster_is_that_of_one_machine(make_settings: MakeSettings, tmp_path: Path) -> None:
    """A job whose process is lost is run again; what never ends well is a crash, and what a node lacks one line."""
    with ray_nodes(2, FAKE_JOBS_LOST=str(tmp_path / "lost")) as nodes:
        engine, said = EngineSettings(nodes.address, retries=1), []
        settings = with_job("bowl_that_is_lost_once", make_settings(engine=engine, workers=0))
        on_cluster = sweep(settings, report=said.append)
        assert any("2 at once (2 Ray nodes with 2 CPUs)" in line for line in said), said
        with connected(engine) as cluster:
            outcome = ClusterRunner(cluster, on_any_node).run("fake_jobs:lost", {}, timeout_s=PLENTY_S)
            with pytest.raises(UserError, match="this node is not fit"):
                ClusterRunner(cluster, on_no_node).run("fake_jobs:bowl", {}, timeout_s=PLENTY_S)
            cluster.settings = dataclasses.replace(engine, num_cpus=3)
            with pytest.raises(UserError, match="engine=ray: none of 2 Ray nodes with 2 CPUs has CPU 3"):
                cluster.require_room()
    assert (tmp_path / "lost").exists()
    assert outcome.status is Status.CRASHED and str(outcome.error).startswith("lost with its node 2 times: ")
    alone = sweep(with_job("bowl", make_settings(results_dir=tmp_path / "alone")), report=quiet)
    assert _what_counts(on_cluster) == _what_counts(alone) and len(alone.trials) == 12
    assert on_cluster.evaluated_count == on_cluster.usage.job_count == 12


def _what_counts(result: SweepResult) -> list[Any]:
    return [(trial.key, trial.context, trial.status, trial.time_ms) for trial in result.trials]


_SWEEP = """
import pickle, sys
from tuning.sweep import sweep
if __name__ == "__main__":
    sweep(pickle.load(open(sys.argv[1], "rb")), report=lambda line: None)
"""


def _start(settings: SweepSettings, folder: Path) -> subprocess.Popen:
    path = folder / "settings.pickle"
    path.write_bytes(pickle.dumps(settings))
    return subprocess.Popen([sys.executable, "-c", _SWEEP, str(path)], env=environment_with_repo())


@pytest.mark.slow("1 min")
def test_a_node_and_then_the_driver_are_killed(make_settings: MakeSettings, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ray_nodes(1, 1, 1, FAKE_JOBS_LOG=str(log)) as nodes:
        made = make_settings(space=SPACE_OF_24, engine=EngineSettings(nodes.address), workers=3)
        settings = with_job("slow_bowl", made)
        driver = _start(settings, tmp_path)
        recorded = _waiting_for_records(settings, driver)
        recorded(6)
        nodes.kill_9(1)
        recorded(12)
        driver.send_signal(signal.SIGKILL)
        driver.wait(PLENTY_S)
        before, begun = recorded(12), log.read_text().splitlines()
        assert len(before) < 24
        assert _start(settings, tmp_path).wait(PLENTY_S) == 0
        after = recorded(24)
    assert [trial.record_id for trial in after[: len(before)]] == [trial.record_id for trial in before]
    assert len({trial.key for trial in after}) == len({trial.record_id for trial in after}) == len(after) == 24
    begun_later = {json.dumps(json.loads(line)) for line in log.read_text().splitlines()[len(begun) :]}
    assert not begun_later & {json.dumps(dataclasses.asdict(trial.block_sizes)) for trial in before}
    # One was lost with its node, and those that ran when the driver died.
    assert len(log.read_text().splitlines()) <= 24 + 1 + 3
    alone = sweep(with_job("bowl", make_settings(space=SPACE_OF_24, results_dir=tmp_path / "alone")), report=quiet)
    best = best_of(after)
    assert best is not None and alone.winner is not None and best.key == alone.winner.key


def _waiting_for_records(settings: SweepSettings, driver: subprocess.Popen) -> Callable[[int], list[Trial]]:
    """Return a function that waits for so many records, and returns all that are there."""

    def read() -> list[Trial]:
        return [t for path in settings.results_dir.glob(f"sweeps/*/{records.TRIALS_FILE}") for t in records.read(path)]

    def recorded(count: int) -> list[Trial]:
        wait_until(lambda: len(read()) >= count, f"{count} records")
        return read()

    return recorded


def test_a_node_without_the_kernels_file_gets_a_copy(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COGVIDEOX_SPLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    there = tmp_path / "there"
    there.mkdir()
    shutil.copy(Path(__file__).parent / "kernels" / "scaled.py", there / "mine.py")
    (there / "beside.py").write_text("ROWS = 8\n")
    (there / "mine.py").write_text((there / "mine.py").read_text() + "\nimport beside  # noqa: E402\n")
    settings = make_settings()
    source = f"{there / 'mine.py'}:Scaled"
    captured = dataclasses.replace(
        settings.backend.capture(settings.backend.sources), kernel_hash=loading.hash_of(source)
    )
    on_node = pickle.loads(pickle.dumps(OnNode(settings.backend, captured, source, shipped_files(source), keep=True)))
    payload = {"kernel": source, "cache_dir": "/of/the/driver", "more": 1}
    expected = {"kernel": source, "cache_dir": str(tmp_path / "cache/tuning/numerics"), "more": 1}
    assert on_node(payload) == expected
    (there / "beside.py").write_text("ROWS = 16\n")  # another version of it
    copy = on_node(payload)["kernel"]
    shutil.rmtree(there)
    assert on_node(payload)["kernel"] == copy != source
    assert loading.hash_of(copy) == captured.kernel_hash and type(loading.find(copy)).__name__ == "Scaled"


@pytest.mark.parametrize("what", ["jax", "the sources of the backend", "the sources of splash_attn"])
def test_a_node_that_is_not_like_the_driver_is_refused(make_settings: MakeSettings, what: str) -> None:
    settings = make_settings()
    captured = kernel_sweeps.capture(settings)
    changes: dict[str, Any] = {"versions": captured.versions | {"jax": "0.1"}}
    if what != "jax":
        changes = {"kernel_hash" if "splash" in what else "backend_hash": "0.1"}
    driver = dataclasses.replace(captured, **changes)
    with pytest.raises(UserError, match=rf"engine=ray: node \S+ has {what} \S+, the driver 0.1; expected the same"):
        OnNode(settings.backend, driver, None, {}, keep=False)({})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "ray", "address": " "}, "engine.address='': expected HOST:PORT"),
        ({"name": "ray", "num_cpus": 0.0}, "engine.num_cpus=0: expected more than 0"),
        ({"name": "ray", "retries": -1}, "engine.retries=-1: expected 0 to 100"),
        ({"name": "ray", "slices": 0}, "engine.slices=0: expected 1 to 10000"),
        ({"name": "ray", "resources": {"TPU": True}}, "engine.resources.TPU=True: expected a number"),
        ({"name": "ray", "resources": {"CPU": 1}}, "engine.resources.CPU: expected engine.num_cpus"),
        ({"retries": 1}, "engine.retries=1: expected engine=ray beside it"),
        ({"name": "dask"}, "engine.name='dask': expected local or ray"),
    ],
)
def test_bad_engines_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        engine_from(EngineSchema(**given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": MEASURE, "workers": 1}, "engine=ray: expected backend=offline or interpret, got measure"),
        ({"search": SearchSettings("grid", storage="x")}, "engine=ray and search.storage: expected one of them"),
        ({"engine": EngineSettings(slices=2)}, "engine.slices=2: it is of pipeline.generate"),
    ],
)
def test_what_a_cluster_is_not_for(changes: dict[str, Any], message: str, make_settings: MakeSettings) -> None:
    with pytest.raises(ValueError, match=message):
        make_settings(**({"engine": EngineSettings(), "quick": False} | changes))
