"""What engine=ray costs, beside this machine alone in the same run: `python benchmarks/engine.py [--max-trials 8]`.

Ray's nodes are processes of this machine, one CPU each, as many as it has cores: both engines have the same cores, so
the ratio of their rates is what the engine costs. The sweeps predict workload=tiny for a v6e, each candidate compiled
whole and none from a cache; they take turns.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from splash_attn.types import AttentionShape
from splash_workbench.engines.cluster import connected
from splash_workbench.engines.runner import ClusterRunner
from splash_workbench.engines.settings import EngineSettings
from splash_workbench.workers.pool import JOBS_PER_WORKER, Runner
from splash_workbench.workers.room import core_count
from tuning.backends.registry import BACKENDS
from tuning.search.settings import SweepSettings
from tuning.search.space import Space
from tuning.search.study import SearchSettings
from tuning.sweep import sweep
from tuning.trials.workloads import Workload

_JOB_COUNT = 40
_TIMEOUT_S = 600.0


def no_work(payload: dict[str, Any]) -> dict[str, Any]:
    """Return at once: what is timed is the way to a worker and back."""
    del payload
    return {}


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block took."""
    start = time.perf_counter()
    yield
    print(f"  {what:<58} {time.perf_counter() - start:8.2f} s", flush=True)


def job_times_s(runner: Runner) -> list[float]:
    """Return seconds of jobs that do nothing, one after the other; the first starts a worker."""
    times = []
    for _ in range(_JOB_COUNT):
        start = time.perf_counter()
        runner.run("engine:no_work", {}, timeout_s=_TIMEOUT_S)
        times.append(time.perf_counter() - start)
    return times


def make_settings(folder: Path, max_trials: int, engine: EngineSettings | None) -> SweepSettings:
    """Return a sweep of small programs, each compiled whole."""
    sizes = (128, 256, 512)
    return SweepSettings(
        workload=Workload("tiny", AttentionShape(1, 2, 1021, 1021, 64), "bfloat16"),
        device="v6e",
        backend=BACKENDS["offline"],
        measure={},
        search=SearchSettings("grid", max_trials),
        space=Space("tiny", {"block_q": sizes, "block_kv": sizes, "block_kv_compute": (128, 256)}),
        workers=core_count(),
        timeout_s=_TIMEOUT_S,
        vmem_pruning=True,
        results_dir=folder,
        cache=False,
        promote=False,
        progress=False,
        quick=False,
        engine=engine,
    )


def rate(max_trials: int, engine: EngineSettings | None) -> float:
    """Return candidates a minute of one sweep from nothing."""
    with tempfile.TemporaryDirectory() as folder:
        result = sweep(make_settings(Path(folder), max_trials, engine), report=lambda line: None)
    return 60 * result.evaluated_count / result.wall_time_s


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-trials", type=int, default=8, help="candidates of each sweep")
    parser.add_argument("--rounds", type=int, default=2, help="sweeps of each engine")
    options = parser.parse_args()
    where = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(where)  # of the workers, which import this file
    import ray
    from ray.cluster_utils import Cluster

    cores = core_count()
    print(f"{cores} cores; Ray {ray.__version__}, {cores} nodes of 1 CPU and a head without")
    with timed("start the cluster"):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(cores):
            cluster.add_node(num_cpus=1)
    engine = EngineSettings(cluster.address)
    with timed("connect to it"), connected(engine):
        pass
    with connected(engine) as connection, tempfile.TemporaryDirectory() as folder:
        alone = Runner(Path(folder), jobs_per_worker=JOBS_PER_WORKER)
        first, *rest = job_times_s(alone)
        alone.cancel()
        there_first, *there = job_times_s(ClusterRunner(connection, lambda payload: payload))
    print(f"  {'the first job, which starts a worker: alone, on a node':<58} {first:8.2f} s {there_first:8.2f} s")
    each = statistics.median(rest), statistics.median(there)
    print(f"  {'a job that does nothing: alone, on a node':<58} {each[0] * 1e3:7.2f} ms {each[1] * 1e3:7.2f} ms")
    rates: dict[str, list[float]] = {"local": [], "ray": []}
    for _ in range(options.rounds):
        for name, chosen in (("local", None), ("ray", engine)):
            rates[name].append(rate(options.max_trials, chosen))
            print(f"  engine={name:<6} {rates[name][-1]:6.1f} candidates a minute", flush=True)
    ratio = statistics.median(rates["ray"]) / statistics.median(rates["local"])
    print(f"  engine=ray has {ratio:.2f} times the rate of engine=local on the same cores")
    cluster.shutdown()


if __name__ == "__main__":
    main()
