"""The picture of the video so far."""

from PIL import Image

from pipeline.requests.run_options import RunOptions
from pipeline.runs import preview
from pipeline.runs.single import generate


def test_preview_pictures(request_of, tmp_path, monkeypatch, caplog):
    request = request_of(num_inference_steps=2)
    stages, options = ["text", "denoise"], RunOptions(preview_every=2)
    generate(request, stages=stages, run_dir=tmp_path, run_options=options)
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.size == (2 * 80, 2 * 48)  # 3 latent frames, in 2 rows of 2

    def fail(latents):
        raise ZeroDivisionError("no picture")

    monkeypatch.setattr(preview, "contact_sheet", fail)
    generate(request_of(num_inference_steps=2, seed=8), stages=stages, run_dir=tmp_path, run_options=options)
    assert "no preview of step 2 (no picture)" in caplog.text
