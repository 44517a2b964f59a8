"""Compiles a function for a TPU that is not here, and turns what the compiler wrote down into a prediction."""

import contextlib
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from offline_tpu import libtpu
from offline_tpu.dump import Dump
from offline_tpu.machine.constants import dma_timing
from offline_tpu.machine.devices import DeviceSpec, by_name
from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.machine.links import Grid
from offline_tpu.prediction import Prediction
from offline_tpu.program_time import ProgramCost

#: By number of axes: JAX devices -> shape of the slice of chips. Sources: https://cloud.google.com/tpu/docs/v6e, where
#: slices are flat, and https://cloud.google.com/tpu/docs/tpu7x, where a chip is two devices.
SLICE_SHAPES = {
    2: {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    3: {2: "1x1x1", 8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8"},
}


def topology_mesh(topology: str, shape: Sequence[int], axis_names: Sequence[str]) -> Mesh:
    """Return a mesh of devices that are not here.

    Args:
      topology: "v6e-8" (so many chips, in the shape that such a slice has) or "v6e:2x4" (that shape).
      shape, axis_names: of the mesh; neighbours on the chips' own grid are kept together where that is possible.

    Raises:
      ValueError: the topology is not known, or the mesh does not have as many devices.
      RuntimeError: as for `predict`.
    """
    _, name = parse_topology(topology)
    libtpu.find_dump_dir()
    description = topologies.get_topology_desc(platform="tpu", topology_name=name)
    if math.prod(shape) != len(description.devices):
        raise ValueError(f"shape={tuple(shape)}: expected {len(description.devices)} devices, as {topology} has.")
    return topologies.make_mesh(description, tuple(shape), tuple(axis_names))


def parse_topology(topology: str) -> tuple[DeviceSpec, str]:
    """Return the device of a topology and the name that libtpu knows it by: "v6e-8" is (v6e, "v6e:2x4").

    Raises:
      ValueError: it is not known.
    """
    name, separator, size = topology.replace(":", "-").partition("-")
    device = by_name(name, given=f"{topology=}")
    platform, _, shape = device.topology.partition(":")
    if not separator:
        return device, device.topology
    axes = shape.count("x") + 1
    slices = SLICE_SHAPES[axes]
    if re.fullmatch("x".join(["[1-9][0-9]*"] * axes), size):
        return device, f"{platform}:{size}"
    if not size.isdigit() or int(size) not in slices:
        counts = ", ".join(map(str, slices))
        raise ValueError(f"{topology=}: expected {name}-N with N one of {counts}, or chips as {name}:{shape}.")
    return device, f"{platform}:{slices[int(size)]}"


def predict(
    fn: Callable[..., Any],
    *args: Any,
    device: DeviceSpec | str | None = None,
    topology: str | None = None,
    mesh: Mesh | None = None,
    grid_sizes: Mapping[str, int] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> Prediction:
    """Compile `fn` and predict its time from the compiler's schedule. Nothing is run. One call at a time in a process.

    Args:
      fn: a JAX function of arrays, jitted or not; Pallas TPU kernels may be inside.
      args: abstract arrays, or pytrees of them. With `mesh` they carry their shardings; without, one chip holds them.
      device, topology: one of them: the device or its name, or as for `topology_mesh`.
      mesh: devices of a topology for a sharded `fn`, as `topology_mesh` makes it. None: one chip.
      grid_sizes: by Pallas kernel name, the value to assume for a traced grid size that the program does not fix. One
        that is not named is counted as one trip and reported in `OpCost.unresolved`.
      trip_counts: by text that the scope of a loop contains, the trips to assume where these depend on data.

    Raises:
      ValueError: neither or both of device and topology are given, or what is given is not known.
      RuntimeError: libtpu was loaded before, for something else, or it is another version; or an accelerator is here
        and JAX_PLATFORMS is not "cpu".
      jax.errors.JaxRuntimeError: the program does not compile, e.g. it does not fit VMEM or HBM.
      UnknownDumpFormatError: the dump is not in the known form.
    """
    spec = _find_device(device, topology)
    dump_dir = libtpu.find_dump_dir()
    shutil.rmtree(dump_dir, ignore_errors=True)
    dump_dir.mkdir(parents=True)
    try:
        start, cpu_start = time.perf_counter(), time.process_time()
        compiled, mesh = _compile(fn, args, spec, mesh)
        compile_time_s, compile_cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        if not any(dump_dir.iterdir()):
            raise RuntimeError(
                "libtpu was loaded in this process before, without the flags that make it dump schedules: expected "
                "JAX_PLATFORMS=cpu in the environment, or `predict` before JAX's first array."
            )
        dump = Dump(dump_dir, timing=dma_timing(spec), grid_sizes=grid_sizes or {})
        program = ProgramCost(
            dump.module,
            dump.schedule,
            vmem_bytes=dump.vmem_bytes,
            device=spec,
            grid=Grid.around([chip.coords for chip in mesh.devices.flat], spec.ici_wrap_length),
            trip_counts=trip_counts or {},
        )
        time_s = program.walk()
    except UnknownDumpFormatError as error:
        raise UnknownDumpFormatError(f"{error} (libtpu {libtpu.SUPPORTED_LIBTPU})") from error
    finally:
        shutil.rmtree(dump_dir, ignore_errors=True)
    ops = program.ops
    return Prediction(
        device=spec.name,
        time_s=time_s,
        cycles=sum(op.cycles * op.calls for op in ops),
        ops=tuple(ops),
        vmem_bytes=max((op.vmem_bytes for op in ops), default=0),
        spill_count=sum(op.spill_count * op.calls for op in ops),
        fill_count=sum(op.fill_count * op.calls for op in ops),
        hbm_bytes=sum(op.hbm_bytes * op.calls for op in ops),
        peak_hbm_bytes=_peak_hbm_bytes(compiled),
        compile_time_s=compile_time_s,
        compile_cpu_s=compile_cpu_s,
    )


def _find_device(device: DeviceSpec | str | None, topology: str | None) -> DeviceSpec:
    if (device is None) == (topology is None):
        raise ValueError(f"{device=}, {topology=}: expected one of them.")
    if topology is not None:
        return parse_topology(topology)[0]
    return by_name(device) if isinstance(device, str) else device  # type: ignore[return-value]


def _peak_hbm_bytes(compiled: jax.stages.Compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None, "libtpu tells what a program needs"
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )


def _compile(
    fn: Callable[..., Any], args: tuple[Any, ...], device: DeviceSpec, mesh: Mesh | None
) -> tuple[jax.stages.Compiled, Mesh]:
    if mesh is None:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=device.topology)
        mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
        one_chip = NamedSharding(mesh, PartitionSpec())
        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one_chip), args)
        # Pallas asks the mesh in context which TPU it compiles for; shard_map hands the kernel one chip's arrays.
        fn = jax.shard_map(fn, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    with jax.set_mesh(mesh), _kept_out_of_compilation_cache():
        jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
        return jitted.lower(*args).compile(), mesh


@contextlib.contextmanager
def _kept_out_of_compilation_cache() -> Iterator[None]:
    """Write nothing to the user's persistent cache: no chip is here to load it for, and a hit dumps nothing."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[option]
    jax.config.update(option, math.inf)
    try:
        yield
    finally:
        jax.config.update(option, before)
