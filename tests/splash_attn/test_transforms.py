"""attention under JAX's transformations, and traced on one platform for another."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import offline_tpu
from helpers import PLENTY_S, virtual_devices
from splash_attn import BlockSizes, Variant, api, attention

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 2, 24, 16)), jnp.float32)
N = np.asarray(X)
SMALL: dict[str, Any] = {
    "block_sizes": BlockSizes(128, 128, 128),
    "variant": Variant("online", block_q_compute=128, lookahead=1),
}
GATED = SMALL | {"variant": Variant(block_q_compute=128, lookahead=1)}
Attention = Callable[..., jax.Array]
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["xla", "pallas_interpret"])


def sharded(attend: Attention, check_vma: bool) -> jax.Array:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("x")
    return jax.shard_map(lambda q: attend(q, X, X), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)(X)


#: Each computes attention(X, X, X), with some of the three closed over.
CASES: dict[str, Callable[[Attention], Any]] = {
    "jit": lambda attend: jax.jit(lambda q: attend(q, X, X))(X),
    "jit of numpy": lambda attend: jax.jit(lambda q: attend(q, N, N))(X),
    "jit of values only": lambda attend: jax.jit(lambda: attend(X, N, X))(),
    "numpy": lambda attend: attend(N, N, N),
    "scan": lambda attend: lax.scan(lambda q, _: (X, attend(q, X, N)), X, length=1)[1][0],
    "fori_loop": lambda attend: lax.fori_loop(0, 1, lambda i, q: attend(q, X, X), X),
    "cond": lambda attend: lax.cond(X[0, 0, 0, 0] < 9, lambda q: attend(q, X, X), lambda q: q, X),
    "checkpoint": lambda attend: jax.checkpoint(lambda q: attend(q, X, X))(X),
    "vmap": lambda attend: jax.vmap(lambda q: attend(q[None], X[:1], X[:1])[0])(X)[:1],
    "vmap of vmap": lambda attend: jax.vmap(jax.vmap(attend))(X[None, None], X[None, None], X[None, None])[0, 0],
    "shard_map": lambda attend: sharded(attend, False),
}


#: Like others, for the kernel, which each of them compiles.
ALIKE = ("jit of numpy", "jit of values only", "fori_loop", "vmap of vmap")


@pytest.mark.compile
@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        pytest.param(name, way, marks=pytest.mark.slow("3 s") if way != "xla" and name in ALIKE else [])
        for name in CASES
        for way in ("xla", "pallas_interpret")
    ],
)
def test_some_arrays_closed_over(name: str, implementation: str) -> None:
    options = GATED if "vmap" in name else SMALL  # its grid depends on the data, which vmap cannot batch
    attend = functools.partial(attention, implementation=implementation, **options)
    expected = attention(X, X, X, implementation="xla")
    actual = CASES[name](attend)
    np.testing.assert_allclose(actual, expected[: actual.shape[0]], atol={"xla": 1e-6}.get(implementation, 2**-6))


def test_shard_map_that_checks_what_varies() -> None:
    actual = sharded(functools.partial(attention, implementation="xla"), True)
    np.testing.assert_allclose(actual, attention(X, X, X), atol=1e-6)


@IMPLEMENTATIONS
def test_eval_shape(implementation: str) -> None:
    attend = functools.partial(attention, implementation=implementation, **SMALL)
    assert jax.eval_shape(lambda q: attend(q, X, N), X).shape == X.shape


def test_bad_values_that_are_known_are_found_under_tracing_too() -> None:
    bad = X / 0
    with pytest.raises(ValueError, match="k holds NaN or infinity"):
        jax.jit(lambda: attention(X, bad, X))()


def test_values_are_waited_for_once() -> None:
    with mock.patch.object(jax, "device_get", wraps=jax.device_get) as device_get:
        attention(X, X, X)
        jax.jit(lambda q: attention(q, X, X))(X)
    assert device_get.call_count == 1


DERIVATIVES: dict[str, Callable[[Attention], Any]] = {
    "grad": lambda attend: jax.grad(lambda q: attend(q, X, X).sum())(X),
    "grad of v": lambda attend: jax.grad(lambda v: attend(X, X, v).sum())(X),
    "grad of jit": lambda attend: jax.jit(jax.grad(lambda k: jax.jit(attend)(X, k, X).sum()))(X),
    "jvp": lambda attend: jax.jvp(lambda q: attend(q, X, X), (X,), (X,)),
    "linearize": lambda attend: jax.linearize(lambda q: attend(q, X, X), X),
    "checkpoint": lambda attend: jax.grad(jax.checkpoint(lambda q: attend(q, X, X).sum()))(X),
    "vmap": lambda attend: jax.vmap(jax.grad(lambda q: attend(q[None], X[:1], X[:1]).sum()))(X),
}


@pytest.mark.compile
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives(name: str) -> None:
    """Those of the Pallas implementations are refused in one sentence; "xla", asked for or chosen, has them."""
    with pytest.raises(
        NotImplementedError, match=r"the Pallas kernel has no gradient yet; implementation='xla' has one"
    ):
        DERIVATIVES[name](functools.partial(attention, implementation="pallas_interpret", **SMALL))
    DERIVATIVES[name](attention)


SHAPE = jax.ShapeDtypeStruct((1, 2, 130, 64), jnp.bfloat16)
V6E = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu"))


@pytest.mark.parametrize("platforms", [["tpu"], ["cpu", "tpu"]])
def test_xla_that_was_chosen_is_not_lowered_for_a_tpu(platforms: list[str]) -> None:
    export = functools.partial(jax.export.export, platforms=platforms)
    with pytest.raises(
        ValueError, match="chose implementation='xla' when no TPU was in sight, and is now lowered for one"
    ):
        export(jax.jit(attention))(SHAPE, SHAPE, SHAPE)
    asked = functools.partial(attention, implementation="xla")
    assert export(jax.jit(asked))(SHAPE, SHAPE, SHAPE).platforms == tuple(platforms)


def test_lowered_for_a_tpu_with_its_mesh_in_context_it_is_the_kernel() -> None:
    with jax.sharding.use_abstract_mesh(V6E):
        exported = jax.export.export(jax.jit(functools.partial(attention, **SMALL)), platforms=["tpu"])
        assert "tpu_custom_call" in exported(SHAPE, SHAPE, SHAPE).mlir_module()


def test_the_cpu_of_a_tpu_host() -> None:
    """Where JAX's default is a TPU: jax.default_device, and arrays that are committed to the CPU, pick "xla"."""
    cpu, devices = jax.devices("cpu")[0], jax.devices
    tpu = mock.Mock(device_kind="TPU v6 lite")
    with mock.patch.object(jax, "devices", lambda backend=None: devices(backend) if backend else [tpu]):
        assert api._device_kind(X) == "TPU v6 lite"
        committed = jax.device_put(X, cpu)
        assert committed.committed
        assert attention(committed, committed, committed).devices() == {cpu}
        for default in (cpu, "cpu"):
            with jax.default_device(default):
                assert api._device_kind(X) == "cpu"
                jax.jit(lambda q: attention(q, q, q)).lower(X)


@pytest.mark.compile
@pytest.mark.parametrize("axes", ["Explicit", "Auto"])
def test_arrays_on_several_devices(axes: str) -> None:
    """Each device computes its heads, wherever JAX tells how they lie; XLA alone may divide otherwise."""
    environment = os.environ | {"XLA_FLAGS": virtual_devices(4), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "sharded_programs", axes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PLENTY_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    refused = {name for name, outcome in found.items() if isinstance(outcome, str)}
    divided = {name for name in found if "queries" in name and (axes == "Explicit" or "kernel" in name)}
    assert refused == divided | {"kernel, q alone"}
    assert all("expected q, k and v all alike, and by batch and heads only; use jax" in found[name] for name in refused)
    assert {name: error for name, error in found.items() if name not in refused and error > 0.02} == {}
    assert len(found) - len(refused) == (12 if axes == "Explicit" else 7)


@pytest.mark.compile
def test_compiled_for_a_slice_each_chip_has_its_heads() -> None:
    mesh = offline_tpu.topology_mesh("v6e-4", (4,), ("chips",))
    explicit = Mesh(mesh.devices, ("chips",), axis_types=(AxisType.Explicit,))
    share = jax.ShapeDtypeStruct((1, 2, 256, 64), "bfloat16")
    whole = jax.ShapeDtypeStruct(
        (1, 8, 256, 64), "bfloat16", sharding=NamedSharding(explicit, PartitionSpec(None, "chips"))
    )

    def call(q: jax.Array) -> jax.Array:
        return attention(q, q, q, **SMALL)

    of_share = offline_tpu.predict(call, share, device="v6e")
    of_whole = offline_tpu.predict(call, whole, topology="v6e-4", mesh=explicit)
    assert of_whole.cycles == pytest.approx(of_share.cycles, rel=0.01) and not of_whole.collectives


@IMPLEMENTATIONS
def test_vmap_over_nothing(implementation: str) -> None:
    how = {"implementation": implementation} | (SMALL if implementation != "xla" else {})
    out = jax.vmap(lambda q: attention(q, q, q, **how))(jnp.zeros((0, 1, 2, 24, 16), jnp.bfloat16))
    assert (out.shape, out.dtype) == ((0, 1, 2, 24, 16), jnp.bfloat16)
