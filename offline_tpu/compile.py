"""Compiles a function for a TPU that is not here, and turns what the compiler wrote down into a prediction."""

import contextlib
import functools
import logging
import math
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from offline_tpu import archive, integers, libtpu
from offline_tpu.dump import Dump
from offline_tpu.machine.constants import core_timing
from offline_tpu.machine.devices import DeviceSpec, by_name
from offline_tpu.machine.errors import UnknownDumpFormatError
from offline_tpu.machine.links import Grid
from offline_tpu.machine.topology import parse_topology
from offline_tpu.options import Value, checked_options, option_error, options_text
from offline_tpu.prediction import Prediction
from offline_tpu.program_time import ProgramCost
from splash_workbench.files import require_writable_file, user_path
from splash_workbench.trial_status import TrialError, compile_error

logger = logging.getLogger(__name__)

#: libtpu dumps into one folder a process.
_ONE_AT_A_TIME = threading.Lock()


def predict(
    fn: Callable[..., Any],
    *args: Any,
    device: DeviceSpec | str | None = None,
    topology: str | None = None,
    mesh: Mesh | None = None,
    grid_sizes: Mapping[str, int] | None = None,
    slow_grid_sizes: Mapping[str, int] | None = None,
    trip_counts: Mapping[str, int] | None = None,
    values: Mapping[int, np.ndarray] | None = None,
    compiler_options: Mapping[str, Value] | None = None,
    auto_layouts: bool = False,
    kept: Path | str | None = None,
) -> Prediction:
    """Compile `fn` and predict its time from the compiler's schedule. Nothing is run. Calls in threads wait.

    Args:
      fn: a JAX function of arrays, jitted or not; Pallas TPU kernels may be inside.
      args: abstract arrays, or pytrees of them. With `mesh` they carry their shardings; without, one chip holds them.
      device, topology: one of them: the device or its name, or as for `topology_mesh`.
      mesh: devices of a topology for a sharded `fn`, as `topology_mesh` makes it. None: one chip.
      grid_sizes: by Pallas kernel name, the value to assume for a traced grid size that the program does not fix. One
        that is not named is counted as one trip and reported in `OpCost.unresolved`.
      slow_grid_sizes: the same at the other end, where data decide so: `Prediction.slow_time_s` is the time then.
      trip_counts: by text that the scope of a loop contains, the trips to assume where these depend on data.
      values: by position in the flattened `args`, the integers to assume for int32 arguments that decide how much a
        kernel computes, e.g. group sizes of a ragged matmul. Traced grid sizes and prefetched scalars that are computed
        from them, or from constants of `fn`, are known then.
      compiler_options: flags of libtpu for this program, e.g. {"xla_tpu_scoped_vmem_limit_kib": 65536}.
      auto_layouts: let the compiler choose the layouts of arguments and results, in which they lie in HBM, as XLA does
        between ops. Else they are those of JAX's arrays, and a kernel that wants others is surrounded by copies.
      kept: a file to keep what the compiler wrote in. Where it is there already, it is read and nothing is compiled:
        the caller knows that it is of the same program, device and libtpu.

    Raises:
      ValueError: neither or both of device and topology are given, or what is given is not known or no array, number of
        trips or compiler option.
      RuntimeError: libtpu was loaded before, for something else, or it is another version; or an accelerator is here
        and JAX_PLATFORMS is not "cpu".
      jax.errors.JaxRuntimeError: the program does not compile, e.g. it does not fit VMEM or HBM.
      UnknownDumpFormatError: the dump is not in the known form.
    """
    _check_call(fn, args)
    _check_counts(grid_sizes=grid_sizes, slow_grid_sizes=slow_grid_sizes, trip_counts=trip_counts)
    if not isinstance(auto_layouts, bool):
        raise ValueError(f"{auto_layouts=}: expected True or False.")
    kept = None if kept is None else user_path(kept)
    if kept is not None and not kept.is_file():
        require_writable_file(f"kept={kept}", kept)
    options = checked_options(compiler_options)
    spec = _find_device(device, topology).at_p_state(options)
    if mesh is not None:
        _check_mesh(mesh, spec, topology)
    values = integers.checked_values(values, args)

    def prediction(
        facts: archive.Facts, folder: Path, trace: Callable[[], jax.stages.Traced], archived: bool = False
    ) -> Prediction:
        def find_integers() -> integers.Integers:
            return integers.find(trace().jaxpr, values)

        def costs(grid_sizes: Mapping[str, int]) -> tuple[Dump, ProgramCost, float]:
            return _costs(spec, facts, folder, grid_sizes, trip_counts or {}, find_integers, archived)

        slow_time_s = costs(slow_grid_sizes)[2] if slow_grid_sizes else None
        dump, program, time_s = costs(grid_sizes or {})
        _tell_of_strangers(dump, grid_sizes=grid_sizes, slow_grid_sizes=slow_grid_sizes, trip_counts=trip_counts)
        return _prediction(spec, facts, options, dump, program, time_s, slow_time_s)

    if kept is not None and kept.is_file():
        with tempfile.TemporaryDirectory() as folder:
            facts = archive.unpack(kept, Path(folder))
            return prediction(facts, Path(folder), lambda: _trace(fn, args, spec, mesh, auto_layouts)[0], archived=True)
    with _ONE_AT_A_TIME:
        dump_dir = libtpu.find_dump_dir()
        shutil.rmtree(dump_dir, ignore_errors=True)
        dump_dir.mkdir(parents=True)
        try:
            start, cpu_start = time.perf_counter(), time.process_time()
            traced, mesh = _trace(fn, args, spec, mesh, auto_layouts)
            compiled = _compile(traced, mesh, options)
            facts = archive.Facts(
                coords=[list(chip.coords) for chip in mesh.devices.flat],
                **_peak_bytes(compiled),
                compile_time_s=time.perf_counter() - start,
                compile_cpu_s=time.process_time() - cpu_start,
            )
            if not any(dump_dir.iterdir()):
                raise RuntimeError(
                    "libtpu was loaded in this process before, without the flags that make it dump schedules: expected "
                    "JAX_PLATFORMS=cpu in the environment, or `predict` before JAX's first array."
                )
            if kept is not None:
                archive.pack(dump_dir, facts, kept)
            return prediction(facts, dump_dir, lambda: traced)
        finally:
            shutil.rmtree(dump_dir, ignore_errors=True)


def try_options(payload: dict[str, Any]) -> dict[str, Any]:
    """Compile the smallest program with each of the `options` of the payload, for its `device`: a worker's job."""
    x = jax.ShapeDtypeStruct((8, 128), "float32")
    for options in payload["options"]:
        try:
            predict(jnp.exp, x, device=payload["device"], compiler_options=options)
        except ValueError as error:
            raise compile_error(error) from error
        except jax.errors.JaxRuntimeError as error:
            reason = compile_error(error)
            text = f"compiler_options: {options_text(options)}: the smallest program does not compile: {reason}"
            raise TrialError(reason.status, text) from error
    return {}


def trace(fn: Callable[..., Any], *args: Any, device: DeviceSpec) -> ClosedJaxpr:
    """Return the program that `predict` would compile for one chip of a device, traced."""
    return _trace(fn, args, device, None, False)[0].jaxpr


def _costs(
    device: DeviceSpec,
    facts: archive.Facts,
    folder: Path,
    grid_sizes: Mapping[str, int],
    trip_counts: Mapping[str, int],
    find_integers: Callable[[], integers.Integers],
    archived: bool,
) -> tuple[Dump, ProgramCost, float]:
    """Return what was dumped, and the cost and seconds of the program."""
    try:
        dump = Dump(
            folder,
            timing=core_timing(device),
            grid_sizes=grid_sizes,
            find_integers=find_integers,
            archived=archived,
        )
        program = ProgramCost(
            dump.module,
            dump.schedule,
            vmem_bytes=dump.vmem_bytes,
            overlays=dump.overlays,
            device=device,
            grid=Grid.around(facts.coords, device.ici_wrap_length),
            trip_counts=trip_counts,
        )
        return dump, program, program.walk()
    except UnknownDumpFormatError as error:
        raise UnknownDumpFormatError(f"{error} (libtpu {libtpu.SUPPORTED_LIBTPU})") from error


def _prediction(
    device: DeviceSpec,
    facts: archive.Facts,
    options: dict[str, str],
    dump: Dump,
    program: ProgramCost,
    time_s: float,
    slow_time_s: float | None,
) -> Prediction:
    ops = program.ops
    return Prediction(
        device=device.name,
        time_s=time_s,
        cycles=sum(op.cycles * op.calls for op in ops),
        ops=tuple(ops),
        vmem_bytes=max((op.vmem_bytes for op in ops), default=0),
        spill_count=sum(op.spill_count * op.calls for op in ops),
        fill_count=sum(op.fill_count * op.calls for op in ops),
        hbm_bytes=sum(op.hbm_bytes * op.calls for op in ops),
        peak_hbm_bytes=facts.peak_hbm_bytes,
        peak_live_bytes=facts.peak_live_bytes,
        compile_time_s=facts.compile_time_s,
        compile_cpu_s=facts.compile_cpu_s,
        compiler_options=options,
        code_bytes=dump.overlays.code_bytes if dump.overlays else sum(op.code_bytes for op in ops),
        slow_time_s=slow_time_s,
    )


def _find_device(device: DeviceSpec | str | None, topology: str | None) -> DeviceSpec:
    if (device is None) == (topology is None):
        raise ValueError(f"{device=}, {topology=}: expected one of them.")
    if topology is not None:
        return parse_topology(topology)[0]
    return device if isinstance(device, DeviceSpec) else by_name(device)  # type: ignore[arg-type]


def _check_call(fn: Any, args: tuple[Any, ...]) -> None:
    """Raise ValueError unless `fn` can be called, and all that it is called with are arrays, abstract or not."""
    if not callable(fn):
        raise ValueError(f"fn={fn!r}: expected a function of arrays.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(args):
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"args{jax.tree_util.keystr(path)}={leaf!r}: expected an array, abstract or not; what is none is given "
                "to `fn` by functools.partial."
            )


def _check_mesh(mesh: Mesh, device: DeviceSpec, topology: str | None) -> None:
    """Raise ValueError unless a mesh is of the device, and of all of the topology."""
    expected = f"expected one of offline_tpu.topology_mesh, of {topology or device.name}."
    if (kinds := {chip.device_kind for chip in mesh.devices.flat}) != {device.device_kind}:
        raise ValueError(f"mesh: its devices are {', '.join(sorted(kinds))}; {expected}")
    if topology is not None:
        count = len(libtpu.describe_topology(parse_topology(topology)[1]).devices)
        if mesh.size != count:
            raise ValueError(f"mesh: it has {mesh.size} devices, and {topology} has {count}; {expected}")


def _is_count(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int | np.integer) and bool(value >= 0)


def _check_counts(**given: Mapping[str, int] | None) -> None:
    for argument, counts in given.items():
        if not isinstance(counts, Mapping | None):
            raise ValueError(f"{argument}={counts!r}: expected a dict of whole numbers, by name.")
        for name, count in (counts or {}).items():
            if not _is_count(count):
                raise ValueError(f"{argument}[{name!r}]={count!r}: expected a whole number, 0 or more.")


def _tell_of_strangers(dump: Dump, trip_counts: Mapping[str, int] | None, **sizes: Mapping[str, int] | None) -> None:
    """Tell where nothing of a program has one of the names that were given, in part of a loop's scope."""
    kernels = dump.names_of("custom-call")
    for argument, given in sizes.items():
        if given and not kernels & given.keys():
            logger.warning("%s: no kernel is named %s; it has %s", argument, _listed(given), _listed(kernels))
    scopes = dump.scopes_of("while")
    for text in trip_counts or {}:
        if not any(text in scope for scope in scopes):
            logger.warning("trip_counts: no loop's scope contains %r; they are %s", text, _listed(scopes))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _peak_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Return the bytes of HBM that are reserved, and those of them in use at one time, as Facts has them."""
    memory = compiled.memory_analysis()
    assert memory is not None, "libtpu tells what a program needs"
    reserved = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    return {"peak_hbm_bytes": reserved, "peak_live_bytes": memory.peak_memory_in_bytes}


def _trace(
    fn: Callable[..., Any], args: tuple[Any, ...], device: DeviceSpec, mesh: Mesh | None, auto_layouts: bool
) -> tuple[jax.stages.Traced, Mesh]:
    if mesh is None:
        topology = libtpu.describe_topology(device.topology)
        mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
        one_chip = NamedSharding(mesh, PartitionSpec())
        args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one_chip), args)
        # Pallas asks the mesh in context which TPU it compiles for; shard_map hands the kernel one chip's arrays.
        fn = jax.shard_map(fn, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    with jax.set_mesh(mesh):
        if auto_layouts:
            layouts: Any = jax.tree.map(lambda a: Format(Layout.AUTO, a.sharding), args)
            return jax.jit(fn, in_shardings=layouts, out_shardings=Format(Layout.AUTO)).trace(*args), mesh
        if hasattr(fn, "trace"):
            fn.clear_cache()  # type: ignore[attr-defined] # compiled before, it would leave no dump
            return fn.trace(*args), mesh
        return jax.jit(functools.wraps(fn)(lambda *arrays: fn(*arrays))).trace(*args), mesh  # likewise


def _compile(traced: jax.stages.Traced, mesh: Mesh, options: dict[str, str]) -> jax.stages.Compiled:
    with jax.set_mesh(mesh), _kept_out_of_compilation_cache():
        lowered = traced.lower()
        try:
            # As Python's booleans, which XLA's own options take, and libtpu's as well as text.
            given = {name: {"true": True, "false": False}.get(value, value) for name, value in options.items()}
            return lowered.compile(compiler_options=given or None)
        except jax.errors.JaxRuntimeError as error:
            if (refused := option_error(error)) is not None:
                raise refused from error
            raise


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
