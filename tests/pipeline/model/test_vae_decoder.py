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
from pipeline.model.vae_decoder import DecoderLayer, DecoderShape
from pipeline.model.vae_layers import Layer, arrange, cut, join, num_strips
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


def test_the_published_configuration_is_known_and_others_are_refused():
    module = build_module("vae", dict(PUBLISHED_CONFIGS["zai-org/CogVideoX1.5-5B"]["vae"]), torch.float32)
    shape = DecoderShape.from_config(module.config)
    assert shape == DecoderShape(num_levels=4, num_resnets=4, num_groups=32, time_levels=2, scaling_factor=0.7)
    with pytest.raises(CheckpointError, match="act_fn='relu', expected 'silu'"):
        DecoderShape.from_config({**module.config, "act_fn": "relu"})
