"""Parts of the decoder against the stock modules; the whole is compared in test_stages and test_parallel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from pipeline.checkpoints.loading import build_module
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.model.placement import split_mesh
from pipeline.model.torchax_bridge import torch_to_numpy
from pipeline.model.vae.decoder import DecoderLayer, DecoderShape
from pipeline.model.vae.layers import (
    Layer,
    arrange,
    cut,
    join,
    num_strips,
    pair,
    pair_weights,
    unpair,
    weights_to_pairs,
)
from pipeline.requests.errors import CheckpointError


def _strips(x: np.ndarray, strips: int) -> jax.Array:
    """Stock's [1, channels, frames, height, width] as the decoder has it."""
    return cut(jnp.asarray(x[0].transpose(1, 3, 2, 0)), strips)


def _on_one_device(function, *arguments):
    mesh = split_mesh(jax.devices()[:1], 1)
    everywhere = PartitionSpec()
    over_mesh = jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    return jax.jit(over_mesh)(*arguments)


def test_strips_lie_side_by_side():
    columns = jnp.arange(24).reshape(1, 24, 1, 1)
    strips = cut(columns, num_strips(24))
    assert strips.shape == (1, 3, 1, 8, 1)
    assert strips[0, :, 0, 1, 0].tolist() == [3, 4, 5]
    np.testing.assert_array_equal(join(strips), columns)


@pytest.mark.parametrize(("columns", "expected"), [(160, 8), (20, 4), (5, 1), (1, 1)])
def test_strips_divide_the_columns(columns, expected):
    assert num_strips(columns) == expected


@pytest.mark.parametrize(("frames", "latent_frames"), [(5, 3), (4, 2), (1, 1)])
def test_norm_is_stocks(frames, latent_frames, rng):
    from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSpatialNorm3D

    module = CogVideoXSpatialNorm3D(12, 7, groups=3)
    for parameter in module.parameters():
        parameter.data.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    x = (rng.normal(size=(1, 12, frames, 6, 8)) + 5).astype(np.float32)  # off centre: one pass would lose digits
    z = rng.normal(size=(1, 7, latent_frames, 3, 2)).astype(np.float32)
    weights = {f"norm.{k}": arrange(jnp.asarray(torch_to_numpy(v))) for k, v in module.named_parameters()}

    def norm(weights, x, z):
        return DecoderLayer(weights, None, 3, 1, z).norm_silu("norm", x)

    actual = _on_one_device(norm, weights, _strips(x, 4), jnp.asarray(z[0].transpose(1, 3, 2, 0)))
    inputs = (torch.from_numpy(value).double() for value in (x, z))
    expected = torch.nn.functional.silu(module.double()(*inputs)[0]).detach().numpy()
    # Group norm of values around 5 is off by some 1e-5; scales and shifts of the latents are of order 10.
    np.testing.assert_allclose(actual, _strips(expected, 4), rtol=0, atol=2e-4)


def test_statistics_of_bfloat16_are_taken_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(1, 4001, 1, 1, 2)) + 10, jnp.bfloat16)
    weights = {"norm.weight": jnp.ones(2, jnp.bfloat16), "norm.bias": jnp.zeros(2, jnp.bfloat16)}

    def norm(weights, x):
        return Layer(weights, None, num_groups=1, num_shards=1)._group_norm("norm", x)

    factor, offset = _on_one_device(norm, weights, x)
    exact = np.asarray(x, np.float64)
    # A bfloat16 sum of these would stop growing at some 4000 of 80000.
    np.testing.assert_allclose(factor, np.full(2, 1 / exact.std()), rtol=1e-4)
    np.testing.assert_allclose(offset, np.full(2, -exact.mean() / exact.std()), rtol=1e-4)


@pytest.mark.compile
@pytest.mark.parametrize(("frames", "latent_frames", "first"), [(5, 3, True), (4, 2, True), (4, 2, False)])
def test_resnets_on_pairs_of_frames_are_those_on_frames(frames, latent_frames, first, rng):
    """One that makes pairs of frames of other channels, and one that is given pairs, and both caches."""

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def resnet_weights(channels):
        shapes = {"conv1.conv": (3, 3, 3, channels, 4), "conv2.conv": (3, 3, 3, 4, 4)}
        for norm, of in (("norm1", channels), ("norm2", 4)):
            shapes |= {f"{norm}.{conv}.conv": (1, 1, 1, 5, of) for conv in ("conv_y", "conv_b")}
            shapes[f"{norm}.norm_layer"] = (of,)
        shapes |= {"conv_shortcut": (1, 1, 1, channels, 4)} if channels != 4 else {}
        return {
            f"{name}.{kind}": array(*(shape if kind == "weight" else shape[-1:]))
            for name, shape in shapes.items()
            for kind in ("weight", "bias")
        }

    first_weights, weights = resnet_weights(6), resnet_weights(4)
    cache = None if first else [{"conv1": array(2, 2, 4, 2, of), "conv2": array(2, 2, 4, 2, 4)} for of in (6, 4)]
    x, z = array(frames, 2, 4, 2, 6), array(latent_frames, 4, 4, 5)

    def by_frames(x, z, first_weights, weights, cache):
        layers = [
            DecoderLayer(own, before, 2, 1, z)
            for own, before in zip((first_weights, weights), cache or (None, None), strict=True)
        ]
        for layer in layers:
            x = layer.resnet(x)
        return x, [layer.next_cache for layer in layers]

    def by_pairs(x, z, first_weights, weights, cache):
        norm = {name: value for name, value in first_weights.items() if name.startswith("norm1.")}
        entering = weights_to_pairs(first_weights, ("conv1.", "conv_shortcut."))
        first_weights = pair_weights(first_weights, ("",)) | norm | entering
        if cache:
            cache = [{"conv1": cache[0]["conv1"], "conv2": pair(cache[0]["conv2"])}, jax.tree.map(pair, cache[1])]
        cache = cache or (None, None)
        entry = DecoderLayer(first_weights, cache[0], 2, 1, z)
        inside = DecoderLayer(pair_weights(weights, ("",)), cache[1], 2, 1, z).in_pairs()
        x = inside.resnet(entry.resnet_to_pairs(x))
        caches = [entry.next_cache, inside.next_cache]
        after = [{k: v if v.shape[-1] == 6 else unpair(v, 0) for k, v in cache.items()} for cache in caches]
        return unpair(x, len(z) % 2), after

    arguments = (x, z, first_weights, weights, cache)
    actual, expected = (_on_one_device(function, *arguments) for function in (by_pairs, by_frames))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * float(jnp.std(b))), actual, expected)


def test_the_published_configuration_is_known_and_others_are_refused():
    module = build_module("vae", dict(PUBLISHED_CONFIGS["zai-org/CogVideoX1.5-5B"]["vae"]), torch.float32)
    shape = DecoderShape.from_config(module.config)
    assert shape == DecoderShape(num_levels=4, num_resnets=4, num_groups=32, time_levels=2, scaling_factor=0.7)
    with pytest.raises(CheckpointError, match="act_fn='relu', expected 'silu'"):
        DecoderShape.from_config({**module.config, "act_fn": "relu"})
