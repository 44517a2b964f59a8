"""The chips that are here as the jobs see them: random data on them, compiled programs, and times by the profiler."""

import contextlib
import dataclasses
import functools
import math
import os
import pkgutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from splash_attn.api import Implementation
from splash_workbench.accelerator import accelerator_visible
from splash_workbench.program import Program
from tuning.backends import device_times
from tuning.backends.device_times import Measurement, NoDeviceTimesError

#: Seconds of runs that are enough of one program, and the fewest and the most of them.
_ENOUGH_S, _FEWEST, _MOST = 5.0, 2, 20
#: Fewer samples do not say how they are spread.
_TELLING = 6
_TARGET_CI_FRACTION = 0.01
#: How often devices are asked for again, and the seconds between.
_ATTEMPTS, _PAUSE_S = 4, 5.0


class Chip:
    """All devices that JAX finds here. Tests play one: what they override says nothing of how times are read."""

    def __init__(self, devices: Sequence[jax.Device]) -> None:
        self.devices = devices
        self.platform = devices[0].platform
        self.device_kind = devices[0].device_kind

    @property
    def checked(self) -> Implementation:
        """The implementation by which the kernel's numbers are checked here."""
        return "pallas_tpu" if self.platform == "tpu" else "pallas_interpret"

    @property
    def timed(self) -> Implementation:
        """The implementation that is worth timing here."""
        return "pallas_tpu" if self.platform == "tpu" else "xla"

    def memory_stats(self) -> dict[str, int]:
        """Return what the allocator of the first device says; nothing where it says nothing, as on a CPU."""
        return self.devices[0].memory_stats() or {}

    @property
    def hbm_bytes(self) -> int | None:
        """Memory of one device that programs can have; None where not known."""
        return self.memory_stats().get("bytes_limit")

    def prepare(self, program: Program) -> "Prepared":
        """Compile a program, and make random data for it."""
        leaves, tree = jax.tree.flatten(program.arguments)
        data = [random_like(leaf, program.scale, seed) for seed, leaf in enumerate(leaves)]
        with jax.set_mesh(program.mesh) if program.mesh is not None else contextlib.nullcontext():
            arguments = list(jax.tree.unflatten(tree, data))
            return Prepared(program, arguments, program.jitted.lower(*arguments).compile())

    def profile(self, run: Callable[[], object], count: int) -> Any:
        """Return the profile, an XSpace, of so many runs."""
        return device_times.record_profile(run, count)

    def time(self, run: Callable[[], object], kernel: str = "") -> Measurement:
        """Time what runs a program once by the profiler; by the clock, and say so, where the profile has no runs.

        kernel: text in the names of the ops whose time is told apart.
        """
        (warm_up,) = device_times.by_wall_clock(run, 1)
        count = min(_MOST, max(_FEWEST, math.ceil(_ENOUGH_S * 1e3 / max(warm_up.time_ms, 1e-3))))
        notes: list[str] = []
        try:
            if self.platform == "cpu":
                raise NoDeviceTimesError("a CPU has no device plane in the profile")
            runs = device_times.runs_of(self.profile(run, count), count, kernel)
        except NoDeviceTimesError as error:
            runs = device_times.by_wall_clock(run, count)
            notes.append(f"wall time, dispatch included: {error}")
        if len(runs) >= _TELLING:
            notes += device_times.quality_notes([each.time_ms for each in runs], _TARGET_CI_FRACTION)
        return device_times.measurement_of(runs, notes)


@dataclasses.dataclass
class Prepared:
    """A compiled program and its arguments, which change where the program takes them over."""

    program: Program
    arguments: list[Any]
    compiled: Callable[..., Any]

    def run(self) -> Any:
        """Run once; return the results."""
        results = self.compiled(*self.arguments)
        for argument, place in self.program.carried.items():
            self.arguments[argument] = results[place]
        return results


def find_chip() -> Chip:
    """Return the devices of this machine; wait some seconds for those that a process before has not yet given back.

    Raises:
      RuntimeError: there are none; or there are, and JAX has only the CPU.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            devices = jax.devices()
            break
        except RuntimeError:
            if attempt == _ATTEMPTS:
                raise
            time.sleep(_PAUSE_S)
    if devices[0].platform == "cpu" and accelerator_visible() and not os.environ.get("JAX_PLATFORMS"):
        raise RuntimeError(
            "an accelerator is here, and JAX has only the CPU: end the process that uses it, or pip install 'jax[tpu]' "
            "(for a GPU 'jax[cuda13]'); JAX_PLATFORMS=cpu checks the CPU."
        )
    return Chip(devices)


def chip_named(name: str) -> Chip:
    """Return the chip that a function makes, "package.module:function"."""
    return pkgutil.resolve_name(name)()


def random_like(leaf: Any, scale: float, seed: int) -> Any:
    """Return an array like a ShapeDtypeStruct, laid out as it says: floats of that deviation, integers 0 and 1, True.

    Made where it lies, with no more memory than it takes itself. What is an array already is returned as it is.
    """
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return _maker(leaf.shape, jnp.dtype(leaf.dtype), leaf.sharding, scale)(jnp.uint32(seed))


@functools.cache
def _maker(shape: tuple[int, ...], dtype: Any, sharding: Any, scale: float) -> Any:
    def make(seed: jax.Array) -> jax.Array:
        # A hash of each element's place: jax.random's bits would take twice the array's own memory beside it.
        bits = jnp.full(shape, seed * jnp.uint32(0x9E3779B9), jnp.uint32)
        for axis in range(len(shape)):
            bits = (bits ^ lax.broadcasted_iota(jnp.uint32, shape, axis)) * jnp.uint32(0x85EBCA6B)
            bits ^= bits >> 15
        bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
        bits ^= bits >> 16
        if dtype == jnp.bool_:
            return jnp.ones(shape, bool)
        if jnp.issubdtype(dtype, jnp.integer):
            return ((bits >> 16) & 1).astype(dtype)
        unit = (bits >> 8).astype(jnp.float32) / 2**24 - 0.5
        return (unit * (scale * math.sqrt(12))).astype(dtype)

    return jax.jit(make, out_shardings=sharding)
