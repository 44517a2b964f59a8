"""What is in deploy/ parses, has the fields its controllers require, and calls commands with keys that they have."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.requests.config import GenerateConfig
from splash_workbench.overrides import Keys, used_keys
from tuning.search.settings import SweepSchema

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"


def _checked(arguments: list[str]) -> None:
    """Raise UserError for a key that pipeline.generate does not have."""
    groups, free = ("model", "parallel", "engine"), ("engine.resources",)
    Keys(used_keys(GenerateConfig, ()), groups, ("stages", "lora"), free=free).checked(arguments)


@pytest.fixture(scope="module")
def job_set() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "jobset.yaml").read_text())


def test_the_job_set_has_what_its_controller_requires(job_set):
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", job_set["metadata"]["name"])
    assert set(job_set["spec"]) <= {"failurePolicy", "successPolicy", "replicatedJobs", "network", "startupPolicy"}
    (replicated,) = job_set["spec"]["replicatedJobs"]
    assert set(replicated) == {"name", "replicas", "template"}
    job = replicated["template"]["spec"]
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    assert job["backoffLimit"] == 0  # a host alone cannot begin again: all do
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert all(isinstance(variable["value"], str) for variable in container["env"])
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    width, height = map(int, topology.split("x"))
    assert width * height == job["completions"] * container["resources"]["limits"]["google.com/tpu"]


def test_the_job_set_calls_the_command_with_keys_that_it_has(job_set):
    (container,) = job_set["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "pipeline.generate"]
    assert "distributed.enabled=true" in container["args"]
    _checked(container["args"])


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())


def test_the_ray_job_has_what_its_controller_requires(ray_job):
    assert (ray_job["apiVersion"], ray_job["kind"]) == ("ray.io/v1", "RayJob")
    spec = ray_job["spec"]
    assert set(spec) <= {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"} | {
        "rayClusterSpec"
    }
    head, (workers,) = spec["rayClusterSpec"]["headGroupSpec"], spec["rayClusterSpec"]["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"} and head["rayStartParams"]["num-cpus"] == "0"
    names = {"groupName", "replicas", "minReplicas", "maxReplicas", "numOfHosts", "rayStartParams", "template"}
    assert set(workers) == names and workers["numOfHosts"] == 1  # a slice is of one host
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert all(isinstance(variable["value"], str) for variable in container["env"])
    pod = workers["template"]["spec"]
    width, height = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert str(width * height) == pod["containers"][0]["resources"]["limits"]["google.com/tpu"]


def test_the_ray_job_calls_commands_with_keys_that_they_have(ray_job):
    shell, option, script = shlex.split(ray_job["spec"]["entrypoint"])
    assert (shell, option) == ("bash", "-c")
    command = shlex.split(script.partition(" && ")[2])
    assert command[:3] == ["python", "-m", "pipeline.generate"] and "engine=ray" in command
    chips = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    assert f"engine.resources={{TPU:{chips['resources']['limits']['google.com/tpu']}}}" in command
    _checked(command[3:])
    (sweep,) = re.findall(r"python -m tuning\.sweep (.*)", (DEPLOY / "rayjob.yaml").read_text())
    Keys(used_keys(SweepSchema, ()), ("engine", "workload")).checked(shlex.split(sweep))


#: Stands for Slurm: srun starts two tasks, each on a node of its own.
_TOOLS = {
    "srun": 'shift\nfor id in 0 1; do SLURM_PROCID=$id SLURM_NTASKS=2 "$@" || exit; done',
    "scontrol": "echo node1; echo node2",
    "python3-that-shows": 'printf "%s|" "$@"; echo',
}


def _slurm(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run the script with the tools above; each line of stdout has the arguments of one process."""
    for name, script in _TOOLS.items():
        (folder / name).write_text(f"#!/bin/bash\n{script}\n")
        (folder / name).chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "2"}
    variables |= {"PYTHON": str(folder / "python3-that-shows"), "SHARED": "/shared"}
    command = ["bash", DEPLOY / "slurm.sbatch", *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_slurm_starts_a_process_on_each_host(tmp_path):
    done = _slurm(tmp_path, "pipeline.generate", "prompt=a cat, 'red'", "model=tiny")
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    for index, (_, module, *arguments) in enumerate(lines):
        assert module == "pipeline.generate" and arguments[:2] == ["prompt=a cat, 'red'", "model=tiny"]
        assert "distributed.coordinator=node1:8476" in arguments
        assert arguments[-2:] == ["distributed.num_processes=2", f"distributed.process_id={index}"]
        _checked(arguments)
    assert len(lines) == 2


def test_slurm_starts_sweeps_on_one_study_and_merges(tmp_path):
    done = _slurm(tmp_path, "tuning.sweep", "search.max_trials=9")
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    assert [line[-1] for line in lines] == [f"results_dir=/shared/results{end}" for end in ("-0", "-1", "")]
    assert all("search.storage=/shared/study.log" in line for line in lines)


def test_slurm_starts_ray_on_each_host(tmp_path):
    done = _slurm(tmp_path, "pipeline.generate", "prompts=a b.jsonl", "engine=ray", "engine.resources={TPU:8}")
    assert done.returncode == 0, done.stderr
    lines = [line.split("|")[:-1] for line in done.stdout.splitlines()]
    ray = ["-m", "ray.scripts.scripts", "symmetric-run", "--address", "node1:8476", "--min-nodes", "2", "--"]
    assert [line[:8] for line in lines] == [ray] * 2
    assert lines[0][8:] == [str(tmp_path / "python3-that-shows"), "-m", "pipeline.generate", *lines[0][11:]]
    assert lines[0][11:] == ["prompts=a b.jsonl", "engine=ray", "engine.resources={TPU:8}"]
    _checked(lines[0][11:])


def test_slurm_refuses_other_commands(tmp_path):
    done = _slurm(tmp_path, "tuning.results")
    assert done.returncode == 2 and "expected pipeline.generate or tuning.sweep" in done.stderr
