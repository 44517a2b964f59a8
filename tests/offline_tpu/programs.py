"""Programs whose cost is known, and the worker that predicts it: `python -m programs NAME ...` prints JSON.

A process of its own, because libtpu reads its flags once, when it loads. Each program is a function that returns
(function, abstract arguments, further arguments of `predict`).
"""

import contextlib
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import offline_tpu
from offline_tpu.machine import devices

Program = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
V6E = devices.by_name("v6e")
TRIPS, STEPS, HEAVY_STEPS = 42, 8, 3
TILE = 256


def _array(*shape: int, dtype: str = "bfloat16") -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def matmul() -> Program:
    return lambda a, b: a @ b, (_array(4096, 4096), _array(4096, 4096)), {}


def small_matmul() -> Program:
    return lambda a, b: a @ b, (_array(1024, 1024), _array(1024, 1024)), {}


def small_matmul_with_less_vmem() -> Program:
    return *small_matmul()[:2], {"compiler_options": {"xla_tpu_scoped_vmem_limit_kib": 2048}}


def copy() -> Program:
    import jax.numpy as jnp

    return jnp.copy, (_array(8192, 8192),), {}


def repeated() -> Program:
    """Six layers; the compiler makes fewer programs than that."""

    def layers(x: Any, *weights: Any) -> Any:
        import jax.numpy as jnp

        return functools.reduce(lambda y, w: jnp.tanh(y @ w), weights, x)

    return layers, (_array(1024, 1024),) * 7, {}


def scan() -> Program:
    def layers(x: Any, weights: Any) -> Any:
        import jax
        import jax.numpy as jnp

        return jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, weights)[0]

    return layers, (_array(1024, 1024), _array(TRIPS, 1024, 1024)), {}


def data_dependent_loop(**options: Any) -> Program:
    def layers(n: Any, x: Any) -> Any:
        import jax
        import jax.numpy as jnp

        return jax.lax.fori_loop(0, n[0], lambda _, y: jnp.tanh(y @ x), x)

    return layers, (_array(1, dtype="int32"), _array(1024, 1024)), options


def named_loop() -> Program:
    return data_dependent_loop(trip_counts={"while": TRIPS})


def conditional() -> Program:
    def either(p: Any, x: Any) -> Any:
        import jax
        import jax.numpy as jnp

        return jax.lax.cond(p[0] > 0, lambda y: y @ y, jnp.sin, x)

    return either, (_array(1, dtype="int32"), _array(2048, 2048)), {}


def _kernel(body: Callable[..., None], name: str, *, steps: int = STEPS, prefetched: Any = None) -> Callable[..., Any]:
    """A Pallas kernel over one [TILE, TILE] array; `body(step, multiply, refs)` calls multiply for one matmul."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    def kernel(*refs: Any) -> None:
        *scalars, x_ref, o_ref = refs

        def multiply() -> None:
            o_ref[...] = jnp.dot(o_ref[...], x_ref[...], preferred_element_type=jnp.float32).astype(o_ref.dtype)

        body(pl.program_id(0), multiply, scalars)

    block = pl.BlockSpec((TILE, TILE), lambda *_: (0, 0))
    call = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=0 if prefetched is None else 1, grid=(steps,), in_specs=[block], out_specs=block
        ),
        out_shape=jax.ShapeDtypeStruct((TILE, TILE), jnp.bfloat16),
        name=name,
    )
    return call if prefetched is None else functools.partial(call, prefetched)


def _pallas(body: Callable[..., None], **options: Any) -> Program:
    return lambda x: _kernel(body, "kernel", **options)(x), (_array(TILE, TILE),), {}


def one_matmul() -> Program:
    return _pallas(lambda step, multiply, _: multiply(), steps=1)


def two_matmuls() -> Program:
    def body(step: Any, multiply: Callable[[], None], _: Any) -> None:
        multiply()
        multiply()

    return _pallas(body, steps=1)


def rows_of_half_a_lane() -> Program:
    """JAX lays these out with the long axis innermost, and a Pallas kernel takes them as they are written."""
    import jax
    from jax.experimental import pallas as pl

    def double(x_ref: Any, o_ref: Any) -> None:
        o_ref[...] = x_ref[...] * 2

    def call(x: Any) -> Any:
        block = pl.BlockSpec((1024, 64), lambda i: (i, 0))
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(double, grid=(8,), in_specs=[block], out_specs=block, out_shape=out, name="double")(x)

    return call, (_array(8192, 64, dtype="float32"),), {}


def rows_as_the_kernel_has_them() -> Program:
    return *rows_of_half_a_lane()[:2], {"auto_layouts": True}


def two_branches() -> Program:
    from jax.experimental import pallas as pl

    def body(step: Any, multiply: Callable[[], None], _: Any) -> None:
        pl.when(step < HEAVY_STEPS)(multiply)

        @pl.when(step >= HEAVY_STEPS)
        def _() -> None:
            multiply()
            multiply()

    return _pallas(body)


def _loop(trips: int, multiply: Callable[[], None], **options: Any) -> None:
    import jax

    def once(_: Any, carry: None) -> None:
        multiply()
        return carry

    jax.lax.fori_loop(0, trips, once, None, **options)


def nested_loops() -> Program:
    return _pallas(lambda step, multiply, _: _loop(3, lambda: _loop(5, multiply)))


def unrolled_loop() -> Program:
    return _pallas(lambda step, multiply, _: _loop(10, multiply, unroll=2))


def fixed_branch() -> Program:
    """Which steps work is in a constant that the kernel prefetches."""
    import numpy as np
    from jax.experimental import pallas as pl

    def body(step: Any, multiply: Callable[[], None], scalars: Any) -> None:
        pl.when(scalars[0][step] == 1)(multiply)

    def call(x: Any) -> Any:
        return _kernel(body, "kernel", prefetched=np.array([0, 1, 1, 0, 0, 1, 0, 0], np.int32))(x)

    return call, (_array(TILE, TILE),), {}


def data_dependent_branch() -> Program:
    from jax.experimental import pallas as pl

    def body(step: Any, multiply: Callable[[], None], scalars: Any) -> None:
        pl.when(scalars[0][step] == 1)(multiply)

    def call(flags: Any, x: Any) -> Any:
        return _kernel(body, "kernel", prefetched=flags)(x)

    return call, (_array(STEPS, dtype="int32"), _array(TILE, TILE)), {}


def traced_grid(**options: Any) -> Program:
    def call(steps: Any, x: Any) -> Any:
        return _kernel(lambda step, multiply, _: multiply(), "traced", steps=steps[0])(x)

    return call, (_array(1, dtype="int32"), _array(TILE, TILE)), options


def named_traced_grid() -> Program:
    return traced_grid(grid_sizes={"traced": STEPS}, slow_grid_sizes={"traced": 3 * STEPS})


def longer_traced_grid() -> Program:
    return traced_grid(grid_sizes={"traced": 3 * STEPS})


def growing_body(statements: int) -> Program:
    """A kernel whose loop of STEPS is some 16 bundles of code a statement."""
    import jax
    from jax.experimental import pallas as pl

    def body(x_ref: Any, o_ref: Any) -> None:
        x = x_ref[...]
        for number in range(statements):
            x = x * x + (1.0 + number)
        o_ref[...] = x

    block = pl.BlockSpec((256, 128), lambda step: (step, 0))
    x = _array(STEPS * 256, 128, dtype="float32")
    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    call = pl.pallas_call(body, grid=(STEPS,), in_specs=[block], out_specs=block, out_shape=out, name="growing")
    return call, (x,), {}


def loop_of_64720_bundles() -> Program:
    return growing_body(4040)


def loop_of_72080_bundles() -> Program:
    return growing_body(4500)


def _sharded(fn: Callable[..., Any], shapes: list[tuple[int, ...]], specs: list[Any], out: Any) -> Program:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    mesh = offline_tpu.topology_mesh("v6e-8", (2, 4), ("data", "model"))
    args = tuple(
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    )
    return jax.jit(fn, out_shardings=NamedSharding(mesh, out)), args, {"mesh": mesh}


def all_reduce() -> Program:
    import jax
    from jax.sharding import PartitionSpec as P

    def total(x: Any) -> Any:
        return jax.shard_map(
            lambda part: jax.lax.psum(part, ("data", "model")),
            in_specs=P(("data", "model")),
            out_specs=P(),
            check_vma=False,
        )(x)

    return _sharded(total, [(8 * 4096, 4096)], [P(("data", "model"))], P())


def all_to_all() -> Program:
    import jax
    from jax.sharding import PartitionSpec as P

    def swap(x: Any) -> Any:
        return jax.shard_map(
            lambda part: jax.lax.all_to_all(part, "model", 1, 0, tiled=True),
            in_specs=P("data", "model"),
            out_specs=P("data", "model"),
            check_vma=False,
        )(x)

    return _sharded(swap, [(8192, 8192)], [P("data", "model")], P("data", "model"))


def all_to_all_of_eight() -> Program:
    import jax
    from jax.sharding import PartitionSpec as P

    axes = ("data", "model")

    def swap(x: Any) -> Any:
        return jax.shard_map(
            lambda part: jax.lax.all_to_all(part, axes, 1, 0, tiled=True),
            in_specs=P(None, axes),
            out_specs=P(axes),
            check_vma=False,
        )(x)

    return _sharded(swap, [(8192, 8192)], [P(None, axes)], P(axes))


def scan_in_shard_map() -> Program:
    """Each chip scans over its own weights, and all add up what they have after every trip."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    def layer(y: Any, w: Any) -> Any:
        return jax.lax.psum(jnp.tanh(y @ w), "model"), None

    def layers(x: Any, weights: Any) -> Any:
        return jax.shard_map(
            lambda y, w: jax.lax.scan(layer, y, w)[0],
            in_specs=(P("data", None), P(None, None, None)),
            out_specs=P("data", None),
            check_vma=False,
        )(x, weights)

    shapes, specs = [(2048, 1024), (TRIPS, 1024, 1024)], [P("data", None), P(None, None, None)]
    return _sharded(layers, shapes, specs, P("data", None))


def tensor_parallel() -> Program:
    """Four layers, each with one all-reduce over four chips."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    def layers(x: Any, up: Any, down: Any) -> Any:
        def layer(y: Any, weights: Any) -> Any:
            with jax.named_scope("mlp"):
                return (jax.nn.gelu(y @ weights[0]) @ weights[1]).astype(jnp.bfloat16), None

        return jax.lax.scan(layer, x, (up, down))[0]

    shapes = [(8192, 1024), (4, 1024, 4096), (4, 4096, 1024)]
    specs = [P("data", None), P(None, None, "model"), P(None, "model", None)]
    return _sharded(layers, shapes, specs, P("data", None))


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(offline_tpu.worker_environment(V6E, Path(folder) / "dump"))
        found = {}
        for name in names:
            with contextlib.redirect_stdout(sys.stderr):
                fn, args, options = globals()[name]()
                found[name] = offline_tpu.predict(fn, *args, device=V6E, **options).to_dict()
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
