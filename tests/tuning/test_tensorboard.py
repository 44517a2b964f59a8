"""TensorBoard itself on what this project writes: its endpoints, asked as its pages ask them."""

import gzip
import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import PLENTY_S, wait_until
from splash_attn.types import BlockSizes
from splash_workbench.records import jsonl
from tuning import hparams
from tuning.compare import __main__ as compare
from tuning.traces import of_sweep
from tuning.trials import records
from tuning.trials.records import Trial

OPS = (
    {"name": "copy.1", "scope": "k", "category": "layout", "time_s": 1e-3, "start_s": 0.0, "calls": 1},
    {
        "name": "kernel.1",
        "scope": "jit(attention)/splash_attention/pallas_call",
        "category": "kernel",
        "time_s": 11.5e-3,
        "start_s": 1e-3,
        "calls": 1,
        "cycles": 20_000_000,
        "utilization": {"MATMUL": 0.75},
    },
)


@pytest.fixture(scope="module")
def logdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def trials(make_trial: Callable[..., Trial]) -> list[Trial]:
    blocks = [BlockSizes(128 * n, 512, 128) for n in (1, 2, 3)]
    return [make_trial(ops=OPS, block_sizes=block, time_samples_ms=(12.5 + n,)) for n, block in enumerate(blocks)]


@pytest.fixture
def ask(logdir: Path, trials: list[Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Asks a TensorBoard on a sweep's traces and a pair of its candidates: (path, query) -> the answer as JSON."""
    hparams.write(trials, logdir, "sweep-1")
    list(of_sweep.write(trials, logdir, top=2))
    for trial in trials:
        jsonl.append(tmp_path / records.TRIALS_FILE, trial)
    names = [f"{name}={trial.record_id}" for name, trial in zip("ab", trials, strict=False)]
    monkeypatch.setattr("sys.argv", ["compare", *names, "--logdir", str(logdir), "--results-dir", str(tmp_path)])
    assert compare.main() == 0
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
    log = tmp_path / "log"

    def output() -> str:
        return log.read_text(errors="replace")[-3000:]

    def address() -> re.Match[str] | None:
        assert server.poll() is None, output()
        return re.search(r"at (http://127\.0\.0\.1:\d+)/", output())

    with log.open("wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        found = wait_until(address, lambda: f"TensorBoard's address in {output()}")

        def ask(path: str, query: dict[str, str] | None = None, body: Any = None) -> Any:
            url = f"{found[1]}/data/plugin/{path}?{urllib.parse.urlencode(query or {})}"
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=PLENTY_S) as response:
                content = response.read()
                if response.headers.get("Content-Encoding") == "gzip":
                    content = gzip.decompress(content)
            return json.loads(content)

        yield ask
    finally:
        server.kill()
        server.wait(PLENTY_S)


PREDICTED = "predicted-tiny-v6e-128-512-128-fixed_bound-bfloat16-256-4"
PAIR = "predicted-a_vs_predicted-b"


@pytest.mark.compile
def test_profile_and_hparams(ask, trials):
    runs = ask("profile/runs")
    assert {PREDICTED, PAIR} <= set(runs)
    tools = ask("profile/run_tools", {"run": PREDICTED})
    assert {"trace_viewer@", "overview_page", "op_profile", "hlo_stats", "roofline_model"} <= set(tools)
    assert ask("profile/hosts", {"run": PREDICTED, "tag": "op_profile"}) == [{"hostname": "predicted"}]

    profile = ask("profile/data", {"run": PREDICTED, "tag": "op_profile", "host": "predicted"})
    assert profile["byProgram"]["metrics"]["flops"] == pytest.approx(0.75 * 20e6 / (12.5e-3 * 1.75e9), rel=1e-3)
    roofline = ask("profile/data", {"run": PREDICTED, "tag": "roofline_model", "host": "predicted"})
    assert "predicted by libtpu" in roofline[0]["p"]["device_type"]

    # Both of a pair on one time axis, each under its own name.
    hosts = ["predicted-a", "predicted-b"]
    assert ask("profile/hosts", {"run": PAIR, "tag": "trace_viewer@"}) == [{"hostname": host} for host in hosts]
    both = {"run": PAIR, "tag": "trace_viewer@", "hosts": ",".join(hosts)}
    events = ask("profile/data", both)["traceEvents"]
    planes = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    assert sorted(planes.values()) == [f"{host} /device:TPU:0" for host in hosts]
    kernels = [event for event in events if event.get("name") == "kernel.1" and event["ph"] == "X"]
    assert {event["pid"] for event in kernels} == set(planes)
    assert all(event["ts"] == pytest.approx(1000) for event in kernels)

    # The parameters as axes, the time as a metric that says how it was got.
    experiment = ask("hparams/experiment", body={"experimentName": ""})
    assert {"block_q", "block_kv", "block_kv_compute"} <= {info["name"] for info in experiment["hparamInfos"]}
    metric = {"name": {"tag": "attention ms (predicted)", "group": ""}}
    assert metric["name"]["tag"] in {info["name"]["tag"] for info in experiment["metricInfos"]}
    body = {
        "experimentName": "",
        "colParams": [
            {"hparam": "block_q", "includeInResult": True},
            {"metric": metric["name"], "includeInResult": True},
        ],
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_UNKNOWN", "STATUS_RUNNING"],
        "startIndex": 0,
        "sliceSize": 100,
    }
    groups = ask("hparams/session_groups", body=body)["sessionGroups"]
    found = {group["hparams"]["block_q"]: group["metricValues"][0]["value"] for group in groups}
    assert found == {128: 12.5, 256: 13.5, 384: 14.5}
