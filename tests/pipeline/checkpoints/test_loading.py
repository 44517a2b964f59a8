import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.checkpoints import loading
from pipeline.checkpoints.checks import read_configs
from pipeline.checkpoints.loading import Checkpoint, load_module, resolve_checkpoint
from pipeline.checkpoints.tiny import TinySpec, ensure_tiny_checkpoint
from pipeline.requests.errors import CheckpointError
from pipeline.stages.text import load_tokenizer
from splash_workbench import provenance

SMALL = TinySpec(num_layers=1, num_attention_heads=1, text_layers=1, vae_block_out_channels=(8, 8, 8, 8))


def _load(folder: Path, part: str = "transformer", **options):
    return load_module(Checkpoint("mine", folder), part, torch.float32, **options)


def _rewrite(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def test_every_part_loads_as_from_pretrained_does(checkpoint, stock):
    for part in ("text_encoder", "transformer", "vae"):
        loaded = load_module(checkpoint, part, torch.float32)
        expected = dict(getattr(stock, part).named_parameters())
        assert set(loaded.weights) == set(expected)
        for name, value in loaded.weights.items():
            assert np.array_equal(value, expected[name].numpy()), name
        assert all(parameter.is_meta for parameter in loaded.module.parameters())
        assert not loaded.module.training


def test_weights_take_the_dtype_asked_for(checkpoint):
    loaded = load_module(checkpoint, "vae", torch.bfloat16, keep=lambda name: name.startswith("decoder."))
    assert {str(value.dtype) for value in loaded.weights.values()} == {"bfloat16"}
    assert all(name.startswith("decoder.") for name in loaded.weights)


def test_an_alias_of_a_tied_weight_is_the_same_weight(folder):
    def store_under_the_other_name(tensors):
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        tensors["decoder.block.0.weight"] = torch.ones(2)  # of a whole T5: not wanted, and no error

    before = _load(folder, "text_encoder").weights
    _rewrite(folder / "text_encoder" / "model.safetensors", store_under_the_other_name)
    after = _load(folder, "text_encoder").weights
    assert set(after) == set(before)
    assert np.array_equal(after["shared.weight"], before["shared.weight"])


def test_missing_part(folder):
    shutil.rmtree(folder / "vae")
    with pytest.raises(CheckpointError, match=r"'mine': (no folder vae/|cannot read vae/config.json)"):
        _load(folder, "vae")


def test_pickle_only_is_refused_and_not_read(folder):
    (folder / WEIGHTS).rename(folder / "transformer" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(diffusion_pytorch_model.bin\).*safetensors"):
        _load(folder)


def test_no_weights_at_all(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"transformer/ holds no weights"):
        _load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None])
def test_unreadable_weights(folder, content):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=r"transformer/diffusion_pytorch_model.safetensors is not readable"):
        _load(folder)


def test_a_missing_weight_is_an_error_not_a_random_one(folder):
    _rewrite(folder / WEIGHTS, lambda tensors: tensors.pop("proj_out.bias"))
    with pytest.raises(CheckpointError, match=r"lacks proj_out.bias \(1 missing, 0 unexpected"):
        _load(folder)


def test_an_unexpected_weight(folder):
    _rewrite(folder / WEIGHTS, lambda tensors: tensors.update({"ofs.bias": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"has ofs.bias"):
        _load(folder)


def test_a_weight_of_another_shape(folder):
    _rewrite(folder / WEIGHTS, lambda tensors: tensors.update({"proj_out.bias": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"proj_out.bias has shape \[3\], expected \[128\]"):
        _load(folder)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_of_whole_numbers_are_not_read_as_they_are(folder, part):
    _rewrite(folder / part / WEIGHTS.name, lambda tensors: tensors.update({x: y.char() for x, y in tensors.items()}))
    with pytest.raises(CheckpointError, match=rf"^checkpoint='mine': {part}/\S+: \S+ has dtype I8, expected a"):
        _load(folder, part)


def test_shards_are_put_together(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"diffusion_pytorch_model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / "transformer" / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert set(_load(folder).weights) == set(names)


@pytest.mark.parametrize(("content", "message"), [("{", "is not JSON"), ("[]", "expected an object")])
def test_unreadable_config(folder, content, message):
    (folder / "transformer" / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        _load(folder)


def test_unreadable_tokenizer(folder):
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"^checkpoint='mine': tokenizer/tokenizer.json is not JSON: cannot read"):
        load_tokenizer(Checkpoint("mine", folder))


def test_a_sentencepiece_tokenizer_loads(folder):
    """The published checkpoint has spiece.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")] * 20
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "tokenizer" / "spiece"),
        model_type="unigram",
        vocab_size=40,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer" / "spiece.vocab").unlink()
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "extra_ids": 100}')
    token_ids = load_tokenizer(Checkpoint("mine", folder))("a red circle")["input_ids"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer" / "spiece.model"))
    assert token_ids == [*processor.encode("a red circle"), 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nope", "no such folder; expected tiny, tiny-i2v, tiny-random, an existing folder, or owner/name"),
        ("nope", "no such folder"),
        ("a/b/c", "no such folder"),
        ("own er/na me", "not a valid Hub id"),
    ],
)
def test_what_is_no_checkpoint(name, message):
    with pytest.raises(CheckpointError, match=message):
        resolve_checkpoint(name)


def test_a_file_is_no_checkpoint(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="a file; expected a folder"):
        resolve_checkpoint(str(path))


def test_a_folder_has_no_revision(tiny_folder):
    with pytest.raises(CheckpointError, match="revision='main': only a Hub id has revisions"):
        resolve_checkpoint(str(tiny_folder), "main")


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def snapshot_download(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match="'owner/name': no such folder here, and the Hub cannot be reached"):
        resolve_checkpoint("owner/name")


def test_from_the_hub_only_the_parts_asked_for_are_fetched(monkeypatch, tiny_folder, tmp_path):
    snapshot = tmp_path / "snapshots" / "c0ffee"
    shutil.copytree(tiny_folder, snapshot)
    asked = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = resolve_checkpoint("owner/name", "main")
    assert checkpoint.identity("vae") == "owner/name@c0ffee"
    load_module(checkpoint, "vae", torch.float32)
    assert {(repo, revision) for repo, revision, _ in asked} == {("owner/name", "main"), ("owner/name", "c0ffee")}
    patterns = [pattern for *_, patterns in asked for pattern in patterns]
    weights = [pattern for pattern in patterns if "safetensors" in pattern]
    assert weights == ["vae/diffusion_pytorch_model.safetensors"]
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in patterns)


def test_identity_sees_a_changed_weight_and_not_a_changed_place(folder, tmp_path):
    before = Checkpoint("a", folder).identity("transformer")
    moved = shutil.move(folder, tmp_path / "elsewhere")
    assert Checkpoint("b", Path(moved)).identity("transformer") == before
    _rewrite(Path(moved) / WEIGHTS, lambda tensors: tensors["proj_out.bias"].add_(1))
    assert Checkpoint("b", Path(moved)).identity("transformer") != before
    assert Checkpoint("b", Path(moved)).identity("vae") != before


def test_a_file_that_ends_early_is_found_before_its_stage(folder):
    """The VAE's, when the first stage's weights are identified."""
    whole = Checkpoint("a", folder).identities("text", "denoise", "vae")
    assert len(whole) == 3
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"checkpoint='a': vae/diffusion_\S+ is not readable .*download it again"):
        Checkpoint("a", folder).identities("text", "denoise", "vae")


def test_the_tiny_checkpoint_is_always_the_same(tmp_path):
    torch.manual_seed(1)
    first = ensure_tiny_checkpoint(tmp_path / "a", SMALL)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = ensure_tiny_checkpoint(tmp_path / "b", SMALL)
    assert torch.equal(torch.get_rng_state(), state), "making it changed the global random state"
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file
    assert sum((first / file).stat().st_size for file in files) < 20e6


def test_the_tiny_checkpoint_is_made_once_and_never_half(tmp_path, monkeypatch):
    from pipeline.checkpoints import tiny

    def fail(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        ensure_tiny_checkpoint(tmp_path, SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    folder = ensure_tiny_checkpoint(tmp_path, SMALL)
    made = folder.stat().st_mtime_ns
    assert ensure_tiny_checkpoint(tmp_path, SMALL) == folder
    assert folder.stat().st_mtime_ns == made
    assert ensure_tiny_checkpoint(tmp_path, TinySpec(seed=1)) != folder


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv(provenance.CACHE_VARIABLE, str(tmp_path / "mine"))
    assert provenance.user_cache_dir() == tmp_path / "mine"
    monkeypatch.delenv(provenance.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert provenance.user_cache_dir() == tmp_path / "cogvideox-splash"


def _single_file(folder: Path, path: Path, prefix: str, dtype: torch.dtype) -> Checkpoint:
    weights = load_file(folder / WEIGHTS)
    save_file({prefix + name: value.to(dtype) for name, value in weights.items()}, path)
    return resolve_checkpoint(str(folder), transformer=str(path))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_a_transformer_in_a_single_file(prefix, folder, tmp_path):
    checkpoint = _single_file(folder, tmp_path / "one.safetensors", prefix, torch.float16)
    (folder / WEIGHTS).unlink()
    read_configs(checkpoint)
    loaded = load_module(checkpoint, "transformer", torch.float32).weights
    assert {str(value.dtype) for value in loaded.values()} == {"float32"}
    assert "transformer_blocks.0.attn1.to_q.weight" in loaded


def test_eight_bit_floats_are_read(folder, tmp_path):
    checkpoint = _single_file(folder, tmp_path / "one.safetensors", "", torch.float8_e4m3fn)
    weights = load_module(checkpoint, "transformer", torch.bfloat16).weights
    actual, expected = weights["proj_out.weight"], _load(folder).weights["proj_out.weight"]
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, rtol=0.07, atol=2e-3)


def test_a_single_file_is_part_of_what_the_weights_are(folder, tmp_path):
    own = resolve_checkpoint(str(folder))
    first = _single_file(folder, tmp_path / "one.safetensors", "", torch.float32)
    second = _single_file(folder, tmp_path / "two.safetensors", "", torch.float16)
    stages = ("text", "denoise")
    (text, denoise), *others = (tuple(each.identities(*stages).values()) for each in (own, first, second))
    assert all(other[0] == text for other in others)
    assert len({denoise, *(other[1] for other in others)}) == 3
    on_hub = dataclasses.replace(first, folder=None, repo_id="a/b", commit="c")
    assert on_hub.identity("vae") == "a/b@c" != on_hub.identity("transformer")


def test_a_single_file_of_another_model_is_refused_by_its_header(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_module", lambda *args: pytest.fail("a weight is read"))
    other = ensure_tiny_checkpoint(tmp_path, SMALL)
    checkpoint = _single_file(other, tmp_path / "one.safetensors", "", torch.float32)
    checkpoint = dataclasses.replace(checkpoint, folder=folder)
    with pytest.raises(CheckpointError, match=r"^transformer='.*has shape \[\d.*\], expected \[") as error:
        read_configs(checkpoint)
    assert "\n" not in str(error.value)
    for name, message in (("absent.safetensors", "no such file"), ("one.bin", "a file of another kind")):
        (tmp_path / "one.bin").write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"transformer='.*{message}; expected a file of safetensors"):
            resolve_checkpoint("tiny", transformer=str(tmp_path / name))
