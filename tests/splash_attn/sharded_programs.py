"""Calls attention with arrays on several devices: `python -m sharded_programs` prints each error, or refusal, as JSON.

One of two devices computes each head. There are more devices than that: JAX's interpreter of a kernel waits for ever
where XLA has as many threads as devices.
"""

import json
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from splash_attn import BlockSizes, Variant, attention

X = np.random.default_rng(0).standard_normal((2, 4, 24, 16)).astype(np.float32)
HOW = {
    "xla": {"implementation": "xla"},
    "kernel": {
        "implementation": "pallas_interpret",
        "block_sizes": BlockSizes(128, 128, 128),
        "variant": Variant(block_q_compute=128, lookahead=1),
    },
}
SPECS = {
    "heads": PartitionSpec(None, "chips"),
    "batch": PartitionSpec("chips"),
    "all": PartitionSpec(),
    "queries": PartitionSpec(None, None, "chips"),
}


def attempt(call: Callable[[], jax.Array]) -> float | str:
    """Return the largest difference from one device's result, or what was refused."""
    try:
        found = call()
    except ValueError as error:
        return str(error)
    return float(np.abs(np.asarray(found) - np.asarray(attention(X, X, X, implementation="xla"))).max())


def run(axis_type: AxisType) -> dict[str, float | str]:
    """Return what became of each call on a mesh of such axes."""
    mesh = jax.make_mesh((2,), ("chips",), axis_types=(axis_type,), devices=jax.devices()[:2])
    found: dict[str, float | str] = {}
    for division, spec in SPECS.items():
        x = jax.device_put(X, NamedSharding(mesh, spec))
        for name, how in HOW.items():

            def call(q: jax.Array, how: dict = how) -> jax.Array:
                return attention(q, q, q, **how)

            found[f"{name}, {division}"] = attempt(lambda call=call, x=x: call(x))
            if axis_type is AxisType.Explicit:
                found[f"{name}, {division}, jit"] = attempt(lambda call=call, x=x: jax.jit(call)(x))
    one = jax.device_put(X, NamedSharding(mesh, SPECS["heads"]))
    found["kernel, q alone"] = attempt(lambda: attention(one, X, X, **HOW["kernel"]))
    return found


if __name__ == "__main__":
    json.dump(run(AxisType[sys.argv[1]]), sys.stdout)
