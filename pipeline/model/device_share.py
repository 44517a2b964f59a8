"""One device's part of a plan: which rows and heads it has, and how it talks to the others of its prompt."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pipeline.model.latents import TokenLayout
from pipeline.model.layers import int8
from pipeline.model.layers.int8 import Quantized
from pipeline.model.layers.linears import Weights
from pipeline.model.layers.norms import Rotary
from pipeline.model.sharding import KV, MODEL, SEQUENCE, ParallelPlan
from pipeline.model.weights import BLOCKS

#: Of the heads of a device, the first that divides them: while it attends to those of one, those of another are on
#: their way.
_GROUPS = (2, 3)


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """One device's part of a plan: which rows it has, and how it talks to the others of its prompt.

    Within shard_map, unless the plan uses the stock block, which sees the whole arrays.
    """

    plan: ParallelPlan
    layout: TokenLayout

    def row_ids(self) -> Int[Array, " rows"]:
        """Return where this device's rows lie in the joint sequence."""
        start = lax.axis_index(SEQUENCE) * self.layout.rows_per_shard if self._splits else 0
        return start + jnp.arange(self.layout.rows_per_shard)

    def local_text(self, text: Float[Array, "batch text channels"]) -> Float[Array, "batch rows channels"]:
        """Put text tokens at their rows; other rows are arbitrary."""
        if not self._splits:
            return jnp.pad(text, ((0, 0), (0, self.layout.rows - self.layout.text), (0, 0)))
        rows = self.layout.rows_per_shard
        text = jnp.pad(text, ((0, 0), (0, -self.layout.text % rows), (0, 0)))
        return lax.dynamic_slice_in_dim(text, lax.axis_index(SEQUENCE) * rows, rows, axis=1)

    def to_heads(self, x: Float[Array, "b heads d rows"], keys: bool) -> Float[Array, "parts b local_heads d rows"]:
        """Exchange some rows of all heads for more rows of some heads, for attention; the first heads fill up.

        keys: whether these are keys or values, of which each device needs all rows; queries are those of "model".
        Returns the parts of the sequence side by side.
        """
        if not self._splits:
            return x[None]
        missing = -x.shape[1] % self.plan.model
        x = jnp.concatenate([x, x[:, :missing]], axis=1) if missing else x
        x = x.reshape(x.shape[0], self.plan.model, -1, *x.shape[2:])
        # Not along rows: XLA would copy what it received twice.
        received = lax.all_to_all(x, MODEL, split_axis=1, concat_axis=0)
        return lax.all_gather(received, KV, axis=0, tiled=True) if keys and self.plan.kv > 1 else received

    @jax.named_scope("rotary_of_heads")
    def rotary_of_heads(self, rotary: Rotary) -> tuple[Rotary, Rotary]:
        """Return the tables of the rows that `to_heads` brings together, of queries and of keys."""
        if rotary is None or not self._splits:
            return rotary, rotary
        cos, sin = (lax.all_gather(table, MODEL, axis=1, tiled=True) for table in rotary)
        if self.plan.kv == 1:
            return (cos, sin), (cos, sin)
        of_keys = (lax.all_gather(cos, KV, axis=1, tiled=True), lax.all_gather(sin, KV, axis=1, tiled=True))
        return (cos, sin), of_keys

    def to_rows(self, x: Float[Array, "b local_heads d more_rows"], num_heads: int) -> Float[Array, "b heads d rows"]:
        """Invert `to_heads` of queries."""
        if not self._splits:
            return x
        x = lax.all_to_all(jnp.stack(jnp.split(x, self.plan.model, axis=3)), MODEL, split_axis=0, concat_axis=1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :num_heads]

    def head_groups(self, num_heads: int) -> int:
        """Return in how many groups heads are attended to: one is exchanged beside another's attention."""
        if not self._splits:
            return 1
        return next((groups for groups in _GROUPS if num_heads % (self.plan.model * groups) == 0), 1)

    def attended_rows(self, parts: Sequence[jax.Array], num_heads: int, quantize: bool) -> jax.Array | Quantized:
        """Exchange attention's output, in groups of heads, as `to_rows` does; in int8 with half the bytes."""
        if not quantize:
            return jnp.concatenate([self.to_rows(each, num_heads // len(parts)) for each in parts], axis=1)
        wide = [x.astype(jnp.float32) for x in parts]
        largest = functools.reduce(jnp.maximum, (jnp.abs(x).max((1, 2)) for x in wide))
        step = int8.scale_of(lax.pmax(largest, MODEL) if self.plan.model > 1 else largest)
        values = [self.to_rows(int8.to_steps(x, step[:, None, None]), num_heads // len(parts)) for x in wide]
        if self._splits:
            rows = self.layout.rows_per_shard
            step = lax.dynamic_slice_in_dim(step, lax.axis_index(MODEL) * rows, rows, axis=1)
        return Quantized(jnp.concatenate(values, axis=1), step)

    def quantize_hidden(self, x: Float[Array, "b rows hidden"], weights: Weights, dtype: Any) -> Quantized:
        """Quantize what the feed-forward's activation leaves, in float32; read once more in `dtype`."""
        x = x * weights[f"ff.net.2.{int8.SMOOTHING}"]
        largest = jnp.abs(x).max(-1)
        step = int8.scale_of(lax.pmax(largest, MODEL) if self.plan.sums_partial_products else largest)
        rounded, step = lax.optimization_barrier((x.astype(dtype), step))
        return Quantized(lax.optimization_barrier(int8.to_steps(rounded.astype(jnp.float32), step[..., None])), step)

    @jax.named_scope("all_reduce")
    def reduce(self, x: jax.Array) -> jax.Array:
        """Sum over devices that each hold a part of a contraction."""
        return lax.psum(x, MODEL) if self.plan.sums_partial_products else x

    @jax.named_scope("gather_weights")
    def whole_weights(self, weights: Weights) -> Weights:
        """Gather one layer's weights where they are split at rest."""
        if not self.plan.gathers_weights:
            return weights
        return {
            name: lax.all_gather(value, MODEL, axis=0, tiled=True) if self.plan.weight_spec(BLOCKS + name) else value
            for name, value in weights.items()
        }

    @property
    def _splits(self) -> bool:
        return self.plan.sequence_shards > 1
