"""Define what a kernel must say of itself to be tuned: a user's is a subclass of `Kernel` in a file of its own."""

import abc
import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from splash_attn.types import BlockSizes

#: A configuration: a frozen dataclass of tunables. A workload: a frozen dataclass of sizes and text.
C = TypeVar("C")
W = TypeVar("W")

_VALUES, _OPTION = "values", "compiler_option"
#: The device kind that a kernel finds where it is interpreted.
_INTERPRETED_AS = "TPU v6 lite"


class KernelError(ValueError):
    """What a kernel lacks or has wrong, in one line for its author."""


@dataclasses.dataclass(frozen=True)
class Unrolled(Generic[C]):
    """How long the unrolled code of a configuration is, so that a shorter one tells its time.

    What a longer one takes more is taken to go at the pace of the shorter one's middle, and what a step waits for
    memory not to grow: for kernels that are bound by what they compute.

    Attributes:
      length: of the code that runs in a step, in whatever it is counted: rows, queries.
      steps: how often it runs for the workload.
      shorter: the configuration with less of the same code, three or four times what repeats in it, and otherwise the
        same; None where its own compiles as fast. `unrolled` is asked for its length and steps, too.
      least: one that compiles in no time, for what surrounds the kernel; None: the configuration itself, or `shorter`.
    """

    length: int
    steps: int
    shorter: C | None = None
    least: C | None = None


def one_of(*values: Any, default: Any = dataclasses.MISSING) -> Any:
    """Return the field of a tunable with these values, or those of one `range`. Without a default the first is it."""
    listed = tuple(values[0]) if len(values) == 1 and isinstance(values[0], range) else values
    return _field(listed, default, {})


def compiler_option(name: str, *values: Any, default: Any = dataclasses.MISSING) -> Any:
    """Return the field of a tunable that is a flag of the compiler; None among its values leaves the flag out."""
    return _field(values, default, {_OPTION: name})


def _field(values: Sequence[Any], default: Any, metadata: Mapping[str, Any]) -> Any:
    if default is dataclasses.MISSING:
        default = values[0] if values else None
    return dataclasses.field(default=default, metadata={_VALUES: tuple(values), **metadata})


class Kernel(abc.ABC, Generic[C, W]):
    """A kernel, or any JAX function, that can be tuned. It is made without arguments, in several processes.

    Attributes:
      Config: a frozen dataclass; each field is a tunable, made by `one_of` or `compiler_option`. Its defaults are what
        the winner is compared with.
      Workload: a frozen dataclass of numbers and text (a dtype as "bfloat16"), which are set on the command line as
        workload.NAME=value.
      platform: "tpu" or "gpu", that the kernel is for.
      tolerance, row_tolerance: limits of ||actual - expected|| / ||expected||, of each result and of its worst row (the
        last axis). The defaults are for bfloat16, which rounds a number by up to 2^-8 of itself, several times over.
      op_name: what the names of its Pallas ops contain; "" stands for every Pallas op.
      notes: what a reader of its figures must know.
      vmem_grows_with: tunables of which a larger value never needs less VMEM: what exceeds VMEM rules out all that is
        as large in each of them, and otherwise the same.
      requires: packages that must be installed, whose versions are kept in the records.
    """

    Config: ClassVar[type]
    Workload: ClassVar[type]
    platform: ClassVar[Literal["tpu", "gpu"]] = "tpu"
    tolerance: ClassVar[float] = 2**-6
    row_tolerance: ClassVar[float] = 2**-3
    op_name: ClassVar[str] = ""
    notes: ClassVar[tuple[str, ...]] = ()
    vmem_grows_with: ClassVar[tuple[str, ...]] = ()
    requires: ClassVar[tuple[str, ...]] = ()

    @property
    def name(self) -> str:
        """Return the name that records have: that of the class."""
        return type(self).__name__

    @abc.abstractmethod
    def arguments(self, workload: W) -> Sequence[Any]:
        """Return the arguments of a call: jax.ShapeDtypeStruct for random ones, NumPy arrays where the values count."""

    @abc.abstractmethod
    def build(self, config: C) -> Callable[..., Any]:
        """Return the function of those arguments. Raises ValueError or NotImplementedError for what cannot be."""

    @abc.abstractmethod
    def reference(self, *arguments: Any) -> Any:
        """Return what the function must return for the same arguments, by simple means, as exactly as can be."""

    def baselines(self) -> Mapping[str, Callable[..., Any]]:
        """Return other functions of the same arguments, by name, to time beside the winner: a library's, or XLA's."""
        return {}

    def is_valid(self, config: C, workload: W) -> bool | str:
        """Return whether to try a configuration; a text says why not, in words that group."""
        del config, workload
        return True

    def flops(self, workload: W) -> float | None:
        """Return the floating-point operations of a call, for a bound; None where they are not known."""
        del workload
        return None

    def hbm_bytes(self, workload: W) -> float | None:
        """Return the bytes that a call must move, for a bound: by default those of its arguments and results."""
        arguments = self.arguments(workload)
        arrays = [*arguments, *jax.tree.leaves(jax.eval_shape(self.reference, *abstract(arguments)))]
        return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays)

    def check_config(self, config: C, workload: W) -> C:
        """Return a configuration of the same structure that is quicker to check; the winner is checked as it is."""
        del workload
        return config

    def check_workload(self, config: C, workload: W) -> W:
        """Return the workload on which a configuration is compared with the reference; by default the whole one."""
        del config
        return workload

    def unrolled(self, config: C, workload: W) -> Unrolled[C] | None:
        """Return the dimension in which the code is unrolled; None: every candidate is compiled at its length."""
        del config, workload
        return None

    def assume(self, config: C, workload: W) -> tuple[dict[str, int], tuple[str, ...]]:
        """Return grid sizes that depend on data, by Pallas kernel name, and notes that say what is assumed."""
        del config, workload
        return {}, ()

    def assume_slow(self, config: C, workload: W) -> dict[str, int]:
        """Return the same grid sizes at the other end, where data make the call slowest; empty where nothing does."""
        del config, workload
        return {}

    # What follows is for the tuner; only the attention kernels, which are older than this form, say it anew.

    def config_of(self, block_sizes: BlockSizes | None, options: Mapping[str, Any]) -> C:
        """Return the configuration of a record's fields. Raises KernelError where they do not fit."""
        del block_sizes
        try:
            return self.Config(**options)
        except TypeError as error:
            raise KernelError(f"{self.name}.Config: {error}.") from error

    def interpreted(self, config: C) -> Callable[..., Any]:
        """Return `build(config)` for this machine's CPU: Pallas kernels are interpreted, unwritten memory is NaN."""
        return self.on_cpu(lambda *arguments: self.build(config)(*arguments))

    def on_cpu(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function with its Pallas kernels interpreted."""

        def run(*arguments: Any) -> Any:
            with _interpreting(self.platform):
                return function(*arguments)

        return run

    def inputs(self, workload: W) -> list[Any]:
        """Return the arrays of a check: standard normal where `arguments` leaves them open; always the same."""
        rng = np.random.default_rng(0)
        found = []
        for x in self.arguments(workload):
            if isinstance(x, jax.ShapeDtypeStruct):
                if not jnp.issubdtype(x.dtype, jnp.floating):
                    raise KernelError(f"arguments: expected a NumPy array in place of {x}, whose values count.")
                x = jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)
            found.append(jnp.asarray(x))
        return found

    def limits(self, config: C, workload: W) -> tuple[float, float]:
        """Return the limits of the error over all rows and of the worst row."""
        del config, workload
        return self.tolerance, self.row_tolerance

    def compiler_options(self, config: C) -> dict[str, str]:
        """Return the compiler's flags of a configuration, as text."""
        names = {field.name: field.metadata.get(_OPTION) for field in dataclasses.fields(self.Config)}
        values = {option: getattr(config, name) for name, option in names.items() if option}
        return {
            option: str(value).lower() if isinstance(value, bool) else str(value)
            for option, value in values.items()
            if value is not None
        }


def tunables(kernel: Kernel[Any, Any]) -> dict[str, tuple[Any, ...]]:
    """Return the values of each tunable of a kernel."""
    return {field.name: field.metadata.get(_VALUES, ()) for field in dataclasses.fields(kernel.Config)}


def abstract(arguments: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of arguments. Raises KernelError for one that has none."""
    if not isinstance(arguments, Sequence):
        raise KernelError(f"arguments: expected a list or tuple of them, got {arguments!r}")
    for position, x in enumerate(arguments):
        if not hasattr(x, "shape") or not hasattr(x, "dtype"):
            raise KernelError(
                f"arguments: the one at {position} is {x!r}, expected a jax.ShapeDtypeStruct or a NumPy array"
            )
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments]


def known_values(arguments: Sequence[Any]) -> dict[int, np.ndarray]:
    """Return the arguments whose integers count, by position."""
    arrays = {i: x for i, x in enumerate(arguments) if not isinstance(x, jax.ShapeDtypeStruct)}
    return {i: np.asarray(x) for i, x in arrays.items() if np.dtype(x.dtype) == np.int32}


@contextlib.contextmanager
def _interpreting(platform: str) -> Iterator[None]:
    from jax.experimental.pallas import tpu as pltpu

    how: Any = pltpu.InterpretParams(uninitialized_memory="nan") if platform == "tpu" else True
    with contextlib.ExitStack() as stack:
        stack.enter_context(pltpu.force_tpu_interpret_mode(how))
        if platform == "tpu" and jax.devices()[0].platform != "tpu":
            # Kernels ask which TPU they are for while they are traced, interpreted or not.
            device = jax.sharding.AbstractDevice(_INTERPRETED_AS, 1, "tpu")
            mesh = jax.sharding.AbstractMesh((1,), ("chip",), abstract_device=device)
            stack.enter_context(jax.sharding.use_abstract_mesh(mesh))
        yield
