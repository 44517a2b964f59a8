"""int8 weights as a file: what is read is what was written, and a file that does not fit is refused beforehand."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import quantize
from pipeline.checkpoints.checks import check_request, read_configs
from pipeline.checkpoints.loading import resolve_checkpoint
from pipeline.checkpoints.quantized import is_quantized, save_quantized
from pipeline.model.layers.int8 import quantize_weight
from pipeline.requests.errors import CheckpointError, RequestError
from pipeline.requests.options import ParallelOptions
from pipeline.requests.request import AttentionOptions, LoraFile
from pipeline.stages.denoise import Denoiser

ONE = ParallelOptions(num_devices=1)


@pytest.fixture(scope="module")
def file(tiny_folder, tmp_path_factory) -> Path:
    """The session's checkpoint in int8, made by the command."""
    path = tmp_path_factory.mktemp("int8") / "int8.safetensors"
    argv, sys.argv = sys.argv, ["quantize", f"checkpoint={tiny_folder}", f"output={path}", "dtype=float32"]
    try:
        assert quantize.main() == 0
    finally:
        sys.argv = argv
    return path


def test_what_is_read_is_what_was_written(file, tiny_folder, checkpoint):
    again = resolve_checkpoint(str(tiny_folder), transformer=str(file))
    read_configs(again)
    expected, actual = (
        Denoiser(each, torch.float32, AttentionOptions(), ONE, quantization="int8").weights
        for each in (checkpoint, again)
    )
    assert is_quantized(file) and actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    stock = sum(path.stat().st_size for path in (tiny_folder / "transformer").glob("*.safetensors"))
    assert file.stat().st_size < stock / 2  # of float32, whose norms stay


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    """In int8 they would look like any others."""
    scale = quantize_weight(jnp.ones((4, 8)).at[1, 2].set(jnp.nan))[1]
    with pytest.raises(CheckpointError, match=r"^scale holds NaN or infinity"):
        save_quantized({"scale": scale}, None, tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_into_a_checkpoints_transformer(tiny_folder, monkeypatch, capsys):
    """Its weights would be those of two files."""
    output = tiny_folder / "transformer" / "another.safetensors"
    monkeypatch.setattr(sys, "argv", ["quantize", f"checkpoint={tiny_folder}", f"output={output}"])
    assert quantize.main() == 2
    assert "another.safetensors': weights are read from there" in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "its weights are int8; expected quantization=int8, too"),
        ({"quality": "fast", "quantization": "none"}, "its weights are int8; expected quantization=int8, too"),
        ({"quantization": "int8", "lora": (LoraFile("x.safetensors"),)}, "nothing is merged into int8 weights"),
    ],
)
def test_requests_that_cannot_use_it(changes, message, file, checkpoint, request_of):
    with pytest.raises(RequestError, match=message):
        check_request(request_of(transformer=str(file), **changes), read_configs(checkpoint))


def test_a_preset_can_use_it(file, checkpoint, request_of):
    check_request(request_of(transformer=str(file), quality="fast"), read_configs(checkpoint))


@pytest.mark.parametrize("what", ["a weight less", "another shape", "another dtype"])
def test_files_that_do_not_fit(what, file, tiny_folder, tmp_path):
    tensors, name = load_file(file), "transformer_blocks.ff.net.2.smoothing"
    value = tensors.pop(name)
    if what == "another shape":
        tensors[name] = value[:, :-1].clone()
    if what == "another dtype":
        tensors[name] = value.to(torch.int8)
    save_file(tensors, tmp_path / "wrong.safetensors", metadata={"quantization": "int8"})
    problems = {"a weight less": f"lacks {name}", "another shape": f"{name} has shape "}
    message = problems.get(what, f"{name} has dtype I8, expected a floating one")
    with pytest.raises(CheckpointError, match=message):
        read_configs(resolve_checkpoint(str(tiny_folder), transformer=str(tmp_path / "wrong.safetensors")))
