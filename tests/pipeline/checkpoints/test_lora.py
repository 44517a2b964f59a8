"""LoRAs of every naming: merged as their factors say, and refused, before any weight is read, where they do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.checkpoints import loading
from pipeline.checkpoints.checks import check_request, read_configs
from pipeline.checkpoints.loading import Checkpoint, load_module
from pipeline.checkpoints.lora import lora_identity, merge_loras
from pipeline.requests.errors import CheckpointError, RequestError
from pipeline.requests.request import AttentionOptions, LoraFile, parse_lora
from pipeline.runs.request_run import generate
from pipeline.stages.denoise import Denoiser

RANK, CHANNELS = 3, 192  # of the session's checkpoint: 3 heads of 64
TARGETS = ("transformer_blocks.1.attn1.to_q", "transformer_blocks.0.attn1.to_out.0")

NAMINGS = {
    "diffusers": "transformer.{}.lora_{}.weight",
    "peft": "base_model.model.{}.lora_{}.default.weight",
    "peft under transformer": "base_model.model.transformer.{}.lora_{}.weight",
    "comfyui": "diffusion_model.{}.lora_{}.weight",
    "bare": "{}.lora_{}.weight",
    "kohya": "lora_unet_{}.lora_{}.weight",
    "videox-fun": "lora_unet__{}.lora_{}.weight",
}


def _factors(seed: int = 0, channels: int = CHANNELS, rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        target: (
            torch.randn(rank, channels, generator=generator) / 9,
            torch.randn(channels, rank, generator=generator) / 9,
        )
        for target in TARGETS
    }


def _write(path: Path, factors, naming: str = "diffusers", alpha: float | None = None, metadata=None) -> Path:
    tensors = {}
    for target, (down, up) in factors.items():
        is_kohya = NAMINGS[naming].startswith("lora_unet")
        name = target.replace(".", "_") if is_kohya else target
        for half, value in zip(("down", "up") if is_kohya else ("A", "B"), (down, up), strict=True):
            tensors[NAMINGS[naming].format(name, half)] = value.contiguous()
        if alpha is not None:
            tensors[NAMINGS[naming].partition("{}")[0] + name + ".alpha"] = torch.tensor(alpha)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.fixture(scope="module")
def weights(tiny_folder):
    return load_module(
        Checkpoint("small", tiny_folder), "transformer", torch.float32, place=lambda value: value
    ).weights


def _expected(weights, *changes):
    """changes: (factors, the factor of their product)."""
    expected = dict(weights)
    for factors, scale in changes:
        for target, (down, up) in factors.items():
            name = f"{target}.weight"
            expected[name] = expected[name] + scale * (up @ down).numpy()
    return expected


def _assert_merged(weights, loras, expected):
    actual = dict(weights)
    merge_loras(actual, loras, "checkpoint='small'")
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_every_naming(naming, alpha, weights, tmp_path):
    factors = _factors()
    path = _write(tmp_path / "one.safetensors", factors, naming, alpha)
    scale = 0.5 * (alpha / RANK if alpha else 1.0)
    _assert_merged(weights, [LoraFile(str(path), 0.5)], _expected(weights, (factors, scale)))


def test_several_at_once(weights, tmp_path):
    one, other = _factors(1), _factors(2)
    loras = [
        LoraFile(str(_write(tmp_path / f"{name}.safetensors", factors)), strength)
        for name, factors, strength in (("one", one, 0.75), ("other", other, -1.5), ("off", one, 0.0))
    ]
    _assert_merged(weights, loras, _expected(weights, (one, 0.75), (other, -1.5)))


def test_settings_beside_the_weights_and_among_them(weights, tmp_path):
    factors = _factors()
    kept = {"transformer.r": RANK, "transformer.lora_alpha": 12, "transformer.alpha_pattern": {"to_q": 3}}
    metadata = {"lora_adapter_metadata": json.dumps(kept)}
    inside = _write(tmp_path / "inside.safetensors", factors, metadata=metadata)
    to_q, to_out = ({name: factors[name]} for name in TARGETS)
    expected = _expected(weights, (to_q, 3 / RANK), (to_out, 12 / RANK))
    _assert_merged(weights, [LoraFile(str(inside))], expected)
    beside = _write(tmp_path / "peft" / "adapter_model.safetensors", factors, "peft")
    (beside.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12, "use_rslora": True}))
    _assert_merged(weights, [LoraFile(str(beside.parent))], _expected(weights, (factors, 12 / RANK**0.5)))


def test_patches_of_a_convolution(tmp_path):
    weights = {"patch_embed.proj.weight": np.zeros((6, 4, 2, 2), np.float32)}
    down, up = torch.randn(RANK, 4, 2, 2), torch.randn(6, RANK, 1, 1)
    save_file(
        {"patch_embed.proj.lora_A.weight": down, "patch_embed.proj.lora_B.weight": up}, tmp_path / "x.safetensors"
    )
    merge_loras(weights, [LoraFile(str(tmp_path / "x.safetensors"))], "checkpoint='small'")
    expected = torch.einsum("or,rchw->ochw", up[..., 0, 0], down)
    np.testing.assert_allclose(weights["patch_embed.proj.weight"], expected.numpy(), rtol=0, atol=1e-5)


def test_the_denoiser_has_it_in_its_weights(tiny_folder, weights, tmp_path):
    checkpoint, path = Checkpoint("small", tiny_folder), _write(tmp_path / "one.safetensors", _factors())
    plain, changed = (
        Denoiser(checkpoint, torch.bfloat16, AttentionOptions(), loras=loras).weights
        for loras in ((), (LoraFile(str(path)),))
    )
    different = {name for name in plain if not np.array_equal(plain[name], changed[name])}
    assert different == {f"transformer_blocks.attn1.{name}.weight" for name in ("to_q", "to_out.0")}
    assert changed["transformer_blocks.attn1.to_q.weight"].dtype == "bfloat16"


def _spoilt(what: str) -> dict[str, torch.Tensor]:
    down, up = (f"{TARGETS[0]}.lora_{half}.weight" for half in "AB")
    tensors = {down: torch.ones(RANK, CHANNELS), up: torch.ones(CHANNELS, RANK)}
    if what == "not finite":
        tensors[up][5, 1] = float("nan")
    elif what == "whole numbers":
        tensors[up] = tensors[up].to(torch.int8)
    elif what == "rank 0":
        tensors = {down: torch.ones(0, CHANNELS), up: torch.ones(CHANNELS, 0)}
    elif what == "no matrix":
        tensors[down] = torch.tensor(1.0)
    elif what == "twice":
        tensors[f"diffusion_model.{up}"] = tensors[up] * 2
    else:
        tensors[f"{TARGETS[0]}.alpha"] = torch.tensor(float("inf"))
    return tensors


def _wrong(folder: Path, what: str) -> str:
    folder.mkdir(exist_ok=True)
    path = folder / "wrong.safetensors"
    if what == "another width":
        _write(path, _factors(channels=128))
    elif what == "another model":
        save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(1, 3)}, path)
    elif what == "too deep":
        factors = {name.replace("blocks.1", "blocks.41"): pair for name, pair in _factors().items()}
        _write(path, factors)
    elif what == "half":
        save_file({f"transformer.{TARGETS[0]}.lora_A.weight": torch.zeros(RANK, CHANNELS)}, path)
    elif what == "dora":
        save_file({f"transformer.{TARGETS[0]}.lora_magnitude_vector": torch.zeros(CHANNELS)}, path)
    elif what == "lokr":
        save_file({"lora_unet_transformer_blocks_0_attn1_to_q.lokr_w1": torch.zeros(2, 2)}, path)
    elif what == "text encoder":
        save_file({"text_encoder.encoder.block.0.lora_A.weight": torch.zeros(2, 2)}, path)
    elif what == "damaged":
        path.write_bytes(b"{}")
    elif what == "pickle":
        (path := folder / "wrong.bin").write_bytes(b"")
    elif what.startswith("bad"):
        kept = {"lora_alpha": "much"} if what == "bad alpha" else {"alpha_pattern": {"(": 1}}
        _write(path, _factors(), metadata={"lora_adapter_metadata": json.dumps(kept)})
    elif what == "flat":
        shapes = {"A": (RANK, CHANNELS), "B": (CHANNELS,)}
        save_file({f"{TARGETS[0]}.lora_{half}.weight": torch.zeros(shape) for half, shape in shapes.items()}, path)
    elif what in ("not finite", "whole numbers", "rank 0", "no matrix", "twice", "infinite alpha"):
        save_file(_spoilt(what), path)
    elif what == "empty":
        save_file({}, path)
    elif what == "two":
        for name in ("a", "b"):
            _write(folder / f"{name}.safetensors", _factors())
        return str(folder)
    return str(path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "another width",
            r"lora_B.weight \[128, 3\] times .* \[3, 128\] is no \[192, 192\] .*: a LoRA of another model",
        ),
        ("another model", "double_blocks.0.img_attn.qkv.lora_A.weight .* fits no weight of checkpoint="),
        ("too deep", "transformer_blocks.41.* fits no weight"),
        ("half", "only one half, transformer.transformer_blocks.1.attn1.to_q.lora_A.weight"),
        ("dora", "lora_magnitude_vector: not a plain LoRA"),
        ("lokr", "lokr_w1: not a plain LoRA"),
        ("text encoder", "text_encoder.*: not a plain LoRA of the transformer"),
        ("damaged", "not readable as safetensors"),
        ("pickle", "a file of another kind; expected one of safetensors"),
        ("empty", "an empty file fits no weight"),
        ("bad alpha", "no scale of transformer_blocks.*could not convert string to float: 'much'"),
        ("bad pattern", "no scale of transformer_blocks"),
        ("flat", r"lora_B.weight \[192\] times"),
        ("not finite", "to_q.lora_B.weight holds NaN or infinity; expected finite floats"),
        ("whole numbers", "to_q.lora_B.weight is int8; expected finite floats"),
        ("infinite alpha", "to_q.alpha holds NaN or infinity"),
        ("rank 0", r"times .*lora_A.weight \[0, 192\] is no"),
        ("no matrix", r"times .*lora_A.weight \[\] is no"),
        ("twice", "are of one weight: expected a file of one LoRA"),
        ("two", "holds 2 files of safetensors; expected one"),
        ("absent", "no such file"),
    ],
)
def test_refused_before_any_weight_is_read(what, message, request_of, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "open_weights", lambda *args: pytest.fail("a weight is read"))
    request = request_of(lora=(LoraFile(_wrong(tmp_path / "lora", what)),))
    with pytest.raises(CheckpointError, match=f"^lora='.*{message}") as error:
        generate(request, run_dir=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_one_that_fits_is_let_through(request_of, tiny_folder, tmp_path):
    path = _write(tmp_path / "one.safetensors", _factors())
    check_request(request_of(lora=(LoraFile(str(path)),)), read_configs(Checkpoint("small", tiny_folder)))


def test_its_content_and_strength_tell_it_from_others(tmp_path):
    path = _write(tmp_path / "one.safetensors", _factors(1))
    first = lora_identity([LoraFile(str(path))])
    assert lora_identity([LoraFile(str(path), 0.5)]) != first
    _write(path, _factors(2))
    assert lora_identity([LoraFile(str(path))]) != first
    assert lora_identity([]) == ()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        ("a.safetensors", [("a.safetensors", 1.0)]),
        (["a/b.safetensors:0.5", "c:-1"], [("a/b.safetensors", 0.5), ("c", -1.0)]),
        ("a:b/c.safetensors", [("a:b/c.safetensors", 1.0)]),
    ],
)
def test_as_text(value, expected):
    assert [(lora.path, lora.strength) for lora in parse_lora(value)] == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a:strong", "'strong' is no strength; expected path:1.0"),
        ("a:11", "strength=11.0: expected a number from -10 to 10"),
        (3, "lora=3: expected path"),
        ("", "lora='': expected path"),
    ],
)
def test_text_that_is_none(value, message):
    with pytest.raises(RequestError, match=message):
        parse_lora(value)
