"""What configurations decide is decided, in one line, before any weight is read."""

import json
import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import loading
from pipeline.checkpoints.checks import check_request, check_weights, read_configs
from pipeline.checkpoints.loading import Checkpoint, resolve_checkpoint
from pipeline.checkpoints.stored import StoredFile
from pipeline.checkpoints.weight_files import STEMS
from pipeline.requests.batch_file import Entry
from pipeline.requests.errors import CheckpointError, PipelineError, RequestError
from pipeline.requests.options import RunOptions
from pipeline.requests.request import STAGES, AttentionOptions, GenerateRequest
from pipeline.runs.batch import prepare
from pipeline.runs.request_run import generate
from splash_attn.types import Variant

CONFIGS = {"scheduler": "scheduler/scheduler_config.json", "index": "model_index.json"}


def _change(folder: Path, part: str, **changes) -> None:
    path = folder / CONFIGS.get(part, f"{part}/config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _drop(folder: Path, part: str, *keys: str) -> None:
    path = folder / f"{part}/config.json"
    path.write_text(json.dumps({key: x for key, x in json.loads(path.read_text()).items() if key not in keys}))


@pytest.fixture
def no_weights(monkeypatch):
    """Fail where a weight is read."""
    monkeypatch.setattr(loading, "open_weights", lambda *args: pytest.fail("a weight is read"))


WRONG = [
    ("transformer", {"sample_height": 4}, "height=48: the rotary table .* ends at 32; expected height=32 or less"),
    ("transformer", {"sample_width": 8}, "width=80: the rotary table .* ends at 64"),
    ("transformer", {"patch_size": 4}, "height=48: expected a multiple of 32; the nearest is 32 or 64"),
    ("transformer", {"activation_fn": "gelu"}, "activation_fn='gelu', expected 'gelu-approximate'"),
    ("transformer", {"attention_head_dim": 24}, "attention_head_dim=24, expected a multiple of 16"),
    ("transformer", {"max_text_seq_length": 0}, "max_text_seq_length=0, expected a whole number above 0"),
    ("transformer", {"sample_width": "wide"}, "sample_width='wide', expected a whole number"),
    ("transformer", {"num_layers": "two"}, "transformer/config.json: num_layers='two', expected a whole number"),
    ("transformer", {"norm_eps": "x"}, "transformer/config.json: norm_eps='x', expected a number"),
    ("vae", {"norm_eps": True}, "vae/config.json: norm_eps=True, expected a number"),
    (
        "text_encoder",
        {"layer_norm_epsilon": [1]},
        r"text_encoder/config.json: layer_norm_epsilon=\[1\], expected a number",
    ),
    ("transformer", {"text_embed_dim": 21}, "text_embed_dim=21, but text_encoder/config.json: d_model=20"),
    ("transformer", {"in_channels": 8, "out_channels": 8}, "out_channels=8, but vae/config.json: latent_channels=16"),
    ("transformer", {"in_channels": 33}, "in_channels=33, expected out_channels, or twice as many"),
    ("transformer", {"ofs_embed_dim": 512}, "ofs_embed_dim=512, expected null or time_embed_dim, 24"),
    ("transformer", {"in_channels": 32}, "image=null: .* is an image-to-video model; expected image=path"),
    (
        "transformer",
        {"patch_size_t": None, "sample_frames": 5},
        "num_frames=9: .* is for 5 frames; expected num_frames=5 or less",
    ),
    ("vae", {"act_fn": "relu"}, "vae/config.json: act_fn='relu', expected 'silu'"),
    ("vae", {"temporal_compression_ratio": 6}, "temporal_compression_ratio=6"),
    ("vae", {"norm_num_groups": 7}, "vae/config.json: ValueError"),
    ("vae", {"scaling_factor": 0}, "scaling_factor=0"),
    ("vae", {"_class_name": "AutoencoderKLWan"}, "vae/config.json is for 'AutoencoderKLWan'"),
    ("vae", {"_class_name": None}, "vae/config.json has no _class_name, expected 'AutoencoderKLCogVideoX'"),
    ("text_encoder", {"model_type": "umt5"}, "text_encoder/config.json is for 'umt5', expected 't5'"),
    ("text_encoder", {"feed_forward_proj": "gated-what-gelu"}, "text_encoder/config.json: .*gated-what-gelu"),
    (
        "scheduler",
        {"_class_name": "EulerDiscreteScheduler"},
        "checkpoint='.*': scheduler/scheduler_config.json: the scheduler is for 'EulerDiscreteScheduler', exp",
    ),
    (
        "scheduler",
        {"_class_name": []},
        r"checkpoint='.*': scheduler/scheduler_config.json: the scheduler is for \[\], expected one",
    ),
    ("scheduler", {"prediction_type": "banana"}, "checkpoint='.*': scheduler/scheduler_config.json: .*banana"),
    ("scheduler", {"beta_end": None}, "checkpoint='.*': scheduler/scheduler_config.json: TypeError"),
    (
        "scheduler",
        {"snr_shift_scale": -1},
        "checkpoint='.*': scheduler/scheduler_config.json: num_inference_steps=3: the scheduler's step 0 is not finite",
    ),
    ("scheduler", {"num_train_timesteps": 2}, "num_inference_steps=3: this scheduler has at most 2"),
]


@pytest.mark.parametrize(("part", "changes", "message"), WRONG)
def test_decided_before_any_weight_is_read(folder, request_of, tmp_path, no_weights, part, changes, message):
    _change(folder, part, **changes)
    request = request_of(checkpoint=str(folder))
    with pytest.raises(PipelineError, match=message) as error:
        generate(request, run_dir=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    entries = [Entry(1, request, "one")]
    with pytest.raises(RequestError, match=f"lines:1: .*{message}"):
        prepare(entries, Path("lines"), ("text", "denoise", "vae"), tmp_path / "out", RunOptions())


FROM_IMAGE = {"in_channels": 32, "sample_height": 6, "sample_width": 10, "sample_frames": 9}
LEARNED = {**FROM_IMAGE, "use_learned_positional_embeddings": True, "patch_size_t": None}
WRONG_INPUTS = [
    ({}, {"image": "image.png"}, "image='.*': .* is a text-to-video model; expected model=tiny-i2v or model=cogvideox"),
    (FROM_IMAGE, {"video": "a.mp4"}, "image=null: .* expected image=path instead of video, which a text model takes"),
    (FROM_IMAGE, {"image": "absent.png"}, "image='absent.png': No such file or directory; expected a file such as PNG"),
    (LEARNED, {"image": "image.png", "height": 32}, "height=32: .* learned positions, for height=48 only"),
    (LEARNED, {"image": "image.png", "width": 96}, "width=96: .* learned positions, for width=80 only"),
    (LEARNED, {"image": "image.png", "num_frames": 1}, "num_frames=1: .* learned positions, for num_frames=9 only"),
    ({"patch_size_t": None, "sample_frames": 49}, {"num_frames": 81}, "num_frames=81: .* for 49 frames; expected num"),
    ({}, {"latents": "image.png"}, "latents='.*image.png': .*expected a file of safetensors with one tensor"),
    ({}, {"video": "image.png", "strength": 0.5}, "video='.*image.png': holds 1 frames; expected num_frames=9 of them"),
]


@pytest.mark.parametrize(("config", "changes", "message"), WRONG_INPUTS)
def test_inputs_that_do_not_fit_the_model(folder, request_of, tmp_path, no_weights, config, changes, message):
    _change(folder, "transformer", **config)
    Image.new("RGB", (80, 48)).save(tmp_path / "image.png")
    paths = {name: str(tmp_path / value) for name, value in changes.items() if value == "image.png"}
    with pytest.raises(PipelineError, match=message) as error:
        generate(request_of(checkpoint=str(folder), **{**changes, **paths}), run_dir=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_encoder_with_other_norms(folder, request_of, tmp_path, no_weights):
    _change(folder, "vae", norm_eps=1e-5)
    check_request(request_of(), read_configs(Checkpoint("mine", folder)))
    with pytest.raises(
        CheckpointError, match=r"checkpoint='.*': vae/config.json: norm_eps=1e-05, expected 1e-06 to enc"
    ):
        generate(request_of(checkpoint=str(folder), video="a.mp4"), run_dir=tmp_path / "run")


def test_latents_of_another_size(tiny_folder, request_of, tmp_path):
    configs, path = read_configs(Checkpoint("small", tiny_folder)), tmp_path / "noise.safetensors"
    save_file({"latents": torch.zeros(1, 4, 16, 6, 10)}, path)
    check_request(request_of(latents=str(path)), configs)
    with pytest.raises(RequestError, match=r"has shape \[1, 4, 16, 6, 10\]; expected \[1, 6, 16, 6, 10\]"):
        check_request(request_of(latents=str(path), num_frames=17), configs)


def test_a_size_beyond_the_published_rotary_table(tmp_path, no_weights):
    with pytest.raises(RequestError, match=r"width=2416: the rotary table of checkpoint='tiny' ends at 2400"):
        generate(GenerateRequest("a", height=16, width=2416), run_dir=tmp_path / "run")
    check_request(GenerateRequest("a", height=16, width=2400), read_configs(resolve_checkpoint("tiny")))


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (AttentionOptions(qk_dtype="int8"), "attention: qk_dtype='int8' is the kernel's"),
        (AttentionOptions(qk_dtype="int8", variant=Variant(qk_dtype="bfloat16")), "attention: .*contradicts"),
    ],
)
def test_attention_that_cannot_run(request_of, tmp_path, no_weights, attention, message):
    with pytest.raises(RequestError, match=message):
        generate(request_of(attention=attention), run_dir=tmp_path / "run")


def test_no_tokenizer(folder, request_of, tmp_path, no_weights):
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer; expected tokenizer.json or spiece.model"):
        generate(request_of(checkpoint=str(folder)), run_dir=tmp_path / "run")


def test_what_a_configuration_leaves_out_is_diffusers_default(folder):
    _drop(folder, "transformer", "sample_height", "max_text_seq_length", "ofs_embed_dim", "flip_sin_to_cos")
    _drop(folder, "vae", "act_fn", "temporal_compression_ratio")
    configs = read_configs(Checkpoint("mine", folder))
    assert configs["transformer"]["max_text_seq_length"] == 226
    assert configs["transformer"]["sample_height"] == 60
    assert configs["vae"]["temporal_compression_ratio"] == 4


OTHER_KINDS = [
    (
        {"transformer": {"_class_name": "WanTransformer3DModel"}},
        "is for .WanTransformer3DModel.",
    ),
    ({"index": {"_class_name": "WanPipeline"}, "transformer": {"_class_name": "Wan"}}, "this is a WanPipeline"),
    ({"index": {"_class_name": "StableDiffusionPipeline"}}, "this is a StableDiffusionPipeline"),
]


@pytest.mark.parametrize(("changes", "message"), OTHER_KINDS)
def test_another_model_is_named_before_any_other_complaint(folder, changes, message):
    for part, values in changes.items():
        _change(folder, part, **values)
    _change(folder, "vae", act_fn="relu")
    with pytest.raises(
        CheckpointError, match=f"{message}.*; supported here: CogVideoX, model=tiny, model=tiny-i2v, model=cogvideox-2b"
    ):
        read_configs(Checkpoint("mine", folder))


def test_the_tiny_model_says_what_it_was_trained_on(caplog):
    configs = read_configs(resolve_checkpoint("tiny"))
    with caplog.at_level(logging.WARNING):
        check_request(GenerateRequest("a"), configs)
        check_request(GenerateRequest("a", "tiny-random", height=160), configs)
        assert not caplog.records
        for _ in range(2):
            check_request(GenerateRequest("a", height=96, width=160), configs)
    (record,) = caplog.records
    assert "160x96, 17 frames: model tiny was trained on 96x64, 17 frames" in record.getMessage()
    with caplog.at_level(logging.WARNING):
        check_request(GenerateRequest("a", num_frames=41), configs)
    assert "41 frames" in caplog.messages[-1]


def _rewrite(folder: Path, part: str, change) -> None:
    path = folder / part / f"{STEMS[part]}.safetensors"
    save_file({name: change(name, value) for name, value in load_file(path).items()}, path)


@pytest.fixture
def no_bytes(monkeypatch):
    """Fail where more than the header of a file of weights is read."""
    monkeypatch.setattr(StoredFile, "read", lambda *args: pytest.fail("a weight is read"))


TENSORS = {
    "text_encoder": "shared.weight",
    "transformer": "proj_out.bias",
    "vae": "decoder.conv_in.conv.weight",
}
WRONG_WEIGHTS = [
    (lambda value: value[:-1].clone(), r"has shape \[.*\], expected \["),
    (lambda value: value.to(torch.int8), "has dtype I8, expected a floating one, .*python -m pipeline.quantize"),
    (lambda value: value.to(torch.int64), "has dtype I64, expected a floating one"),
]


@pytest.mark.parametrize("part", TENSORS)
@pytest.mark.parametrize(("change", "message"), WRONG_WEIGHTS)
def test_weights_that_do_not_fit_are_found_by_their_headers(
    folder, request_of, tmp_path, no_bytes, part, change, message
):
    """Before the first stage, not when the part's own turn comes."""
    _rewrite(folder, part, lambda name, value: change(value) if name == TENSORS[part] else value)
    request = request_of(checkpoint=str(folder))
    message = f"checkpoint='.*': {part}/.*safetensors: {TENSORS[part]} {message}"
    with pytest.raises(CheckpointError, match=message) as error:
        generate(request, run_dir=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RequestError, match=f"lines:1: {message}"):
        prepare([Entry(1, request, "one")], Path("lines"), STAGES, tmp_path / "out", RunOptions())


def test_only_weights_that_the_request_needs_are_checked(folder, no_bytes):
    def check(*stages, encodes=False):
        check_weights(checkpoint, configs, stages, encodes)

    checkpoint = Checkpoint("mine", folder)
    configs = read_configs(checkpoint)
    _rewrite(folder, "vae", lambda name, value: value.to(torch.int8 if name.startswith("encoder.") else value.dtype))
    check(*STAGES)
    with pytest.raises(CheckpointError, match=r"vae/.*: encoder.* has dtype I8"):
        check(*STAGES, encodes=True)
    (folder / "text_encoder" / "model.safetensors").unlink()
    check("denoise", "vae")
    with pytest.raises(CheckpointError, match="text_encoder/ holds no weights"):
        check("text")


def test_eight_bit_floats_fit(folder, no_bytes):
    for part in TENSORS:
        _rewrite(folder, part, lambda name, value: value.to(torch.float8_e4m3fn))
    checkpoint = Checkpoint("mine", folder)
    check_weights(checkpoint, read_configs(checkpoint), STAGES, encodes=True)


def test_nothing_is_fetched_to_be_checked(checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("a file is fetched"))
    hub = Checkpoint("owner/name", repo_id="owner/name", commit="c0ffee")
    check_weights(hub, read_configs(checkpoint), STAGES, encodes=True)
