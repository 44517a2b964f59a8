import subprocess
import sys

import pytest
import torch

from helpers import PLENTY_S
from pipeline.model.torchax_bridge import environment, numpy_to_torch, torch_to_numpy, torchax_module


def test_the_environment_is_ours_and_the_default_one_stays_as_it_is():
    default = torchax_module().default_env()
    assert environment() is not default
    assert not default.enabled
    assert not environment().enabled


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.int64])
def test_conversion_keeps_every_bit(dtype):
    tensor = torch.arange(35).reshape(5, 7).to(dtype).t()
    array = torch_to_numpy(tensor)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert torch.equal(numpy_to_torch(array), tensor)
    assert numpy_to_torch(array).dtype == dtype


@pytest.mark.compile
def test_importing_and_setting_up_changes_nothing_for_the_process():
    code = """
import torch
before = (torch.get_default_dtype(), torch.get_default_device(), torch.backends.mha.get_fastpath_enabled(),
          torch.initial_seed(), len(torch.ops.aten.prod.overloads()), hasattr(torch.ops.aten.unbind, "Dimname"))
import pipeline.runs.request_run, pipeline.model.torchax_bridge as bridge
import jax._src.xla_bridge
assert not jax._src.xla_bridge.backends_are_initialized(), "importing touched a device"
bridge.environment()
after = (torch.get_default_dtype(), torch.get_default_device(), torch.backends.mha.get_fastpath_enabled(),
         torch.initial_seed(), len(torch.ops.aten.prod.overloads()), hasattr(torch.ops.aten.unbind, "Dimname"))
assert before == after, (before, after)
assert type(torch.ones(2)) is torch.Tensor
assert "hydra" not in __import__("sys").modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PLENTY_S)
