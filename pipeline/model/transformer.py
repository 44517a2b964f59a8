"""CogVideoX's transformer as a function of arrays, written for one device's share of the work.

It computes what diffusers' CogVideoXTransformer3DModel computes for every published CogVideoX, from the same weights,
on tokens: rows are the text tokens, then the video's patches, then padding, which is dropped before attention and never
seen by anyone. What differs between the models is data: patches, rotary tables, added positions, an image, `ofs`.
Queries, keys and values are made in the layout that the attention kernel reads, [batch, heads, head_dim, sequence].

Matrix products, residuals and activations are in the weights' dtype (bfloat16 as published), accumulated in float32.
Statistics and affine parts of norms, rotary embedding, gates and activation functions are computed in float32 and
rounded once. Stock rounds to bfloat16 between these steps: in bfloat16 this is closer to float32 than stock is, and in
float32 it differs in the order of sums only.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from pipeline.model.sharding import MODEL, ParallelPlan
from pipeline.model.weights import BLOCKS
from pipeline.requests.errors import CheckpointError

QK_NORM_EPS = 1e-6  # fixed in diffusers' CogVideoXBlock
Weights = Mapping[str, jax.Array]
#: [batch, heads, head_dim, sequence] three times -> the same shape as the first.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
#: Cosines and sines, float32 [head_dim / 2, rows] each, 1 and 0 where the row is no video token; None without rotation.
Rotary = tuple[jax.Array, jax.Array] | None

_EXPECTED = {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "norm_elementwise_affine": True}
#: Names of sizes in transformer/config.json, and those of them that a model may do without.
_SIZE = re.compile(r"num_\w+|patch_size(_t)?|sample_\w+|\w+_(dim|channels|length)")
_OPTIONAL = ("patch_size_t", "ofs_embed_dim")
_OFS = 2.0  # fixed in diffusers' CogVideoXImageToVideoPipeline


@dataclasses.dataclass(frozen=True)
class TransformerShape:
    """The fields of transformer/config.json that the program uses. Raises CheckpointError for another architecture.

    in_channels: those beyond out_channels are an image's. patch_size_t: 1 in CogVideoX 1.0. ofs_embed_dim: None without
    the `ofs` embedding. learned_positions: whether the checkpoint has positions to be added.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    patch_size: int
    patch_size_t: int
    norm_eps: float
    flip_sin_to_cos: bool
    freq_shift: int
    ofs_embed_dim: int | None
    rotary: bool
    learned_positions: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the shape of a configuration with all of diffusers' defaults filled in (`module.config`)."""
        wrong = [
            (name, f"{value!r} as in CogVideoX 1.5") for name, value in _EXPECTED.items() if config.get(name) != value
        ]
        wrong += [
            (name, "a whole number above 0")
            for name, value in config.items()
            if _SIZE.fullmatch(name)
            and (type(value) is not int or value < 1)
            and not (value is None and name in _OPTIONAL)
        ]
        if not wrong and config["attention_head_dim"] % 16:
            wrong = [("attention_head_dim", "a multiple of 16, whose rotary pairs divide over time, height and width")]
        if not wrong and config["in_channels"] not in (config["out_channels"], 2 * config["out_channels"]):
            wrong = [("in_channels", "out_channels, or twice as many: an image beside the noise")]
        if not wrong and config["ofs_embed_dim"] not in (None, config["time_embed_dim"]):
            wrong = [("ofs_embed_dim", f"null or time_embed_dim, {config['time_embed_dim']}, to which it is added")]
        if wrong:
            name, expected = wrong[0]
            raise CheckpointError(f"transformer/config.json: {name}={config.get(name)!r}, expected {expected}")
        renamed = {
            "num_heads": "num_attention_heads",
            "head_dim": "attention_head_dim",
            "rotary": "use_rotary_positional_embeddings",
            "learned_positions": "use_learned_positional_embeddings",
        }
        fields = {each.name: config[renamed.get(each.name, each.name)] for each in dataclasses.fields(cls)}
        return cls(**{**fields, "patch_size_t": fields["patch_size_t"] or 1})

    @property
    def patch_channels(self) -> int:
        """Return the channels of a patch of the sample."""
        return self.out_channels * self.patch_size_t * self.patch_size**2

    @property
    def takes_image(self) -> bool:
        return self.in_channels > self.out_channels

    @property
    def condition_channels(self) -> dict[str, int]:
        """Return the channels of further arguments: an image's patches, and positions to add; [rows, channels] each."""
        found = {"image": (self.in_channels - self.out_channels) * self.patch_size_t * self.patch_size**2}
        if self.learned_positions or not self.rotary:
            found["positions"] = self.num_heads * self.head_dim
        return {name: channels for name, channels in found.items() if channels}


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Rows of the joint sequence: text, video, padding. padded: up to whole tiles, needed where rows are split."""

    text: int
    video: int
    num_shards: int
    padded: bool = True

    @property
    def tokens(self) -> int:
        return self.text + self.video

    @property
    def rows_per_shard(self) -> int:
        if not self.padded:
            assert self.num_shards == 1, self
            return self.tokens
        rows = -(-self.tokens // self.num_shards)
        multiple = 128 if rows >= 2048 else 8  # the lane count, where that costs little
        return -(-rows // multiple) * multiple

    @property
    def rows(self) -> int:
        return self.num_shards * self.rows_per_shard


@dataclasses.dataclass(frozen=True)
class DeviceShare:
    """One device's part of a plan: which rows it has, and how it talks to the others of its prompt.

    Within shard_map, unless the plan uses the stock block, which sees the whole arrays.
    """

    plan: ParallelPlan
    layout: TokenLayout

    def row_ids(self) -> Int[Array, " rows"]:
        """Return where this device's rows lie in the joint sequence."""
        start = lax.axis_index(MODEL) * self.layout.rows_per_shard if self._splits else 0
        return start + jnp.arange(self.layout.rows_per_shard)

    def local_text(self, text: Float[Array, "batch text channels"]) -> Float[Array, "batch rows channels"]:
        """Put text tokens at their rows; other rows are arbitrary."""
        if not self._splits:
            return jnp.pad(text, ((0, 0), (0, self.layout.rows - self.layout.text), (0, 0)))
        rows = self.layout.rows_per_shard
        text = jnp.pad(text, ((0, 0), (0, -self.layout.text % rows), (0, 0)))
        return lax.dynamic_slice_in_dim(text, lax.axis_index(MODEL) * rows, rows, axis=1)

    def to_heads(self, x: Float[Array, "b heads d rows"]) -> Float[Array, "b local_heads d all_rows"]:
        """Exchange some rows of all heads for all rows of some heads, for attention; the first heads fill up."""
        if not self._splits:
            return x
        missing = -x.shape[1] % self.plan.model
        x = jnp.concatenate([x, x[:, :missing]], axis=1) if missing else x
        return lax.all_to_all(x, MODEL, split_axis=1, concat_axis=3, tiled=True)

    def to_rows(self, x: Float[Array, "b local_heads d all_rows"], num_heads: int) -> Float[Array, "b heads d rows"]:
        """Invert `to_heads`."""
        x = lax.all_to_all(x, MODEL, split_axis=3, concat_axis=1, tiled=True) if self._splits else x
        return x if x.shape[1] == num_heads or not self._splits else x[:, :num_heads]

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


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Normalize over the last axis in float32, whatever the dtypes. Returns float32."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + eps) * weight.astype(jnp.float32) + bias.astype(jnp.float32)


def linear(x: jax.Array, weights: Weights, name: str) -> jax.Array:
    """Return x @ weight^T + bias, where there is one, in x's dtype. x: [..., in]."""
    out, bias = jnp.einsum("...i,oi->...o", x, weights[f"{name}.weight"]), weights.get(f"{name}.bias")
    return out if bias is None else out + bias


def scalar_embedding(
    weights: Weights, shape: TransformerShape, name: str, num_waves: int, value: jax.Array, dtype: Any
) -> jax.Array:
    """Embed a number, [time_embed_dim], as diffusers' Timesteps (float32) and TimestepEmbedding (in dtype)."""
    half = num_waves // 2
    exponent = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - shape.freq_shift)
    angles = value.astype(jnp.float32) * jnp.exp(exponent)
    waves = [jnp.sin(angles), jnp.cos(angles)]
    embedding = jnp.concatenate(waves[::-1] if shape.flip_sin_to_cos else waves).astype(dtype)
    embedding = jax.nn.silu(linear(embedding, weights, f"{name}.linear_1"))
    return linear(embedding, weights, f"{name}.linear_2")


def _modulate(x: jax.Array, weights: Weights, name: str, modulation: jax.Array, is_text: jax.Array, eps: float) -> Any:
    """Normalize, shift and scale by kind of row. Returns that in x's dtype, and the gate, float32 [rows, channels]."""
    shift, scale, gate, text_shift, text_scale, text_gate = jnp.split(modulation.astype(jnp.float32), 6)

    def by_row(text: jax.Array, video: jax.Array) -> jax.Array:
        return jnp.where(is_text[:, None], text, video)

    normed = layer_norm(x, weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"], eps)
    modulated = normed * (1 + by_row(text_scale, scale)) + by_row(text_shift, shift)
    # Computed once, here: XLA would otherwise compute it anew for every tile of the product that reads it; and with
    # channels last in memory, which the feed-forward's products want, though q, k and v would have it otherwise.
    modulated = with_layout_constraint(lax.optimization_barrier(modulated.astype(x.dtype)), Layout((0, 1, 2)))
    return modulated, by_row(text_gate, gate)


def _heads(x: jax.Array, weights: Weights, name: str, head_dim: int) -> jax.Array:
    """Project [batch, rows, channels] to [batch, heads, head_dim, rows], the bias added, in x's dtype."""
    weight = weights[f"{name}.weight"]
    out = jnp.einsum("bsc,hdc->bhds", x, weight.reshape(-1, head_dim, weight.shape[1]))
    bias = weights.get(f"{name}.bias")
    return out if bias is None else out + bias.reshape(-1, head_dim)[:, :, None]


def _norm_rotary(x: jax.Array, weights: Weights, name: str, rotary: Rotary) -> jax.Array:
    """Apply LayerNorm over head_dim, then rotary embedding of the halves. x: [batch, heads, head_dim, rows]."""
    normed = x.astype(jnp.float32)
    mean = normed.mean(2, keepdims=True)
    variance = jnp.square(normed - mean).mean(2, keepdims=True)
    weight, bias = (weights[f"{name}.{part}"].astype(jnp.float32)[:, None] for part in ("weight", "bias"))
    normed = (normed - mean) * lax.rsqrt(variance + QK_NORM_EPS) * weight + bias
    if rotary is None:
        return normed.astype(x.dtype)
    cos, sin = rotary
    even, odd = jnp.split(normed, 2, axis=2)
    return jnp.concatenate([even * cos - odd * sin, odd * cos + even * sin], axis=2).astype(x.dtype)


def block(
    x: Float[Array, "batch rows channels"],
    weights: Weights,
    temb: Float[Array, " time_embed_dim"],
    is_text: jax.Array,
    rotary: Rotary,
    *,
    shape: TransformerShape,
    share: DeviceShare,
    attend: AttentionFn,
) -> Float[Array, "batch rows channels"]:
    """Apply one CogVideoXBlock to this device's rows (or heads)."""
    weights = share.whole_weights(weights)
    conditioning = jax.nn.silu(temb)
    with jax.named_scope("norm1"):
        modulation = linear(conditioning, weights, "norm1.linear")
        h, gate = _modulate(x, weights, "norm1", modulation, is_text, shape.norm_eps)
    with jax.named_scope("qkv"):
        q, k, v = (_heads(h, weights, f"attn1.to_{name}", shape.head_dim) for name in "qkv")
    with jax.named_scope("qk_norm_rotary"):
        q = _norm_rotary(q, weights, "attn1.norm_q", rotary)
        k = _norm_rotary(k, weights, "attn1.norm_k", rotary)
    with jax.named_scope("to_heads"):
        q, k, v = share.to_heads(q), share.to_heads(k), share.to_heads(v)
    tokens = share.layout.tokens
    with jax.named_scope("attention"):
        out = attend(q, k[..., :tokens], v[..., :tokens])
    with jax.named_scope("to_rows"):
        out = share.to_rows(out, shape.num_heads)
    with jax.named_scope("attention_out"):
        weight = weights["attn1.to_out.0.weight"]
        out = share.reduce(jnp.einsum("bhds,chd->bsc", out, weight.reshape(weight.shape[0], -1, shape.head_dim)))
        x = x + (gate * (out + weights["attn1.to_out.0.bias"])).astype(x.dtype)
    with jax.named_scope("norm2"):
        modulation = linear(conditioning, weights, "norm2.linear")
        h, gate = _modulate(x, weights, "norm2", modulation, is_text, shape.norm_eps)
    with jax.named_scope("feed_forward"):
        h = linear(h, weights, "ff.net.0.proj")
        h = lax.optimization_barrier(jax.nn.gelu(h.astype(jnp.float32), approximate=True).astype(x.dtype))
        out = share.reduce(jnp.einsum("...i,oi->...o", h, weights["ff.net.2.weight"]))
        return x + (gate * (out + weights["ff.net.2.bias"])).astype(x.dtype)


def transformer(
    weights: Weights,
    tokens: Float[Array, "rows patch_channels"],
    embeddings: Float[Array, "batch text text_embed_dim"],
    timestep: Int[Array, ""],
    rotary: Rotary,
    conditions: Mapping[str, jax.Array],
    *,
    shape: TransformerShape,
    share: DeviceShare,
    block: Callable[..., jax.Array],
) -> Float[Array, "batch rows patch_channels"]:
    """Return the model's output on this device's rows; those of text and padding are arbitrary.

    tokens: patches of the latents at their rows, in the weights' dtype. conditions: see
    `TransformerShape.condition_channels`. block: `(x, layer's weights, temb, is_text, rotary) -> x`.
    """
    dtype = tokens.dtype
    is_text = share.row_ids() < share.layout.text
    with jax.named_scope("embed"):
        channels = shape.num_heads * shape.head_dim
        temb = scalar_embedding(weights, shape, "time_embedding", channels, timestep, dtype)
        if shape.ofs_embed_dim is not None:
            ofs = scalar_embedding(weights, shape, "ofs_embedding", shape.ofs_embed_dim, jnp.asarray(_OFS), dtype)
            temb = temb + ofs
        if "image" in conditions:
            tokens = jnp.concatenate([tokens, conditions["image"]], axis=-1)
        text = share.local_text(linear(embeddings, weights, "patch_embed.text_proj"))
        video = linear(tokens, weights, "patch_embed.proj")
        x = jnp.where(is_text[:, None], text, video)
        if "positions" in conditions:
            x = x + conditions["positions"]
    blocks = {name.removeprefix(BLOCKS): value for name, value in weights.items() if name.startswith(BLOCKS)}

    def layer(x: jax.Array, layer_weights: Weights) -> tuple[jax.Array, None]:
        return block(x, layer_weights, temb, is_text, rotary), None

    with jax.named_scope("blocks"):
        x, _ = lax.scan(layer, x, blocks)
    with jax.named_scope("project_out"):
        x = layer_norm(x, weights["norm_final.weight"], weights["norm_final.bias"], shape.norm_eps).astype(dtype)
        shift, scale = jnp.split(linear(jax.nn.silu(temb), weights, "norm_out.linear").astype(jnp.float32), 2)
        x = layer_norm(x, weights["norm_out.norm.weight"], weights["norm_out.norm.bias"], shape.norm_eps)
        return linear((x * (1 + scale) + shift).astype(dtype), weights, "proj_out")
