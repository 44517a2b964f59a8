import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pipeline.torchax_bridge import environment, jax_function, numpy_to_torch, torch_to_numpy, torchax_module


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(2, 12, 3, 5, 7), (1, 12, 11)])
def test_group_norm_is_torchs(shape, affine, rng):
    module = torch.nn.GroupNorm(3, 12, eps=1e-6, affine=affine)
    for parameter in module.parameters():
        parameter.data.copy_(torch.from_numpy(rng.normal(size=parameter.shape)))
    x = (rng.normal(size=shape) + 5).astype(np.float32)  # off centre: a one-pass variance would lose digits
    weights = {name: jnp.asarray(torch_to_numpy(value)) for name, value in module.named_parameters()}
    actual = jax.jit(jax_function(module))(weights, x)
    expected = module.double()(torch.from_numpy(x).double()).detach().numpy()
    # A float32 sum of 420 values around 5 is off by some 1e-5 of its mean at worst.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_group_norm_keeps_the_shape_and_does_not_loop():
    module = torch.nn.GroupNorm(4, 8)
    weights = {name: jnp.asarray(torch_to_numpy(value)) for name, value in module.named_parameters()}
    program = str(jax.make_jaxpr(jax_function(module))(weights, jnp.ones((1, 8, 3, 5, 7))))
    assert "scan" not in program
    assert "while" not in program


def test_group_norm_reduces_bfloat16_in_float32(rng):
    module = torch.nn.GroupNorm(1, 2, affine=False)
    x = jnp.asarray(rng.normal(size=(1, 2, 4001)) + 10, jnp.bfloat16)
    actual = np.asarray(jax_function(module)({}, x)).astype(np.float64)
    expected = module(torch.from_numpy(np.asarray(x, np.float64))).numpy()
    # One rounding of values up to 4 to 8 bits. A bfloat16 sum of these would stop growing at some 4000 of 80000.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=4 * 2**-8)


def test_the_environment_is_ours_and_the_default_one_stays_as_it_is():
    default = torchax_module().default_env()
    assert environment() is not default
    operator = torch.ops.aten.native_group_norm
    assert environment()._ops[operator].func is not default._ops[operator].func
    assert not default.enabled
    assert not environment().enabled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int64])
def test_conversion_keeps_every_bit(dtype):
    tensor = torch.arange(35).reshape(5, 7).to(dtype).t()
    array = torch_to_numpy(tensor)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert torch.equal(numpy_to_torch(array), tensor)
    assert numpy_to_torch(array).dtype == dtype


def test_importing_and_setting_up_changes_nothing_for_the_process():
    code = """
import torch
before = (torch.get_default_dtype(), torch.get_default_device(), torch.backends.mha.get_fastpath_enabled(),
          torch.initial_seed(), len(torch.ops.aten.prod.overloads()), hasattr(torch.ops.aten.unbind, "Dimname"))
import pipeline.runner, pipeline.torchax_bridge as bridge
import jax._src.xla_bridge
assert not jax._src.xla_bridge.backends_are_initialized(), "importing touched a device"
bridge.environment()
after = (torch.get_default_dtype(), torch.get_default_device(), torch.backends.mha.get_fastpath_enabled(),
         torch.initial_seed(), len(torch.ops.aten.prod.overloads()), hasattr(torch.ops.aten.unbind, "Dimname"))
assert before == after, (before, after)
assert type(torch.ones(2)) is torch.Tensor
assert "hydra" not in __import__("sys").modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
