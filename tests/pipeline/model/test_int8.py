"""int8 linears against float64, within bounds derived from the steps; what turning and smoothing do for an outlier."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pipeline.model.layers import int8
from pipeline.model.layers.int8 import Quantized
from pipeline.model.layers.linears import join_heads, product, project_heads
from pipeline.model.layers.norm_kernel import modulate_in_xla, modulate_on_tpu
from pipeline.model.sharding import ParallelPlan
from pipeline.model.weights import BLOCKS, place_weights, stacked_shapes
from pipeline.requests.request import STAGES, GenerateRequest
from pipeline.runs.outputs import stage_key
from rows import HostRows

ROWS, CHANNELS, HEADS, HEAD_DIM = 11, 192, 3, 64
FLOAT32 = 1e-5  # of sums in float32, relative to values of size 1


def _quantize(x: np.ndarray) -> Quantized:
    """Tokens [batch, rows, channels]."""
    step = int8.scale_of(jnp.abs(x).max(-1))
    return Quantized(int8.to_steps(jnp.asarray(x), step[..., None]), step)


def _weights(rng, name: str, out: int, channels: int) -> tuple[np.ndarray, dict]:
    weight = rng.normal(size=(out, channels)).astype(np.float32)
    values, scale = int8.quantize_weight(jnp.asarray(weight))
    return weight, {f"{name}.weight": values, f"{name}.{int8.SCALE}": scale}


def _bound(x: np.ndarray, step: np.ndarray, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The most that rounding x to `step` and the weight to `scale` can change x @ weight^T: each by half a step."""
    step, scale = np.asarray(step, np.float64)[..., None] / 2, np.asarray(scale, np.float64) / 2
    sums = np.abs(x).sum(-1)[..., None] * scale + np.abs(weight).sum(1) * step
    return sums + x.shape[-1] * step * scale + FLOAT32 * np.abs(x).sum(-1)[..., None]


def test_linears_stay_within_what_rounding_can_do(rng):
    x = rng.normal(size=(2, ROWS, CHANNELS)).astype(np.float32)
    weight, weights = _weights(rng, "up", 160, CHANNELS)
    quantized = _quantize(x)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    bound = _bound(x, quantized.scale, weight, weights["up.weight_scale"])
    error = np.abs(product(quantized, weights, "up") - expected)
    assert (error <= bound).all() and error.max() > bound.max() / 1000
    assert bound.max() < 0.2 * np.abs(expected).max()


def test_heads_and_back_stay_within_it(rng):
    x = rng.normal(size=(2, ROWS, CHANNELS)).astype(np.float32)
    weight, weights = _weights(rng, "to_q", CHANNELS, CHANNELS)
    quantized, bias = _quantize(x), rng.normal(size=CHANNELS).astype(np.float32)
    actual = project_heads(quantized, {**weights, "to_q.bias": jnp.asarray(bias)}, "to_q", HEAD_DIM, jnp.float32)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    bound = _bound(x, quantized.scale, weight, weights["to_q.weight_scale"])
    error = np.abs(np.asarray(actual).transpose(0, 3, 1, 2).reshape(expected.shape) - (expected + bias))
    assert (error <= bound).all()

    turned = Quantized(quantized.values.reshape(2, ROWS, HEADS, HEAD_DIM).transpose(0, 2, 3, 1), quantized.scale)
    error = np.abs(join_heads(turned, weights, "to_q") - expected)
    assert (error <= bound).all()


def test_turning_twice_changes_nothing_and_products_are_kept(rng):
    x, weight = rng.normal(size=(5, CHANNELS)), rng.normal(size=(7, CHANNELS))
    size = int8.block_size(CHANNELS)
    assert size == 64 and int8.block_size(3072) == 256 and int8.block_size(30) == 2
    turned, turned_weight = (int8.rotate(jnp.asarray(each, jnp.float32), size) for each in (x, weight))
    np.testing.assert_allclose(int8.rotate(turned, size), x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(turned @ turned_weight.T, x @ weight.T, rtol=0, atol=1e-4)


def _relative_error(actual, expected) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def test_turning_saves_the_other_channels_from_an_outlier(rng):
    """A channel a hundred times the others, which the weights hardly use: what counts lies in the others."""
    x, weight = rng.normal(size=(1, 40, 256)).astype(np.float32), rng.normal(size=(64, 256)).astype(np.float32)
    x[..., 77] *= 100
    weight[:, 77] /= 100
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    errors = {}
    for rotation in (None, 256):
        given = jnp.asarray(x) if rotation is None else int8.rotate(jnp.asarray(x), rotation)
        values, scale = int8.quantize_weight(jnp.asarray(weight), rotation=rotation)
        actual = product(_quantize(given), {"up.weight": values, "up.weight_scale": scale}, "up")
        errors[rotation] = _relative_error(actual, expected)
    assert errors[None] > 0.15 and errors[256] < errors[None] / 4, errors


def test_smoothing_saves_the_feed_forward_from_an_outlier(rng):
    """A hidden channel a hundred times the others, as its row of the up projection says."""
    h = rng.normal(size=(1, 40, 64)).astype(np.float32)
    up, down = rng.normal(size=(256, 64)).astype(np.float32), rng.normal(size=(64, 256)).astype(np.float32)
    up[9] *= 100
    down[:, 9] /= 100
    hidden = np.maximum(h @ up.T, 0)
    expected = hidden.astype(np.float64) @ down.T.astype(np.float64)
    ones, zeros = jnp.ones(64), jnp.zeros(64)
    smoothing = int8.smoothing_of(jnp.asarray(down), int8.hidden_sizes(jnp.asarray(up), jnp.zeros(256), ones, zeros))
    errors = {}
    for multiplier in (None, smoothing):
        values, scale = int8.quantize_weight(jnp.asarray(down), smoothing=multiplier)
        given = hidden if multiplier is None else hidden * np.asarray(multiplier)
        actual = product(_quantize(given), {"down.weight": values, "down.weight_scale": scale}, "down")
        errors[multiplier is not None] = _relative_error(actual, expected)
    assert errors[False] > 0.1 and errors[True] < errors[False] / 10, errors


def test_a_channel_that_is_always_0_is_smoothed_by_1():
    down, sizes = jnp.asarray([[0.0, 1.0, 2.0]]), jnp.asarray([1.0, 0.0, 8.0])
    np.testing.assert_array_equal(int8.smoothing_of(down, sizes), [1, 1, 0.5])


@pytest.mark.compile
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_text", [0, 7, 43])
def test_the_norm_kernel_rounds_what_the_norm_gives(num_text, dtype, rng):
    x = jnp.asarray(rng.normal(size=(2, 43, 384)), dtype)
    scale, shift = (jnp.asarray(rng.normal(size=(2, 384)), jnp.float32) for _ in range(2))
    actual = modulate_on_tpu(x, scale, shift, jnp.int32(num_text), 1e-5, True, interpret=True)
    expected = modulate_in_xla(x, scale, shift, jnp.int32(num_text), 1e-5, True)
    np.testing.assert_allclose(actual.scale, expected.scale, rtol=2e-2 if dtype == "bfloat16" else 1e-5)
    difference = np.abs(actual.values.astype(np.int32) - expected.values.astype(np.int32))
    assert difference.max() <= 1 and difference.mean() < 0.01

    plain = np.asarray(x, np.float64)
    plain = (plain - plain.mean(-1, keepdims=True)) / np.sqrt(plain.var(-1, keepdims=True) + 1e-5)
    text = (np.arange(43) < num_text)[:, None]
    plain = plain * np.where(text, scale[0], scale[1]) + np.where(text, shift[0], shift[1])
    turned = plain.reshape(2, 43, 3, 128) @ int8.signs(128) / np.sqrt(128)
    error = np.abs(
        np.asarray(actual.values) * np.asarray(actual.scale, np.float64)[..., None] - turned.reshape(x.shape)
    )
    rounding = 2.0**-8 * np.sqrt(128) * np.abs(plain).max(-1) if dtype == "bfloat16" else 1e-4
    assert (error.max(-1) <= np.asarray(actual.scale) / 2 + rounding).all()


@pytest.mark.compile
def test_weights_are_placed_with_what_int8_needs(rng):
    """The products of a layer's weights are those of the checkpoint's, once inputs are turned and smoothed alike."""
    channels, hidden, head_dim = 32, 64, 16
    shapes = {f"attn1.to_{name}": (channels, channels) for name in ("q", "k", "v")}
    shapes |= {"attn1.to_out.0": (channels, channels)}
    shapes |= {"ff.net.0.proj": (hidden, channels), "ff.net.2": (channels, hidden), "norm1.linear": (6, 5)}
    stock = {f"transformer_blocks.{i}.{n}.weight": rng.normal(size=s) for i in range(2) for n, s in shapes.items()}
    for layer in range(2):
        block = f"transformer_blocks.{layer}"
        stock |= {f"{block}.{name}.bias": rng.normal(size=size) for name, (size, _) in shapes.items()}
        stock |= {f"{block}.norm2.norm.{part}": rng.normal(size=channels) for part in ("weight", "bias")}
    stock = {name: value.astype(np.float32) for name, value in stock.items()}
    plan = ParallelPlan("ulysses", 1, 1)
    rows = {name: HostRows(value) for name, value in stock.items()}
    placed = place_weights(rows, head_dim, plan, plan.mesh(jax.devices()), quantize=True)
    expected = stacked_shapes({name: value.shape for name, value in stock.items()}, quantize=True)
    assert {name: value.shape for name, value in placed.items()} == {
        name: shape for name, (shape, _) in expected.items()
    }

    def back(name: str, layer: int) -> np.ndarray:
        scale = placed[f"{BLOCKS}{name}.weight_scale"][layer]
        return np.asarray(placed[f"{BLOCKS}{name}.weight"][layer] * scale[:, None])

    def close(actual, expected):
        assert _relative_error(actual, expected) < 0.02

    for layer in range(2):
        weight = {name: stock[f"transformer_blocks.{layer}.{name}.weight"] for name in shapes}
        close(int8.rotate(jnp.asarray(back("ff.net.0.proj", layer)), channels), weight["ff.net.0.proj"])
        smoothing = np.asarray(placed[f"{BLOCKS}ff.net.2.smoothing"][layer])
        assert smoothing.std() > 0
        close(back("ff.net.2", layer) * smoothing, weight["ff.net.2"])
        v = int8.rotate(jnp.asarray(back("attn1.to_v", layer)), channels)
        out = back("attn1.to_out.0", layer)
        close(out @ np.asarray(v), weight["attn1.to_out.0"] @ weight["attn1.to_v"])
        bias = stock[f"transformer_blocks.{layer}.attn1.to_v.bias"]
        close(out @ np.asarray(placed[f"{BLOCKS}attn1.to_v.bias"][layer]), weight["attn1.to_out.0"] @ bias)
        q = weight["attn1.to_q"].reshape(2, head_dim, channels)
        q = np.concatenate([q[:, ::2], q[:, 1::2]], axis=1).reshape(channels, channels)
        close(int8.rotate(jnp.asarray(back("attn1.to_q", layer)), channels), q)


def test_saved_latents_are_of_one_quantization():
    identities = dict.fromkeys(STAGES, "weights")
    exact, quantized = (GenerateRequest("a cat", quantization=each) for each in (None, "int8"))
    for stage, same in (("text", True), ("denoise", False), ("vae", False)):
        keys = [stage_key(request, stage, identities) for request in (exact, quantized)]
        assert (keys[0].fingerprint == keys[1].fingerprint) is same


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad):
    """A 0 in its place would end in a video like any other."""
    weight = jnp.ones((4, 8), jnp.float32).at[1, 2].set(bad)
    steps, scale = int8.quantize_weight(weight)
    assert not np.isfinite(np.asarray(steps.astype(jnp.float32) * scale[:, None])[1]).any()
    assert np.isfinite(np.asarray(scale))[[0, 2, 3]].all()
