"""Compiles a function for a TPU that is not here, and turns what the compiler wrote down into a prediction."""

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from splash_attn.device import DeviceSpec
from tuning.offline.cost import Prediction, predict_from_dump

#: The libtpu whose dump format `schedule.py` reads. The flags and files are undocumented and change between releases.
SUPPORTED_LIBTPU = "0.0.52"

_DUMP_FLAG = re.compile(r"--xla_jf_dump_to=(\S+)")


def worker_environment(device: DeviceSpec, dump_dir: Path) -> dict[str, str]:
    """Variables that a process needs before libtpu loads, to compile for `device` and dump schedules to `dump_dir`.

    Only the passes that `schedule.py` reads are dumped: a hundredth of the whole dump's bytes.
    """
    return {
        "JAX_PLATFORMS": "cpu",
        "TPU_ACCELERATOR_TYPE": device.accelerator_type,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
        "TPU_MIN_LOG_LEVEL": "3",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": (
            f"--xla_jf_dump_to={dump_dir} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=^final_(bundles|hlo-static-per-bundle-utilization)$"
        ),
    }


def predict(
    fn: Callable[..., Any],
    *args: jax.ShapeDtypeStruct,
    device: DeviceSpec,
    mesh: Mesh | None = None,
    grid_sizes: Mapping[str, int] | None = None,
) -> Prediction:
    """Compiles `fn` for `device` and predicts its time from the compiler's schedule. Nothing is run.

    Args:
      fn: a JAX function of arrays; Pallas TPU kernels may be inside.
      args: abstract arrays. With `mesh` they carry their shardings; without, one chip holds them whole.
      mesh: devices of a topology for a sharded `fn`. None: one chip of `device`.
      grid_sizes: by Pallas kernel name, the value to assume for a traced grid size. A traced size that is not named is
        counted as one trip and reported in `OpCost.unresolved`.

    Raises:
      RuntimeError: the process was not started with `worker_environment`, or libtpu is another version.
      jax.errors.JaxRuntimeError: the program does not compile, e.g. it does not fit VMEM or HBM.
      UnknownDumpFormatError: the dump is not in the known form.
    """
    dump_dir = _dump_dir()
    _check_libtpu()
    for entry in dump_dir.iterdir() if dump_dir.is_dir() else ():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    dump_dir.mkdir(parents=True, exist_ok=True)
    if mesh is None:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=device.topology)
        mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
        replicated = PartitionSpec()
        args = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, replicated)) for a in args)
        # Pallas asks the mesh in context which TPU it compiles for; shard_map hands the kernel one chip's arrays.
        fn = jax.shard_map(fn, mesh=mesh, in_specs=replicated, out_specs=replicated, check_vma=False)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(*args).compile()
        compile_time_s = time.perf_counter() - start
    try:
        return predict_from_dump(
            compiled, dump_dir, device=device, compile_time_s=compile_time_s, grid_sizes=grid_sizes or {}
        )
    finally:
        shutil.rmtree(dump_dir, ignore_errors=True)


def _dump_dir() -> Path:
    match = _DUMP_FLAG.search(os.environ.get("LIBTPU_INIT_ARGS", ""))
    if match is None:
        raise RuntimeError(
            "LIBTPU_INIT_ARGS has no --xla_jf_dump_to: expected a process started with "
            "tuning.offline.worker_environment, because libtpu reads its flags once, when it loads."
        )
    return Path(match[1])


def _check_libtpu() -> None:
    found = version("libtpu")
    if found != SUPPORTED_LIBTPU:
        raise RuntimeError(
            f"libtpu {found} is installed, expected {SUPPORTED_LIBTPU}: the schedule dumps that predictions are read "
            f"from change between releases. Install libtpu=={SUPPORTED_LIBTPU}."
        )
