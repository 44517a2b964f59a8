"""The training: a short one leaves a checkpoint that loads; an interrupted one goes on as if it had not been."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

from pipeline.checkpoints.checks import read_configs
from pipeline.checkpoints.loading import load_module, resolve_checkpoint
from pipeline.checkpoints.lora import merge_loras
from pipeline.checkpoints.published import COGVIDEOX_1_5_5B
from pipeline.checkpoints.shapes import captions
from pipeline.checkpoints.tiny import TRAINED_FOLDER, TinySpec, build_modules
from pipeline.checkpoints.tiny_i2v import write_tiny_i2v
from pipeline.model.latents import LatentGeometry, rotary_embedding
from pipeline.model.noise_schedule import build_scheduler
from pipeline.requests.request import GenerateRequest, LoraFile
from pipeline.train_tiny import __main__ as train_tiny
from pipeline.train_tiny.config import PROVENANCE_NAME
from pipeline.train_tiny.training import Loop, Muon, diffusion_loss, optimize, rotary_tables

ARGUMENTS = ["height=32", "width=48", "num_frames=9", "num_layers=1", "num_attention_heads=1", "clips_per_caption=1"]
STEPS = ["vae.steps=4", "transformer.steps=2", "transformer.batch_size=2"]


def command(monkeypatch, tmp_path, *arguments: str, out: str = "out") -> int:
    folders = (f"folder={tmp_path / out}", f"work_dir={tmp_path / ('work_' + out)}")
    monkeypatch.setattr(sys, "argv", ["train_tiny", *folders, *ARGUMENTS, *STEPS, *arguments])
    return train_tiny.main()


@pytest.mark.compile
def test_a_short_training_leaves_a_checkpoint(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, tmp_path) == 0
    checkpoint = resolve_checkpoint(str(tmp_path / "out"))
    for part in ("text_encoder", "transformer", "vae"):
        weights = load_module(checkpoint, part, torch.float32).weights
        assert all(np.isfinite(np.asarray(value)).all() for value in weights.values()), part
    made = json.loads((tmp_path / "out" / "training.json").read_text())
    latents = np.load(tmp_path / "work_out" / "latents.npy")
    assert latents.shape == (len(captions()), 3, 16, 4, 6)
    assert (
        made["scaling_factor"] == checkpoint.config("vae")["scaling_factor"] == pytest.approx(1 / latents.std(), 1e-3)
    )
    assert command(monkeypatch, tmp_path, "clips_per_caption=2") == 2, "other settings in the same work_dir"
    assert "holds a run with other settings; expected another folder" in capsys.readouterr().err
    base = (f"base={tmp_path / 'out'}", "rank=2", "max_text_seq_length=16")
    assert command(monkeypatch, tmp_path, "what=outline", *base, out="lora") == 0
    _check_lora(tmp_path, checkpoint)
    assert command(monkeypatch, tmp_path, "what=i2v", *base, out="i2v") == 0
    _check_image_model(tmp_path)


def _check_lora(folder, checkpoint):
    """It fits its base, changes what it is for, and its clips are of outlines."""
    before = load_module(checkpoint, "transformer", torch.float32, place=lambda value: value).weights
    after = dict(before)
    merge_loras(after, [LoraFile(str(folder / "lora"))], "base")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    layers = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
    assert changed == {f"transformer_blocks.0.{layer}.weight" for layer in layers}
    filled, outlines = (np.load(folder / name / "latents.npy") for name in ("work_out", "work_lora"))
    assert filled.shape == outlines.shape and not np.allclose(filled, outlines, atol=0.1)
    assert json.loads((folder / "lora" / "training.json").read_text())["settings"]["what"] == "outline"


def _check_image_model(folder):
    """What it changes of its base makes a checkpoint that stock diffusers reads."""
    write_tiny_i2v(folder / "out", folder / "i2v", folder / "whole")
    configs = read_configs(resolve_checkpoint(str(folder / "whole")))
    assert (configs["transformer"]["in_channels"], configs["vae"]["invert_scale_latents"]) == (32, True)
    from diffusers import CogVideoXImageToVideoPipeline

    pipe = CogVideoXImageToVideoPipeline.from_pretrained(folder / "whole", dtype=torch.float32)
    assert pipe.transformer.ofs_embedding.linear_2.weight.any(), "trained: it begins at 0"
    assert pipe.transformer.patch_embed.proj.weight[:, 128:].any()


def test_an_interrupted_loop_goes_on_as_if_it_had_not_been(tmp_path, recwarn):
    loop = Loop(steps=6, batch_size=3, matrix_rate=0.02, other_rate=1e-2, warm_up_steps=2, ema_decay=0.5)

    def run(path, fail_at=None):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.GroupNorm(1, 3), torch.nn.Conv2d(3, 2, 1))

        def loss_of(step, rng, generator):
            if step == fail_at:
                raise KeyboardInterrupt
            x = torch.randn(loop.batch_size, 2, 5, 5, generator=generator)
            loss = (model(x) - float(rng.random())).square().mean()
            return loss, {"loss": loss.item(), "sometimes": math.nan if step < 3 else float(step)}

        history, _ = optimize("test", {"model": model}, loop, loss_of, 3, path, save_every=2)
        return [parameter.detach() for parameter in model.parameters()], history

    expected, history = run(tmp_path / "whole.pt")
    assert not [warning for warning in recwarn if "empty" in str(warning.message)]
    assert [entry["sometimes"] for entry in history[1:]] == [3.0, 4.5] and math.isnan(history[0]["sometimes"])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut.pt", fail_at=5)
    actual, continued = run(tmp_path / "cut.pt")
    assert repr(history) == repr(continued) and [entry["step"] for entry in history] == [2, 4, 6]
    for here, there in zip(actual, expected, strict=True):
        torch.testing.assert_close(here, there, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(7, 13), (13, 7), (5, 3, 3, 3)])
def test_muon_steps_by_a_nearly_orthogonal_matrix(shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.randn(shape)
    Muon([weight], lr=1.0).step()
    rows, columns = weight.detach().flatten(1).shape
    singular = torch.linalg.svdvals(weight.detach().flatten(1)) / max(1, rows / columns) ** 0.5
    assert singular.min() > 0.5 and singular.max() < 1.3
    assert (weight.detach() * weight.grad).sum() < 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("base=/tmp",), "base=/tmp: expected null for what=model"),
        (("what=outline", "num_layers=5"), "num_layers=5: expected 4, as the base has"),
        (("what=i2v", "start_from=x"), "start_from=x: expected transformer.pt of another work_dir, for what=model"),
        (("what=film",), "what=film: no such option; expected one of i2v, model, outline"),
    ],
)
def test_settings_that_cannot_be(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["train_tiny", f"work_dir={tmp_path / 'work'}", *arguments])
    monkeypatch.chdir(tmp_path)
    assert train_tiny.main() == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_start_that_is_no_training_is_found_before_any(monkeypatch, tmp_path, capsys):
    (tmp_path / "junk.pt").write_bytes(b"junk")
    assert command(monkeypatch, tmp_path, f"start_from={tmp_path / 'junk.pt'}") == 2
    said = capsys.readouterr().err
    assert "junk.pt: expected transformer.pt of another work_dir, of a model of these sizes" in said
    assert not list((tmp_path / "work_out").glob("*.pt"))


@pytest.mark.parametrize("folder", [".", "models", "base"])
@pytest.mark.parametrize("what", ["model", "outline", "i2v"])
def test_a_folder_of_the_users_is_not_replaced(monkeypatch, tmp_path, capsys, folder, what):
    shutil.copytree(TRAINED_FOLDER, tmp_path / "base")
    if what == "model":
        (tmp_path / "base" / PROVENANCE_NAME).unlink()
    (tmp_path / "models").mkdir()
    kept = tmp_path / "models" / "mine.txt"
    kept.write_text("mine")
    monkeypatch.chdir(tmp_path)
    base = [] if what == "model" else ["base=base"]
    arguments = [f"what={what}", f"folder={folder}", f"work_dir={tmp_path / 'work'}", *base]
    monkeypatch.setattr(sys, "argv", ["train_tiny", *arguments])
    assert train_tiny.main() == 2
    assert f"folder={folder}: would be replaced" in capsys.readouterr().err
    assert kept.read_text() == "mine"


def test_training_sees_what_inference_sees():
    """Rotary tables and shapes are those of the default request, with its padding frame."""
    modules = build_modules(TinySpec(num_layers=1, num_attention_heads=1))
    transformer, vae = modules["transformer"].config, modules["vae"].config
    geometry = LatentGeometry.from_request(GenerateRequest("a"), transformer, vae)
    assert geometry.padding_frames == 1
    for here, there in zip(
        rotary_tables(transformer, geometry.shape), rotary_embedding(geometry, transformer), strict=True
    ):
        np.testing.assert_array_equal(here.numpy(), there)


def test_the_loss_is_of_the_velocity_and_caption_dropout_takes_the_caption():
    scheduler = build_scheduler(COGVIDEOX_1_5_5B["scheduler"])
    latents = torch.randn(4, 2, 1, 2, 2)
    seen = {}

    class Encoder(torch.nn.Module):
        def forward(self, ids):
            seen["ids"] = ids
            return (ids[..., None].float(),)

    class Transformer(torch.nn.Module):
        """Knows the answer at the last timestep: the sample is noise, and the velocity is minus the latents."""

        def forward(self, noisy, embeddings, timestep, image_rotary_emb, return_dict, ofs=None):
            seen["timesteps"], seen["noisy"], seen["ofs"] = timestep, noisy, ofs
            chosen = embeddings[:, 0, 0].long()
            return (-latents[chosen],)

    ids = torch.arange(4)[:, None].repeat(1, 5)
    arguments = (Transformer(), Encoder(), scheduler, latents, ids, torch.full((5,), 0), (None, None), 20)
    _, report = diffusion_loss(*arguments, caption_dropout=0.0)(0, np.random.default_rng(0), torch.Generator())
    assert report["loss_last"] == 0 < report["loss"]
    assert (seen["timesteps"] == 999).sum() == 2  # one in ten
    diffusion_loss(*arguments, caption_dropout=1.0)(0, np.random.default_rng(0), torch.Generator())
    assert not seen["ids"].any()
    conditions = torch.randn(latents.shape)
    diffusion_loss(*arguments, 0.0, conditions)(0, np.random.default_rng(0), torch.Generator())
    beside, chosen = seen["noisy"][:, :, 1:], seen["ids"][:, 0]
    assert torch.equal(beside, conditions[chosen]) and seen["ofs"].tolist() == [2.0]
