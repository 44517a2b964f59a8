"""Programs of measured rows that are a few lines of JAX: matmuls, copies, collectives, one cross-entropy."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply [m, k] by [k, n], as XLA does it."""
    return x @ y


def copy(x: jax.Array) -> jax.Array:
    """Copy an array, as XLA does it."""
    return x.copy()


def pallas_matmul(block_m: int, block_k: int, block_n: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return the matmul of the JAX documentation (docs/pallas/tpu/matmul.ipynb): float32 accumulator in VMEM."""

    def kernel(x_ref: Any, y_ref: Any, out_ref: Any, acc_ref: Any, *, steps: int) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            acc_ref[...] = jnp.zeros_like(acc_ref)

        acc_ref[...] += jnp.dot(x_ref[...], y_ref[...], preferred_element_type=jnp.float32)

        @pl.when(pl.program_id(2) == steps - 1)
        def _() -> None:
            out_ref[...] = acc_ref[...].astype(out_ref.dtype)

    def multiply(x: jax.Array, y: jax.Array) -> jax.Array:
        (m, k), n = x.shape, y.shape[1]
        return pl.pallas_call(
            functools.partial(kernel, steps=k // block_k),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=0,
                grid=(m // block_m, n // block_n, k // block_k),
                in_specs=[
                    pl.BlockSpec((block_m, block_k), lambda i, j, step: (i, step)),
                    pl.BlockSpec((block_k, block_n), lambda i, j, step: (step, j)),
                ],
                out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, step: (i, j)),
                scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
            ),
            out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            name="pallas_matmul",
        )(x, y)

    return multiply


def chunked_cross_entropy(
    block_b: int, block_v: int, reduction: Literal["sum", "mean"], return_residuals: bool
) -> Callable[[jax.Array, jax.Array, jax.Array], Any]:
    """Return the loss of x @ w without its [tokens, vocabulary] logits, in two nested loops over blocks of both.

    What openxla/tokamax has as chunked_xla_linear_softmax_cross_entropy_loss since version 0.0.12: the same XLA ops in
    the same loops. The loss is float32; with residuals the log-sum-exp [tokens] comes too.
    """

    def loss(x: jax.Array, labels: jax.Array, w: jax.Array) -> Any:
        (tokens, features), vocabulary, dtype = x.shape, w.shape[1], x.dtype
        padded_b, padded_v = (size + -size % block for size, block in ((tokens, block_b), (vocabulary, block_v)))
        x = jnp.pad(x, ((0, padded_b - tokens), (0, 0)))
        labels = jnp.pad(labels, (0, padded_b - tokens))
        w = jnp.pad(w, ((0, 0), (0, padded_v - vocabulary)))

        def add_vocabulary(j: jax.Array, so_far: Any, start_b: jax.Array) -> Any:
            lse, minus_logits = so_far
            start_v = j * block_v
            labels_b = jax.lax.dynamic_slice(labels, (start_b,), (block_b,))
            x_b = jax.lax.dynamic_slice(x, (start_b, 0), (block_b, features))
            w_v = jax.lax.dynamic_slice(w, (0, start_v), (features, block_v))
            logits = jnp.dot(x_b, w_v).astype(dtype)
            lse = jnp.logaddexp(lse, jax.nn.logsumexp(logits, axis=-1))
            chosen = jax.nn.one_hot(labels_b - start_v, block_v, dtype=dtype)
            return lse, minus_logits - jnp.sum(logits * chosen, axis=-1)

        def add_tokens(i: jax.Array, so_far: Any) -> Any:
            lse, total = so_far
            start_b = i * block_b
            empty = jnp.full((block_b,), -jnp.inf, dtype), jnp.zeros((block_b,), dtype)
            add = functools.partial(add_vocabulary, start_b=start_b)
            lse_b, minus_logits = jax.lax.fori_loop(0, padded_v // block_v, add, empty)
            real = jax.lax.dynamic_slice(jnp.arange(padded_b) < tokens, (start_b,), (block_b,)).astype(dtype)
            total += jnp.sum(minus_logits * real) + jnp.sum(lse_b * real)
            return jax.lax.dynamic_update_slice(lse, lse_b, (start_b,)), total

        nothing = jnp.zeros(padded_b, dtype), jnp.array(0.0, dtype)
        lse, total = jax.lax.fori_loop(0, padded_b // block_b, add_tokens, nothing)
        total = (total / tokens if reduction == "mean" else total).astype(jnp.float32)
        return (total, (lse[:tokens],)) if return_residuals else total

    return loss


def gated_linear_unit(
    activation: Callable[[jax.Array], jax.Array] | None, precision: jax.lax.PrecisionLike
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return activation(x @ w[:, 0]) * (x @ w[:, 1]) of x [..., k] and w [k, 2, n], its product apart from the rest.

    What openxla/tokamax has as gated_linear_unit, but that nothing is fused with the product.
    """

    def gate(x: jax.Array, weights: jax.Array) -> jax.Array:
        product = jax.lax.optimization_barrier(jnp.einsum("...k,kjn->...jn", x, weights, precision=precision))
        wide = jax.lax.collapse(product, -2).astype(jnp.promote_types(x.dtype, jnp.float32))
        gates, values = jnp.split(wide, 2, axis=-1)
        return ((activation(gates) if activation else gates) * values).astype(x.dtype)

    return gate


def all_gather(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    """Return the gathering of an array that every device holds, along the first axis of a mesh."""

    def gather(x: jax.Array) -> jax.Array:
        return jax.lax.all_gather(x, mesh.axis_names[0], tiled=True)

    return _on_every_device(gather, mesh)


def psum(mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    """Return the sum over the devices of an array that every device holds."""

    def add(x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, mesh.axis_names)

    return _on_every_device(add, mesh)


def _on_every_device(fn: Callable[[jax.Array], jax.Array], mesh: jax.sharding.Mesh) -> Callable[[jax.Array], jax.Array]:
    everywhere = jax.sharding.PartitionSpec()
    return jax.shard_map(fn, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
