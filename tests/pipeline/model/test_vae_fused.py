"""The decoder by its TPU kernel, interpreted, against the decoder by XLA's convolutions, which others hold to stock."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from pipeline.checkpoints.loading import build_module
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.model.placement import SPLIT, split_mesh
from pipeline.model.vae import convolution
from pipeline.model.vae.convolution import takes
from pipeline.model.vae.decoder import DecoderShape, decode
from pipeline.model.vae.fused import FusedLayer, can_fuse
from pipeline.model.vae.layers import arrange

CONFIG = PUBLISHED_CONFIGS["zai-org/CogVideoX1.5-5B"]["vae"]


def _weights(config, make):
    import torch

    module = build_module("vae", config, torch.float32)
    return {
        name: make(jax.eval_shape(arrange, jax.ShapeDtypeStruct(value.shape, jnp.float32)))
        for name, value in module.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    }


@pytest.mark.compile
@pytest.mark.slow("6 min")
@pytest.mark.parametrize(
    ("paired", "batches", "num_devices", "vmem_bytes"),
    [(True, (3, 2), 2, None), (True, (2, 2), 1, None), (False, (1, 2), 1, None), (True, (3, 2), 1, 0)],
    ids=["odd", "even", "single frames", "a frame a call"],
)
def test_decoder_is_that_of_xla(paired, batches, num_devices, vmem_bytes, rng, monkeypatch):
    """Of latents of one batch and the next, at three sizes: 4 and 8 strips, several products a slab, and a shortcut."""
    if vmem_bytes is not None:
        monkeypatch.setattr(convolution, "_VMEM_BYTES", vmem_bytes)
    monkeypatch.setattr(convolution, "_BLOCK_POSITIONS", 128)
    config = CONFIG | {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 3,
        "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    }

    def random(like):
        size = np.prod(like.shape[:-1])
        values = rng.normal(size=like.shape)
        return jnp.asarray(values / np.sqrt(size) if like.ndim > 1 else 1 + values / 10, jnp.float32)

    weights, shape = _weights(config, random), DecoderShape(3, 2, 2, 2, 1.0)
    mesh = split_mesh(jax.devices()[:num_devices], num_devices)
    latents = [jnp.asarray(rng.normal(size=(frames, 8, 4 * num_devices, 4)), jnp.float32) for frames in batches]

    def video(layer):
        def program(weights, z, cache):
            return decode(weights, z, cache, shape, num_devices, paired, layer)

        split = PartitionSpec(None, None, SPLIT)
        over_mesh = jax.shard_map(
            program,
            mesh=mesh,
            in_specs=(PartitionSpec(), split, split),
            out_specs=(split, split),
            check_vma=False,
        )
        cache, outputs = None, []
        for z in latents:
            output, cache = jax.jit(over_mesh)(weights, z, cache)
            outputs.append(np.asarray(output))
        return np.concatenate(outputs)

    with jax.default_matmul_precision("highest"):
        actual = video(functools.partial(FusedLayer, interpret=pltpu.InterpretParams()))
        expected = video(None)
    assert expected.std() > 0.1
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * expected.std())


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        pytest.param(90, 20, True, id="720p on eight devices"),
        pytest.param(90, 5, False, id="on 32, a strip has no eight columns of registers"),
        pytest.param(60, 90, False, id="90 columns make two strips"),
    ],
)
def test_kernel_takes_what_fits(rows, columns, expected):
    assert can_fuse(_weights(CONFIG, lambda like: like), DecoderShape.from_config(CONFIG), rows, columns, True) is expected


def test_kernel_takes_no_columns_that_exceed_vmem():
    assert takes(720, 8, 256)
    assert not takes(4 * 720, 8, 256)
