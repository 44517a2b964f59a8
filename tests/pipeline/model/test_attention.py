import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pipeline.model.attention import SplashAttentionProcessor, attention_function, describe_attention
from pipeline.model.torchax_bridge import jax_function, torch_to_numpy
from pipeline.requests.errors import RequestError
from pipeline.requests.request import AttentionOptions
from splash_attn.types import AttentionShape

BATCH, HEADS, HEAD_DIM, TEXT, VIDEO = 2, 3, 24, 7, 13


def _module():
    from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0

    torch.manual_seed(0)
    attention = Attention(
        query_dim=HEADS * HEAD_DIM,
        dim_head=HEAD_DIM,
        heads=HEADS,
        qk_norm="layer_norm",
        eps=1e-6,
        bias=True,
        out_bias=True,
        processor=CogVideoXAttnProcessor2_0(),
    ).eval()
    for parameter in attention.parameters():  # norms too: equal scales would hide a mix-up of q and k
        parameter.data.copy_(torch.randn(parameter.shape) * 0.3)
    return attention


def _inputs(rng):
    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    angles = normal(VIDEO, HEAD_DIM // 2).repeat(2, axis=1)
    return normal(BATCH, VIDEO, HEADS * HEAD_DIM), normal(BATCH, TEXT, HEADS * HEAD_DIM), np.cos(angles), np.sin(angles)


def _run(module, hidden, text, rotary):
    weights = {name: jnp.asarray(torch_to_numpy(value)) for name, value in module.named_parameters()}
    function = jax_function(module)
    return jax.jit(lambda *args: function(*args[:2], encoder_hidden_states=args[2], image_rotary_emb=args[3]))(
        weights, hidden, text, rotary
    )


@pytest.mark.parametrize("k_smooth", [True, False])
@pytest.mark.parametrize("with_rotary", [True, False])
def test_same_as_the_stock_processor(with_rotary, k_smooth, rng):
    module = _module()
    hidden, text, cos, sin = _inputs(rng)
    rotary = (cos, sin) if with_rotary else None
    with torch.no_grad():
        expected = module(
            torch.from_numpy(hidden),
            encoder_hidden_states=torch.from_numpy(text),
            image_rotary_emb=tuple(map(torch.from_numpy, rotary)) if rotary else None,
        )
    module.set_processor(
        SplashAttentionProcessor(attention_function(AttentionOptions(implementation="xla", k_smooth=k_smooth)))
    )
    actual = _run(module, hidden, text, rotary)
    for ours, theirs in zip(actual, expected, strict=True):
        # float32 throughout; outputs are of order 1, sums run over 72 channels and 20 tokens.
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=2e-5)


def test_splash_attn_is_what_runs(rng, monkeypatch):
    calls = []

    def attention(q, k, v, **options):
        calls.append((q.shape, options))
        return v

    monkeypatch.setattr("splash_attn.attention", attention)
    module = _module()
    module.set_processor(
        SplashAttentionProcessor(attention_function(AttentionOptions(implementation="xla", k_smooth=False)))
    )
    hidden, text, cos, sin = _inputs(rng)
    _run(module, hidden, text, (cos, sin))
    (shape, options), *others = calls
    assert not others
    assert shape == (BATCH, HEADS, TEXT + VIDEO, HEAD_DIM)
    assert options["k_smooth"] is False
    assert options["implementation"] == "xla"


def test_a_mask_is_refused(rng):
    processor = SplashAttentionProcessor(attention_function(AttentionOptions()))
    hidden, text, *_ = _inputs(rng)
    with pytest.raises(NotImplementedError, match="attention_mask"):
        processor(_module(), torch.from_numpy(hidden), torch.from_numpy(text), attention_mask=torch.ones(1))


def test_what_attention_refuses_is_the_requests_fault(monkeypatch, rng):
    def attention(*args, **options):
        raise ValueError("head_dim=60: expected a multiple of 8")

    monkeypatch.setattr("splash_attn.attention", attention)
    module = _module()
    module.set_processor(SplashAttentionProcessor(attention_function(AttentionOptions())))
    hidden, text, cos, sin = _inputs(rng)
    with pytest.raises(RequestError, match="attention: head_dim=60"):
        _run(module, hidden, text, (cos, sin))


def test_description_names_implementation_and_reason():
    shape = AttentionShape(2, 3, 131, 131, 64)
    described = describe_attention(AttentionOptions(), shape, "float32")
    assert described["implementation"] == "xla"
    assert "cpu" in described["reason"]
    asked = describe_attention(AttentionOptions(implementation="pallas_interpret"), shape, "float32")
    assert asked["implementation"] == "pallas_interpret"
    assert asked["block_sizes"]["block_q"] % 128 == 0


def test_description_is_of_the_default_device(monkeypatch):
    cpu = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda *_: [types.SimpleNamespace(device_kind="TPU v6 lite"), cpu])
    with jax.default_device(cpu):
        options = AttentionOptions(implementation="pallas_interpret")
        assert describe_attention(options, AttentionShape(1, 12, 39826, 39826, 64), "bfloat16")["tuned_entry"] is None


@pytest.mark.compile
def test_int8_is_refused_where_the_kernel_does_not_run():
    q = jnp.zeros((1, 1, 9, 16), jnp.float32)
    with pytest.raises(RequestError, match="qk_dtype='int8' is the kernel's, and implementation='xla' runs here"):
        attention_function(AttentionOptions(qk_dtype="int8"))(q, q, q)
    attention_function(AttentionOptions(qk_dtype="int8", implementation="pallas_interpret"))(q, q, q)
