"""Compile attention for a v6e, and lower it under settings of JAX; print which programs differ. Run as a subprocess."""

import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from offline_tpu.libtpu import describe_topology
from splash_attn import BlockSizes, Variant, attention

BLOCKS = BlockSizes(128, 128, 128)
VARIANTS = {
    "online": Variant("online", block_q_compute=128, lookahead=1),
    "fixed_bound": Variant(block_q_compute=128, lookahead=1),
    "int8": Variant(qk_dtype="int8", block_q_compute=128, lookahead=1),
    "xla": None,
}
PRECISIONS = ("default", "high", "highest", "bfloat16", "tensorfloat32", "float32", "BF16_BF16_F32_X3", "F32_F32_F32")
SETTINGS: dict[str, Any] = {
    "x64": {"jax_enable_x64": True},
    "x64 and highest": {"jax_enable_x64": True, "jax_default_matmul_precision": "highest"},  # torchax's accuracy mode
    "strict dtypes": {"jax_numpy_dtype_promotion": "strict", "jax_explicit_x64_dtypes": "error"},
    "strict ranks": {"jax_numpy_rank_promotion": "raise"},
    "debugging": {"jax_debug_nans": True, "jax_debug_infs": True, "jax_check_tracer_leaks": True},
    "checks": {"jax_enable_checks": True},
    "no jit": {"jax_disable_jit": True},
    "other defaults": {
        "jax_threefry_partitionable": False,
        "jax_softmax_custom_jvp": False,
        "jax_debug_key_reuse": True,
    },
}


def main(dtypes: list[str], every: bool) -> None:
    """Print which programs differ, as JSON; without `every` each setting is tried with one variant, by turns."""
    topology = describe_topology("v6e:2x2")
    mesh = Mesh(np.array(topology.devices[:1]), ("chip",))
    one_chip = NamedSharding(mesh, PartitionSpec())
    different: list[str] = []
    with jax.set_mesh(mesh):
        for number, (variant_name, variant) in enumerate(VARIANTS.items()):
            precisions = {f"precision {name}": {"jax_default_matmul_precision": name} for name in PRECISIONS}
            tried = list((SETTINGS | precisions).items())
            if not every:  # all of them are set aside in the same way
                tried = tried[number :: len(VARIANTS)]
            for dtype in dtypes:
                q = jax.ShapeDtypeStruct((1, 2, 130, 64), jnp.dtype(dtype), sharding=one_chip)
                call = functools.partial(attention, implementation="xla" if variant is None else "pallas_tpu")
                if variant is not None:
                    call = functools.partial(call, variant=variant, block_sizes=BLOCKS)
                plain = lower(call, q)
                plain.compile()
                expected = plain.as_text()
                for name, settings in tried:
                    where = f"{variant_name} {dtype} under {name}"
                    try:
                        if under(settings, lambda call=call, q=q: lower(call, q).as_text()) != expected:
                            different.append(f"{where}: another program")
                    except Exception as error:
                        different.append(f"{where}: {type(error).__name__}: {str(error)[:200]}")
    json.dump(different, sys.stdout)


def under(settings: dict[str, Any], make: Callable[[], str]) -> str:
    """Return what `make` makes with other values in jax.config."""
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        return make()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def lower(call: Callable[..., jax.Array], q: jax.ShapeDtypeStruct) -> jax.stages.Lowered:
    """What the TPU compiler is given, Mosaic's module included: the same text compiles to the same program."""
    jax.clear_caches()
    fn = jax.shard_map(call, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    return jax.jit(fn).lower(q, q, q)


if __name__ == "__main__":
    main([name for name in sys.argv[1:] if name != "all"], every="all" in sys.argv)
