"""The decoder's layers by their TPU kernel, interpreted, against those of XLA's convolutions."""

import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from helpers import PLENTY_S, virtual_devices
from pipeline.checkpoints.loading import build_module
from pipeline.checkpoints.published import PUBLISHED_CONFIGS
from pipeline.model.placement import SPLIT, split_mesh
from pipeline.model.vae import convolution
from pipeline.model.vae.convolution import V6E, VMEM, Vmem, takes
from pipeline.model.vae.decoder import DecoderLayer, DecoderShape, decode
from pipeline.model.vae.fused import FusedLayer, Image, can_fuse
from pipeline.model.vae.layers import arrange, pair, pair_weights, unpair, weights_to_pairs
from pipeline.requests.errors import RequestError
from pipeline.stages.vae import decoder_sharding, fuses
from splash_workbench.provenance import VAE_KERNEL_VARIABLE

CONFIG = PUBLISHED_CONFIGS["zai-org/CogVideoX1.5-5B"]["vae"]
FIRST, LATER = 3, 2  # latent frames of a batch


def _compiled(function, *arguments):
    mesh = split_mesh(jax.devices()[:1], 1)
    everywhere = PartitionSpec()
    over_mesh = jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    return jax.jit(over_mesh)(*arguments)


def _flat(x):
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _image(layer, x):
    values = _flat(x)
    mean = values.mean((1, 2))
    squares = jnp.square(values - mean[:, None, None]).sum((1, 2))
    return Image(values, jnp.stack([mean, squares], 1), layer._latents(x.shape[3], x.shape[2]), x.shape[3])


def _in_strips(image):
    return image.values.reshape(*image.values.shape[:2], -1, image.strips, image.values.shape[-1])


@pytest.fixture
def array(rng):
    def make(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return make


@pytest.fixture
def weights(array):
    """Of a resnet from 16 to 8 channels, latents of 5."""
    shapes = {"conv1.conv": (3, 3, 3, 16, 8), "conv2.conv": (3, 3, 3, 8, 8), "conv_shortcut": (1, 1, 1, 16, 8)}
    for norm, of in (("norm1", 16), ("norm2", 8)):
        shapes |= {f"{norm}.{conv}.conv": (1, 1, 1, 5, of) for conv in ("conv_y", "conv_b")}
        shapes[f"{norm}.norm_layer"] = (of,)
    made = {}
    for name, shape in shapes.items():
        made[f"{name}.weight"] = array(*shape) / np.sqrt(np.prod(shape[:-1]))
        made[f"{name}.bias"] = array(shape[-1])
    return made


def _pairs_of(weights):
    norm = {name: value for name, value in weights.items() if name.startswith("norm1.")}
    return pair_weights(weights, ("",)) | norm | weights_to_pairs(weights, ("conv1.", "conv_shortcut."))


@pytest.mark.compile
@pytest.mark.parametrize(
    ("latent_frames", "paired", "several_products"),
    [
        (FIRST, False, False),
        (LATER, True, True),
        pytest.param(FIRST, True, False, marks=pytest.mark.slow("12 s")),
        pytest.param(LATER, False, False, marks=pytest.mark.slow("12 s")),
    ],
)
def test_resnet_is_that_of_xla(latent_frames, paired, several_products, array, weights, monkeypatch):
    """With its cache, and, of the first batch, without."""
    if several_products:
        monkeypatch.setattr(convolution, "_BLOCK_POSITIONS", 128)
    frames = 2 * latent_frames - latent_frames % 2
    strips = 8 if several_products else 4
    x, z = array(frames, 2, 32, strips, 16), array(latent_frames, 8, 16, 5)
    first = latent_frames == FIRST
    caches = {} if first else {"conv1": array(2, 2, 32, strips, 16), "conv2": array(2, 2, 32, strips, 8)}

    def by_xla(x, z, weights, caches):
        layer = DecoderLayer(weights, caches or None, 2, 1, z)
        return layer.resnet(x), layer.next_cache

    def by_kernel(x, z, weights, caches):
        def beside(name, x):  # the columns of the strips beside, as a batch leaves them
            x = pair(x) if paired and name == "conv2" else x
            return _flat(layer._with_neighbours(x))[None]

        layer = FusedLayer(_pairs_of(weights) if paired else weights, None, 2, 1, z, interpret=True)
        layer.cache = {name: beside(name, value) for name, value in caches.items()} or None
        image = layer.resnet_to_pairs(_image(layer, x)) if paired else layer.resnet(_image(layer, x))
        kept = {
            name: value[0, :, 1:-1].reshape(-1, 2, 32, strips, value.shape[-1])
            for name, value in layer.next_cache.items()
        }
        if paired:
            kept["conv2"] = unpair(kept["conv2"], 0)
        values = _in_strips(image)
        return unpair(values, latent_frames % 2) if paired else values, kept

    arguments = (x, z, weights, caches)
    actual, expected = (_compiled(function, *arguments) for function in (by_kernel, by_xla))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * float(jnp.std(b))), actual, expected)


@pytest.mark.compile
@pytest.mark.parametrize("rows", [4, 5])  # of 4 strips: a tile's positions, and some that end within one
def test_upsampling_is_that_of_xla(array, rows):
    """With rows and columns repeated, frames, and other strips; and the statistics of what it gives."""
    weights, x, z = (
        {"conv.weight": array(3, 1, 3, 8, 8), "conv.bias": array(8)},
        array(3, 2, rows, 4, 8),
        array(3, 8, rows, 5),
    )

    def by_xla(weights, x, z):
        return DecoderLayer(weights, None, 2, 1, z).upsample(x, True)

    def by_kernel(weights, x, z):
        layer = FusedLayer(weights, None, 2, 1, z, interpret=True)
        image = layer.upsample(_image(layer, x), True)
        return _in_strips(image), image.statistics, _image(layer, _in_strips(image)).statistics

    arguments = (weights, x, z)
    expected = _compiled(by_xla, *arguments)
    actual, statistics, of_values = _compiled(by_kernel, *arguments)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(jnp.std(expected)))
    np.testing.assert_allclose(statistics, of_values, rtol=1e-5, atol=1e-5)


@pytest.mark.compile
def test_output_is_that_of_xla(array):
    """Of few channels, all rows of the kernel in one product; frames in pairs, of an even first batch."""
    weights = {"conv_out.conv.weight": array(3, 3, 3, 8, 3), "conv_out.conv.bias": array(3)}
    for part in ("conv_y.conv", "conv_b.conv"):
        weights |= {f"norm_out.{part}.weight": array(1, 1, 1, 5, 8), f"norm_out.{part}.bias": array(8)}
    weights |= {f"norm_out.norm_layer.{part}": array(8) for part in ("weight", "bias")}
    weights, x, z = pair_weights(weights, ("",)), array(4, 2, 8, 4, 8), array(2, 8, 4, 5)

    def by_xla(weights, x, z):
        return DecoderLayer(weights, None, 2, 1, z).in_pairs().output(pair(x))

    def by_kernel(weights, x, z):
        layer = FusedLayer(weights, None, 2, 1, z, interpret=True).in_pairs()
        return layer.output(_image(layer, pair(x)))

    actual, expected = (_compiled(function, weights, x, z) for function in (by_kernel, by_xla))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(jnp.std(expected)))


@pytest.mark.compile
@pytest.mark.slow("8 min")
@pytest.mark.parametrize("vmem", [V6E, Vmem(0, 0)], ids=["all frames a call", "a frame a call"])
def test_decoder_is_that_of_xla(vmem, rng):
    """Of the latents of the first batch and the next."""
    config = CONFIG | {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 3,
        "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    }
    weights = _random_weights(config, rng)
    shape = DecoderShape(3, 2, 2, 2, 1.0)
    latents = [jnp.asarray(rng.normal(size=(frames, 4, 8, 4)), jnp.float32) for frames in (FIRST, LATER)]

    def video(weights, *latents, layer):
        cache, outputs = None, []
        for z in latents:
            output, cache = decode(weights, z, cache, shape, 1, True, layer)
            outputs.append(output)
        return jnp.concatenate(outputs)

    kernel = functools.partial(FusedLayer, vmem=vmem, interpret=True)
    actual, expected = (_compiled(functools.partial(video, layer=layer), weights, *latents) for layer in (kernel, None))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * float(jnp.std(expected)))


@pytest.mark.compile
@pytest.mark.slow("2 min")
def test_decoder_of_two_devices_is_that_of_one():
    """Columns beside, and statistics, come from the other device. Each blocks a thread: there must be more of these."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": virtual_devices(2),
        "PJRT_NPROC": "16",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    command = [sys.executable, "-c", "import test_vae_fused; test_vae_fused.compare_two_devices_with_one()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PLENTY_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def compare_two_devices_with_one():
    """Decode by the kernel on two devices and by XLA on one, in a process that has two."""
    jax.config.update("jax_disable_most_optimizations", True)
    rng = np.random.default_rng(3)
    config = CONFIG | {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 2,
        "up_block_types": ("CogVideoXUpBlock3D",) * 2,
    }
    weights, shape = _random_weights(config, rng), DecoderShape(2, 2, 2, 1, 1.0)
    latents = [jnp.asarray(rng.normal(size=(frames, 4, 8, 4)), jnp.float32) for frames in (FIRST, LATER)]

    def decoded(layer, devices):
        def video(weights, *latents):
            cache, outputs = None, []
            for z in latents:
                output, cache = decode(weights, z, cache, shape, devices, True, layer)
                outputs.append(output)
            return jnp.concatenate(outputs)

        columns = PartitionSpec(None, None, SPLIT)
        over_mesh = jax.shard_map(
            video,
            mesh=split_mesh(jax.devices()[:devices], devices),
            in_specs=(PartitionSpec(), columns, columns),
            out_specs=columns,
            check_vma=False,
        )
        return np.asarray(jax.jit(over_mesh)(weights, *latents))

    expected, actual = decoded(None, 1), decoded(functools.partial(FusedLayer, interpret=True), 2)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * expected.std())


def _random_weights(config, rng):
    weights = {}
    for name, like in _shapes(config).items():
        values = rng.normal(size=like.shape)
        scaled = values / np.sqrt(np.prod(like.shape[:-1])) if like.ndim > 1 else 1 + values / 10
        weights[name] = jnp.asarray(scaled, jnp.float32)
    return weights


def _shapes(config):
    module = build_module("vae", config, torch.float32)
    return {
        name: jax.eval_shape(arrange, jax.ShapeDtypeStruct(value.shape, jnp.float32))
        for name, value in module.named_parameters()
        if name.startswith(("decoder.", "post_quant_conv."))
    }


SHAPE = DecoderShape(num_levels=4, num_resnets=4, num_groups=32, time_levels=2, scaling_factor=0.7)  # as published


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        pytest.param(90, 20, True, id="720p on eight devices"),
        pytest.param(90, 5, False, id="on 32, fewer than eight strips of too many rows"),
        pytest.param(400, 20, False, id="columns that exceed VMEM"),
    ],
)
def test_kernel_takes_what_fits(rows, columns, expected):
    assert can_fuse(_shapes(CONFIG), SHAPE, rows, columns, True, V6E) is expected


@pytest.mark.parametrize(("value", "expected"), [(None, True), ("1", True), ("0", False)])
def test_the_environment_leaves_the_kernel_out(value, expected, monkeypatch):
    if value is not None:
        monkeypatch.setenv(VAE_KERNEL_VARIABLE, value)
    assert _fuses() is expected


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(VAE_KERNEL_VARIABLE, "no")
    with pytest.raises(RequestError, match=r"COGVIDEOX_VAE_KERNEL=no: expected 0 \(XLA's convolutions\) or 1 \(the"):
        _fuses()


@pytest.mark.parametrize(("kind", "expected"), [("TPU7x", True), ("TPU v5", False), ("cpu", False)])
def test_the_kernel_is_for_chips_that_it_was_tried_on(kind, expected):
    assert _fuses(kind) is expected


class _Device(types.SimpleNamespace):
    def __hash__(self):
        return self.id


@pytest.mark.parametrize(
    ("chips", "kind", "latents", "groups"),
    [
        pytest.param(8, "TPU v6 lite", (90, 160), (1, 8), id="columns that the kernel takes"),
        pytest.param(16, "TPU v6 lite", (90, 160), (2, 8), id="of half as many chips"),
        pytest.param(32, "TPU v6 lite", (90, 160), (1, 32), id="of a quarter: XLA is faster"),
        pytest.param(16, "TPU v5", (90, 160), (1, 16), id="no kernel"),
        pytest.param(9, "TPU v6 lite", (90, 180), (1, 9), id="an odd number"),
        pytest.param(16, "TPU v6 lite", (160, 90), (2, 8), id="upright"),
    ],
)
def test_latents_are_split_so_that_the_kernel_takes_them(chips, kind, latents, groups):
    devices = [_Device(id=index, device_kind=kind, process_index=0, platform="tpu") for index in range(chips)]
    z = jax.ShapeDtypeStruct((1, 21, 16, *latents), jnp.bfloat16)
    sharding = decoder_sharding(_shapes(CONFIG), z, SHAPE, devices)
    assert tuple(sharding.mesh.shape.values()) == groups
    assert sharding.spec[3:] == ((SPLIT,) if latents[0] > latents[1] else (None, SPLIT))


def _fuses(kind="TPU v6 lite"):
    """Of 720p, on eight devices."""
    device = types.SimpleNamespace(device_kind=kind)
    return fuses(_shapes(CONFIG), jax.ShapeDtypeStruct((3, 90, 20, 16), jnp.bfloat16), SHAPE, device)


def test_kernel_takes_whole_registers():
    assert takes(720, 8, 256, V6E)
    assert not takes(720, 8, 200, V6E)
    assert takes(720, 8, 256, VMEM["TPU7x"]) and not takes(768, 8, 256, VMEM["TPU7x"])
