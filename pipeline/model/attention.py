"""The one seam to `splash_attn`: attention with the user's options, and as a processor of stock diffusers blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

import splash_attn
from pipeline.model.torchax_bridge import torchax_module
from pipeline.requests.errors import RequestError
from pipeline.requests.request import AttentionOptions
from splash_attn import tuned
from splash_attn.api import Resolution, resolve
from splash_attn.types import AttentionShape

#: q, k, v, each [batch, heads, sequence, head_dim], and kv_seq_len where not all keys count, to the output.
AttentionFunction = Callable[..., jax.Array]


def attention_function(options: AttentionOptions) -> AttentionFunction:
    """Return `splash_attn.attention` with these options. It raises RequestError for options that fit no such call."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, kv_seq_len: int | None = None) -> jax.Array:
        try:
            shape = AttentionShape(q.shape[0], q.shape[1], q.shape[2], kv_seq_len or k.shape[2], q.shape[3])
            resolve_attention(options, shape, q.dtype.name)
            return splash_attn.attention(q, k, v, kv_seq_len=kv_seq_len, **vars(options))
        except RequestError:
            raise
        except (ValueError, NotImplementedError) as error:  # e.g. implementation=pallas_tpu where there is no TPU
            raise RequestError(f"attention: {error}") from error

    return attend


class SplashAttentionProcessor:
    """Joint attention over text and video tokens in a stock CogVideoX block, by a given function.

    Does what diffusers' CogVideoXAttnProcessor2_0 does (query and key LayerNorm, rotary embedding of the video tokens
    only, output projection, split into video and text), for tensors of torchax. Set it with
    `block.attn1.set_processor(SplashAttentionProcessor(attention_function(options)))`.
    """

    def __init__(self, attend: AttentionFunction):
        self._attend = attend

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend over video and text tokens, hidden_states and encoder_hidden_states, each [batch, tokens, channels].

        image_rotary_emb: cosines and sines, each float32 [video tokens, head_dim]. Returns both, attended.
        """
        from diffusers.models.embeddings import apply_rotary_emb

        if attention_mask is not None:
            raise NotImplementedError("attention_mask: CogVideoX attends to all tokens; a mask is not supported")
        text_seq_len = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        batch_size, seq_len, _ = joint.shape

        def heads(tokens: torch.Tensor) -> torch.Tensor:
            return tokens.reshape(batch_size, seq_len, attn.heads, -1).transpose(1, 2)

        q, k, v = attn.norm_q(heads(attn.to_q(joint))), attn.norm_k(heads(attn.to_k(joint))), heads(attn.to_v(joint))
        if image_rotary_emb is not None:
            # Joined anew rather than assigned in place as stock does: JAX arrays do not change.
            q, k = (
                torch.cat([x[:, :, :text_seq_len], apply_rotary_emb(x[:, :, text_seq_len:], image_rotary_emb)], dim=2)
                for x in (q, k)
            )
        out = torchax_module().interop.call_jax(self._attend, q, k, v)
        out = out.transpose(1, 2).reshape(batch_size, seq_len, -1)
        out = attn.to_out[1](attn.to_out[0](out))  # projection, dropout (none in eval mode)
        return out[:, text_seq_len:], out[:, :text_seq_len]


def resolve_attention(
    options: AttentionOptions, shape: AttentionShape, dtype: str, device_kind: str | None = None
) -> Resolution:
    """Resolve what `splash_attn.attention` runs for a shape, and why. device_kind: of a device that is not here.

    Raises RequestError for options that contradict one another or the device.
    """
    chosen = {name: value for name, value in vars(options).items() if name != "k_smooth"}
    try:
        resolution = resolve(shape, dtype=dtype, device_kind=device_kind, **chosen)
    except ValueError as error:
        raise RequestError(f"attention: {error}") from error
    if options.qk_dtype == "int8" and resolution.implementation == "xla":
        raise RequestError(
            "attention: qk_dtype='int8' is the kernel's, and implementation='xla' runs here; leave it out."
        )
    return resolution


def check_runs_here(options: AttentionOptions, dtype: str) -> None:
    """Raise RequestError for options that contradict one another or this machine."""
    platform = jax.default_backend()
    if options.implementation == "pallas_tpu" and platform != "tpu":
        raise RequestError(
            f"attention.implementation='pallas_tpu': needs a TPU, and JAX runs on {platform!r} here; "
            "leave it out, or take xla or pallas_interpret"
        )
    resolve_attention(options, AttentionShape(1, 1, 128, 128, 64), dtype)  # for any shape the same


def describe_attention(options: AttentionOptions, shape: AttentionShape, dtype: str) -> dict[str, Any]:
    """Describe what `splash_attn.attention` runs for a shape on this machine, and why, for records. JSON-able."""
    resolution = resolve_attention(options, shape, dtype)
    described = {**dataclasses.asdict(resolution), "k_smooth": options.k_smooth, "shape": dataclasses.asdict(shape)}
    described["tuned_entry"] = None
    if resolution.implementation != "xla" and options.block_sizes is None:
        device = next(iter(jnp.zeros(()).devices()))  # of jax.default_device, or the mesh in context
        qk_dtype = options.qk_dtype or "bfloat16"
        entry = tuned.choose(device.device_kind, shape, dtype, variant=options.variant, qk_dtype=qk_dtype).entry
        described["tuned_entry"] = entry.to_dict() if entry else None
    return described
