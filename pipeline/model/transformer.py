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
import re
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pipeline.model.device_share import DeviceShare
from pipeline.model.layers import int8
from pipeline.model.layers.linears import (
    Waves,
    Weights,
    group_of_heads,
    join_heads,
    linear,
    product,
    project_heads,
    scalar_embedding,
)
from pipeline.model.layers.norms import Rotary, join_rows, layer_norm, modulate, norm_rotary
from pipeline.model.weights import BLOCKS
from pipeline.requests.errors import CheckpointError

#: Queries, keys, values, each [batch, heads, head_dim, sequence] -> the same shape as the first.
AttentionFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
#: (x, a scan's step over layers, the stacked weights of the blocks) -> x after the blocks.
RunBlocks = Callable[[jax.Array, Callable[..., Any], Weights], jax.Array]

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

    def waves(self, number: int) -> Waves:
        """Return the waves that embed a number."""
        return Waves(number, self.flip_sin_to_cos, self.freq_shift)

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


def timestep_embedding(weights: Weights, shape: TransformerShape, timestep: jax.Array, dtype: Any) -> jax.Array:
    """Return what conditions the blocks, [time_embed_dim] in dtype: the timestep, and `ofs` where the model has it."""
    waves = shape.waves(shape.num_heads * shape.head_dim)
    embedding = scalar_embedding(weights, "time_embedding", waves, timestep, dtype)
    if shape.ofs_embed_dim is None:
        return embedding
    ofs = jnp.asarray(_OFS)
    return embedding + scalar_embedding(weights, "ofs_embedding", shape.waves(shape.ofs_embed_dim), ofs, dtype)


def block(
    x: Float[Array, "batch rows channels"],
    weights: Weights,
    temb: Float[Array, " time_embed_dim"],
    is_text: jax.Array,
    rotary: tuple[Rotary, Rotary],
    *,
    shape: TransformerShape,
    share: DeviceShare,
    attend: AttentionFn,
) -> Float[Array, "batch rows channels"]:
    """Apply one CogVideoXBlock to this device's rows (or heads). rotary: see `DeviceShare.rotary_of_heads`."""
    weights = share.whole_weights(weights)
    conditioning, quantize = jax.nn.silu(temb), f"ff.net.2.{int8.SCALE}" in weights
    with jax.named_scope("norm1"):
        modulation = linear(conditioning, weights, "norm1.linear")
        h, gate = modulate(x, weights, "norm1", modulation, is_text, shape.norm_eps, quantize)
    groups, exchanged = share.head_groups(shape.num_heads), []
    for group in range(groups):
        of_group = group_of_heads(weights, group, groups)
        with jax.named_scope("qkv"):
            q, k, v = (project_heads(h, of_group, f"attn1.to_{name}", shape.head_dim, x.dtype) for name in "qkv")
        with jax.named_scope("to_heads"):
            exchanged.append([share.to_heads(q, keys=False), *(share.to_heads(each, keys=True) for each in (k, v))])
    parts: list[jax.Array] = []
    for each in exchanged:
        if parts:  # what is on its way beside an attention is not waited for before that has ended
            each, parts[-1] = lax.optimization_barrier((each, parts[-1]))
        q, k, v = each
        with jax.named_scope("qk_norm_rotary"):  # now, since what was received is joined on the way
            q = norm_rotary(q, weights, "attn1.norm_q", rotary[0])
            k = norm_rotary(k, weights, "attn1.norm_k", rotary[1])
        with jax.named_scope("to_heads"):  # once: XLA would join the parts anew for every sum over them
            v = lax.optimization_barrier(join_rows(v))
        with jax.named_scope("attention"):
            parts.append(attend(q, k, v))
    with jax.named_scope("to_rows"):
        attended = share.attended_rows(parts, shape.num_heads, quantize)
    with jax.named_scope("attention_out"):
        out = share.reduce(join_heads(attended, weights, "attn1.to_out.0").astype(x.dtype))
        x = x + (gate * (out + weights["attn1.to_out.0.bias"])).astype(x.dtype)
    with jax.named_scope("norm2"):
        modulation = linear(conditioning, weights, "norm2.linear")
        h, gate = modulate(x, weights, "norm2", modulation, is_text, shape.norm_eps, quantize)
    with jax.named_scope("feed_forward"):
        hidden = product(h, weights, "ff.net.0.proj") + weights["ff.net.0.proj.bias"]
        hidden = jax.nn.gelu(hidden.astype(jnp.float32), approximate=True)
        h = (
            share.quantize_hidden(hidden, weights, x.dtype)
            if quantize
            else lax.optimization_barrier(hidden.astype(x.dtype))
        )
        out = share.reduce(product(h, weights, "ff.net.2").astype(x.dtype))
        return x + (gate * (out + weights["ff.net.2.bias"])).astype(x.dtype)


def transformer(
    weights: Weights,
    tokens: Float[Array, "rows patch_channels"],
    embeddings: Float[Array, "batch text text_embed_dim"],
    timestep: Int[Array, ""],
    rotary: Any,
    conditions: Mapping[str, jax.Array],
    *,
    shape: TransformerShape,
    share: DeviceShare,
    block: Callable[..., jax.Array],
    run: RunBlocks,
) -> Float[Array, "batch rows patch_channels"]:
    """Return the model's output on this device's rows; those of text and padding are arbitrary.

    tokens: patches of the latents at their rows, in the weights' dtype. conditions: see
    `TransformerShape.condition_channels`. block: `(x, layer's weights, temb, is_text, rotary) -> x`, with rotary as it
    is given here. run: how often.
    """
    dtype = tokens.dtype
    is_text = share.row_ids() < share.layout.text
    with jax.named_scope("embed"):
        temb = timestep_embedding(weights, shape, timestep, dtype)
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
        x = run(x, layer, blocks)
    with jax.named_scope("project_out"):
        x = layer_norm(x, weights["norm_final.weight"], weights["norm_final.bias"], shape.norm_eps).astype(dtype)
        shift, scale = jnp.split(linear(jax.nn.silu(temb), weights, "norm_out.linear").astype(jnp.float32), 2)
        x = layer_norm(x, weights["norm_out.norm.weight"], weights["norm_out.norm.bias"], shape.norm_eps)
        # Fused with the product it takes XLA 3 minutes (measured; one prompt, v6e-8), and is predicted no faster.
        x = lax.optimization_barrier((x * (1 + scale) + shift).astype(dtype))
        return linear(x, weights, "proj_out")
