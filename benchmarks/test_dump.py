"""How fast the schedule of a TPU that is not here is read: our reader beside the bare splitting of the same text."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offline_tpu import worker_environment
from offline_tpu.dump import Dump
from offline_tpu.machine import devices
from offline_tpu.machine.constants import core_timing
from splash_workbench.provenance import REPO_ROOT

DEVICE = devices.by_name("v6e")
#: Compiles the kernel for a v6e; libtpu then leaves its schedule in the folder that the environment names.
PROGRAM = """
import functools
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
from splash_attn import BlockSizes, Variant, attention

topology = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4")
mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
call = functools.partial(
    attention, implementation="pallas_tpu", block_sizes=BlockSizes(1024, 1024, 256), variant=Variant(softmax="online")
)
call = jax.shard_map(call, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
q = jax.ShapeDtypeStruct((1, 2, 4096, 64), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
with jax.set_mesh(mesh):
    jax.jit(call).lower(q, q, q).compile()
"""


@pytest.fixture(scope="module")
def dump_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dump")
    variables = os.environ | worker_environment(DEVICE, folder) | {"PYTHONPATH": str(REPO_ROOT)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def split_lines(folder: Path) -> int:
    """Reads every file and splits it: what no reader can do without."""
    return sum(len(path.read_text().splitlines()) for path in sorted(folder.iterdir()) if path.is_file())


def read_schedules(folder: Path) -> float:
    """Reads the module and the schedule of each of its ops, and runs them: cycles of one call of each."""
    dump = Dump(folder, timing=core_timing(DEVICE), grid_sizes={})
    found = (dump.schedule(name, op) for name, ops in dump.module.computations.items() for op in ops)
    return sum(schedule.cycles + schedule.stall_cycles for schedule in found if schedule is not None)


READERS = {"split into lines": split_lines, "Dump and schedules": read_schedules}


@pytest.mark.parametrize("name", READERS)
def test_dump(beside: Callable[..., Any], dump_dir: Path, name: str) -> None:
    lines = split_lines(dump_dir)
    result = beside(
        lambda: READERS[name](dump_dir),
        group=f"schedule dump, {lines:,} lines",
        name=name,
        baseline=name == "split into lines",
        rounds=20,
        amount=lines,
        unit="lines",
    )
    assert result > 1000
