"""Makes the program of a measured row again, as it was timed."""

import dataclasses
import functools
import importlib
import json
import math
import re
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
import msgspec
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from offline_tpu import topology_mesh
from offline_tpu.machine.devices import P_STATE_OPTION, DeviceSpec
from tuning.validate import plain, splash
from tuning.validate.rows import SPLASH, MeasuredRow

#: Modules of tokamax whose ops have rows. The GPU's need packages that are not here.
_TOKAMAX_MODULES = (
    "attention.base",
    "attention.xla_chunked",
    "attention.pallas_mosaic_tpu",
    "attention.pallas_mosaic_tpu_vjp",
    "ragged_dot.base",
    "ragged_dot.pallas_mosaic_tpu",
    "linear_softmax_cross_entropy_loss.base",
    "linear_softmax_cross_entropy_loss.pallas_mosaic_tpu",
    "linear_softmax_cross_entropy_loss.reference",
    "normalization.base",
    "gated_linear_unit.base",
    "triangle_multiplication.base",
)
#: Arguments that tokamax has since 0.0.12, and what they are where they change nothing
#: (openxla/tokamax, tokamax/_src/ops/ragged_dot/base.py).
_LATER_DEFAULTS = {"maybe_quantize_lhs": False, "zero_initialize": True}
#: How rows of earlier versions write attention's default precision, and what the op takes for it on a TPU.
_DEFAULT_PRECISIONS = [["DEFAULT", "DEFAULT"], ["DEFAULT", "DEFAULT"]]
_CANONICAL_PRECISIONS = ["BF16_BF16_F32", "BF16_BF16_F32"]
#: Rows of the ragged matmul with the right side transposed that tokamax publishes for v5p name its tiles by the axes of
#: the product whose gradient it is. Of 17 rows 15 have tiles that divide the axes only so (on v7x, of 14 none).
_TILES_BY_THE_PRODUCT = ("TPU v5", "pallas_mosaic_tpu_ragged_dot")
_TRANSPOSED = [[[1], [2]], [[], []]]
_NOT_TRANSPOSED = [[[1], [1]], [[], []]]
#: Most libtpus up to 0.0.50 make XLA's ragged matmul a kernel of theirs, whose float32 result another pass rounds; the
#: one that predictions are made with does so on v5e and v7x only with this option (docs/predictions.md).
_RAGGED_KERNEL = {"xla_tpu_enable_ragged_dot_kernel": "true"}
#: Without it, on a chip that cannot skip what a mask leaves out, the product is one of all groups with all rows.
_NO_RAGGED_KERNEL = {"xla_tpu_enable_ragged_dot_kernel": "false"}
#: The chip of whose rows all but those with the right side transposed have the memory of such a product.
_BY_MASKS = "TPU v5"
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i32": "int32"}


class CannotMakeError(Exception):
    """A row whose program cannot be made again; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What was timed.

    Attributes:
      fn: a function of arrays, for `offline_tpu.predict`.
      args: its abstract arguments; with a mesh they carry their shardings.
      mesh, topology: of a program of several chips; None: one chip.
      compiler_options: flags of libtpu.
      form: in words, how an earlier compiler made it; empty: as this one does.
    """

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    mesh: Mesh | None = None
    topology: str | None = None
    compiler_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    form: str = ""


def build(row: MeasuredRow, device: DeviceSpec) -> Program:
    """Return the program of a row.

    Raises:
      CannotMakeError: the installed tokamax has no such op, or the op does not take the row's arguments.
    """
    makers: dict[str, Callable[[MeasuredRow, DeviceSpec], Program]] = {
        SPLASH: _splash,
        "matmul": _matmul,
        "pallas_matmul": _pallas_matmul,
        "copy": _copy,
        "all_gather": _all_gather,
        "psum": _psum,
        "chunked_xla_linear_softmax_cross_entropy_loss": _chunked_cross_entropy,
    }
    try:
        program = makers.get(row.op, _tokamax)(row, device)
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        reason = f"no argument {error}" if isinstance(error, KeyError) else _one_line(error)
        raise CannotMakeError(f"{row.op}: {reason}") from error
    options = dict(row.compiler_options)
    if row.p_state is not None:
        options[P_STATE_OPTION] = str(row.p_state)
    return dataclasses.replace(program, compiler_options=options)


def forms(row: MeasuredRow, device: DeviceSpec) -> list[Program]:
    """Return the program of a row in the forms in which compilers are known to have made it, the likeliest first.

    Which of them was timed, the memory says that was reported beside the time (`job.predict_row`). Without it there is
    one form: as this compiler makes it.

    Raises:
      CannotMakeError: as `build`.
    """
    made = build(row, device)
    if row.peak_memory_mb is None:
        return [made]
    if row.op == "ragged_dot":
        by_kernel, by_masks = _by_kernel(row, device), _by_masks(row, device)
        likely_masks = row.device_kind == _BY_MASKS and not _is_transposed(row)
        return [by_masks, by_kernel, made] if likely_masks else [by_kernel, made, by_masks]
    if row.op == "gated_linear_unit":
        return [made, *_product_apart(row, made)]
    return [made]


def _by_kernel(row: MeasuredRow, device: DeviceSpec) -> Program:
    """Return XLA's ragged matmul as a kernel with a float32 result; one with a transposed side transposes it before."""
    row = msgspec.structs.replace(row, compiler_options=_RAGGED_KERNEL | row.compiler_options)
    if not _is_transposed(row):
        return dataclasses.replace(build(row, device), form="by a kernel with a float32 result")
    right = _array(row.arguments["rhs"])
    groups, columns, contracted = right.shape
    dtype = row.arguments["rhs"].partition("[")[0]
    swapped = {
        "rhs": f"{dtype}[{groups},{contracted},{columns}]",
        "ragged_dot_dimension_numbers": {
            **row.arguments["ragged_dot_dimension_numbers"],
            "dot_dimension_numbers": _NOT_TRANSPOSED,
        },
    }
    program = build(msgspec.structs.replace(row, arguments=row.arguments | swapped), device)

    def transposed_before(arrays: list[jax.Array]) -> Any:
        return program.fn([_transposed(array) if array.ndim == right.ndim else array for array in arrays])

    args = [right if array.ndim == right.ndim else array for array in program.args[0]]
    form = "with the right side transposed before, by a kernel with a float32 result"
    return dataclasses.replace(program, fn=transposed_before, args=(args,), form=form)


def _by_masks(row: MeasuredRow, device: DeviceSpec) -> Program:
    """Return XLA's ragged matmul without a kernel: all rows times all groups, of which a mask keeps each its own."""
    row = msgspec.structs.replace(row, compiler_options=_NO_RAGGED_KERNEL | row.compiler_options)
    return dataclasses.replace(build(row, device), form="by masks, without a kernel")


def _is_transposed(row: MeasuredRow) -> bool:
    dimensions = row.arguments.get("ragged_dot_dimension_numbers") or {}
    return dimensions.get("dot_dimension_numbers") == _TRANSPOSED


def _transposed(array: jax.Array) -> jax.Array:
    """Return the array with its last axes exchanged, in a pass of its own."""
    return jax.lax.optimization_barrier(jnp.swapaxes(array, -1, -2))


def _product_apart(row: MeasuredRow, made: Program) -> list[Program]:
    """Return a gated linear unit whose product is laid out for the activation as bfloat16, before it is converted.

    Of weights in one array, at a named precision, and without residuals; of others there is no such form.
    """
    weights, precision = row.arguments["weights"], row.arguments.get("precision")
    presets = jax.lax.DotAlgorithmPreset.__members__
    if not isinstance(weights, str) or str(precision) not in presets or row.arguments.get("return_residuals"):
        return []
    module, _, name = (row.arguments.get("activation") or "").rpartition(".")
    activation = getattr(importlib.import_module(module), name) if module else None
    fn = plain.gated_linear_unit(activation, presets[str(precision)])
    args = (_array(row.arguments["x"]), _array(weights))
    return [dataclasses.replace(made, fn=fn, args=args, form="with the product apart from the activation")]


def tokamax_version() -> str | None:
    """Return the version of tokamax; None where it is not installed."""
    try:
        return version("tokamax")
    except PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _array(text: str) -> jax.ShapeDtypeStruct:
    match = _ARRAY.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected an array as bf16[1024,64].")
    return jax.ShapeDtypeStruct(tuple(map(int, filter(None, match[2].split(",")))), _DTYPES.get(match[1], match[1]))


def _splash(row: MeasuredRow, device: DeviceSpec) -> Program:
    del device
    return Program(splash.build(row.splash), splash.abstract_args(row.splash))


def _factors(row: MeasuredRow) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    m, k, n, dtype = (row.arguments[name] for name in ("m", "k", "n", "dtype"))
    return jax.ShapeDtypeStruct((m, k), dtype), jax.ShapeDtypeStruct((k, n), dtype)


def _matmul(row: MeasuredRow, device: DeviceSpec) -> Program:
    del device
    return Program(plain.matmul, _factors(row))


def _pallas_matmul(row: MeasuredRow, device: DeviceSpec) -> Program:
    del device
    block_m, block_k, block_n = map(int, row.arguments["blocks"].split("/"))
    return Program(plain.pallas_matmul(block_m, block_k, block_n), _factors(row))


def _copy(row: MeasuredRow, device: DeviceSpec) -> Program:
    del device
    return Program(plain.copy, (jax.ShapeDtypeStruct((row.arguments["bytes"] // 2,), jnp.bfloat16),))


def _all_gather(row: MeasuredRow, device: DeviceSpec) -> Program:
    """Return the gathering over every other device of a slice: on v7x, over its chips, on both cores at once."""
    arguments = row.arguments
    given, made = _array(arguments["input"]), _array(arguments["output"])
    topology = f"{device.name}:{arguments['topology']}"
    group = made.shape[0] // given.shape[0]
    chips = math.prod(map(int, arguments["topology"].split("x")))
    mesh = topology_mesh(topology, (group, chips * device.devices_per_chip // group), ("gathered", "beside"))
    return Program(plain.all_gather(mesh), (_everywhere(given, mesh),), mesh, topology)


def _psum(row: MeasuredRow, device: DeviceSpec) -> Program:
    del device
    topology = row.arguments["topology"]
    mesh = topology_mesh(topology, (int(topology.rpartition("-")[2]),), ("chips",))
    matrix = jax.ShapeDtypeStruct(tuple(row.arguments["shape"]), row.arguments["dtype"])
    return Program(plain.psum(mesh), (_everywhere(matrix, mesh),), mesh, topology)


def _everywhere(array: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, PartitionSpec()))


def _chunked_cross_entropy(row: MeasuredRow, device: DeviceSpec) -> Program:
    del device
    arguments, config = row.arguments, row.config
    loss = plain.chunked_cross_entropy(
        config["b_block_size"], config["v_block_size"], arguments["reduction"], arguments["return_residuals"]
    )
    return Program(loss, tuple(_array(arguments[name]) for name in ("x", "labels", "w")))


def _tokamax(row: MeasuredRow, device: DeviceSpec) -> Program:
    """Return one of tokamax's ops, bound to the row's arguments as tokamax's own benchmarks bind it."""
    del device
    if tokamax_version() is None:
        raise ValueError("tokamax is not installed; pip install 'cogvideox-splash[peers]'")
    import pydantic
    from tokamax._src import benchmarking
    from tokamax._src import pydantic as tokamax_pydantic

    kind = _op_classes().get(row.op)
    if kind is None:
        raise ValueError(
            f"tokamax {tokamax_version()} has no such op (rows of tuning.selfcheck's own have predictions in its file)"
        )
    # Asked of the default device, which is the CPU of this machine: the TPU is not here.
    supported = {"supported_on": lambda self, device: True, "__module__": kind.__module__}
    op: Any = type(kind.__name__, (kind,), supported)()
    if row.op == "xla_chunked_dot_product_attention":
        # As tokamax's API has the op, and its times come from: (512, 1024); the class's own default is 128.
        api = importlib.import_module("tokamax._src.ops.attention.api")
        op = op.replace(chunk_size=api.IMPLEMENTATIONS["xla_chunked"].chunk_size)
    arguments = _known_arguments(row.arguments, op._fwd_signature.parameters)
    spec = tokamax_pydantic.get_arg_spec_model(f"{kind.__name__}Spec", op._fwd_signature)
    checked = pydantic.TypeAdapter(spec).validate_json(json.dumps(arguments))
    if row.config:
        op = op.replace(config=pydantic.TypeAdapter(op.config_cls).validate_python(_config(row)))
    bound = op.bind(**checked)
    fn, arrays = benchmarking.standardize_function(op, *bound.args, kwargs=bound.kwargs, seed=None)
    abstract = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    return Program(fn, (abstract,))


def _config(row: MeasuredRow) -> dict[str, Any]:
    """Return a row's configuration in the names that the op has for it."""
    config = dict(row.config)
    if (row.device_kind, row.op) == _TILES_BY_THE_PRODUCT and _is_transposed(row):
        match = _ARRAY.fullmatch(row.arguments["rhs"])
        _, columns, contracted = map(int, match[2].split(",")) if match else (0, 0, 0)
        if {"tile_k", "tile_n"} <= config.keys() and (contracted % config["tile_k"] or columns % config["tile_n"]):
            config["tile_k"], config["tile_n"] = config["tile_n"], config["tile_k"]
    return config


@functools.cache
def _op_classes() -> dict[str, type]:
    """Return tokamax's ops by the names that its records have: of the class, in snake case."""
    for name in _TOKAMAX_MODULES:
        importlib.import_module(f"tokamax._src.ops.{name}")
    found: list[type] = []
    unseen = [importlib.import_module("tokamax._src.ops.op").Op]
    while unseen:
        found.append(unseen.pop())
        unseen += found[-1].__subclasses__()
    return {re.sub(r"(?!^)([A-Z])", r"_\1", kind.__name__).lower(): kind for kind in found}


def _known_arguments(arguments: Mapping[str, Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the op takes. Raises ValueError where one that it does not take changes something."""
    for name in arguments.keys() - parameters.keys():
        if arguments[name] is not None and arguments[name] != _LATER_DEFAULTS.get(name):
            raise ValueError(f"tokamax {tokamax_version()} has no argument {name}={arguments[name]!r}")
    known = {name: value for name, value in arguments.items() if name in parameters}
    if known.get("precision") == _DEFAULT_PRECISIONS:
        known["precision"] = _CANONICAL_PRECISIONS
    return known
