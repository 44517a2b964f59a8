"""The picture of the video so far."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.checkpoints.loading import load_module, resolve_checkpoint
from pipeline.requests.options import RunOptions
from pipeline.runs import preview
from pipeline.runs.request_run import generate


@pytest.mark.compile
def test_preview_pictures(request_of, tmp_path, monkeypatch, caplog):
    request = request_of(num_inference_steps=2)
    stages, options = ["text", "denoise"], RunOptions(preview_every=2)
    generate(request, stages=stages, run_dir=tmp_path, run_options=options)
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.size == (2 * 80, 2 * 48)  # 3 latent frames, in 2 rows of 2

    def fail(latents, factors):
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(preview, "contact_sheet", fail)
    generate(request_of(num_inference_steps=2, seed=8), stages=stages, run_dir=tmp_path, run_options=options)
    assert "no previews (no picture)" in caplog.text


@pytest.mark.compile
def test_a_preview_has_the_videos_colours(cache_folder, monkeypatch):
    checkpoint = resolve_checkpoint("tiny")
    factors = preview.latent_rgb(checkpoint)
    loaded = load_module(checkpoint, "vae", torch.float32, place=lambda value: torch.from_numpy(value.copy()))
    loaded.module.load_state_dict(loaded.weights, assign=True, strict=False)
    for colour in ((230, 20, 20), (20, 200, 40), (30, 40, 220), (240, 240, 240)):
        still = np.full((1, 3, 9, 64, 96), 20 / 127.5 - 1, np.float32)
        still[:, :, :, 16:48, 32:64] = np.array(colour, np.float32)[:, None, None, None] / 127.5 - 1
        with torch.no_grad():
            encoded = loaded.module.encode(torch.from_numpy(still)).latent_dist.mode().numpy()
        latents = encoded.swapaxes(1, 2) * loaded.module.config.scaling_factor
        picture = np.asarray(preview.contact_sheet(latents, factors, max_frames=1), np.float32)
        assert np.abs(picture[24:40, 40:56].mean((0, 1)) - colour).max() < 80
        assert picture[:8, :8].mean() < 80, "the ground is dark"
    monkeypatch.setattr(preview, "_fit", None)
    np.testing.assert_array_equal(preview.latent_rgb(checkpoint), factors)  # once for all
    assert [path.suffix for path in (cache_folder / "latent_rgb").iterdir()] == [".npy"]


def test_colours_that_cannot_be_kept_are_used(cache_folder, monkeypatch, caplog):
    fitted = np.zeros((17, 3))
    monkeypatch.setattr(preview, "_fit", lambda checkpoint: fitted)
    cache_folder.mkdir(parents=True, exist_ok=True)
    (cache_folder / "latent_rgb").touch()  # where a folder would be made
    assert preview.latent_rgb(resolve_checkpoint("tiny")) is fitted
    assert "previews: their colours cannot be kept in" in caplog.text
