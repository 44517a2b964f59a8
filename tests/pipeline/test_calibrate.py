"""MagCache's calibration: the ratios that diffusers' own calibration finds, in a file that a run takes."""

import json
import re

import numpy as np
import pytest

from pipeline import quantize
from pipeline.calibrate.__main__ import main
from pipeline.calibrate.magnitudes import measure_ratios
from pipeline.checkpoints.magcache import read_ratios
from pipeline.requests.errors import RequestError
from pipeline.stages.progress import no_progress
from pipeline.stages.stages import StageContext

STEPS = 4


@pytest.mark.compile
def test_ratios_are_those_of_diffusers(request_of, checkpoint, stock, stock_latents, capsys):
    from diffusers.hooks import apply_mag_cache
    from diffusers.hooks.mag_cache import MagCacheConfig

    request = request_of(num_inference_steps=STEPS)
    identities = checkpoint.identities("text", "denoise")
    found = measure_ratios(StageContext(checkpoint, request, identities), no_progress)
    apply_mag_cache(stock.transformer, MagCacheConfig(num_inference_steps=STEPS, calibrate=True))
    capsys.readouterr()
    stock_latents(request)
    printed = re.search(r"^\[(.+)\]$", capsys.readouterr().out, re.MULTILINE)
    assert printed is not None
    np.testing.assert_allclose(found.ratios, json.loads(f"[{printed[1]}]"), rtol=1e-4)
    assert found.timesteps == tuple(range(999, 0, -250))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no ratios"),
        ('{"timesteps": [2, 1], "ratios": [1, -1]}', "above 0"),
        ('{"timesteps": [1, 2], "ratios": [1, 1]}', "that fall"),
        ('{"timesteps": [1], "ratios": [1, 1]}', "a number of each"),
    ],
)
def test_files_that_hold_no_ratios(content, message, tmp_path):
    path = tmp_path / "ratios.json"
    path.write_text(content)
    with pytest.raises(
        RequestError, match=f"cache=magcache: {path} holds no ratios .*{'' if content == '{}' else message}"
    ):
        read_ratios(path)


def test_one_step_has_nothing_to_compare(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["calibrate", "model=tiny", "num_inference_steps=1"])
    assert main() == 2
    assert capsys.readouterr().err == "error: num_inference_steps=1: expected 2 or more to compare\n"


def test_a_cache_is_not_for_what_observes_all_steps(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["calibrate", "model=tiny", "cache=unconditional"])
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: cache")


@pytest.mark.parametrize(
    ("output", "message"),
    [("", "output='': expected a path, or null."), ("there", "output='there': expected a file, got a folder.")],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(output, message, monkeypatch, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.calibrate.magnitudes.measure_ratios", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr("sys.argv", ["calibrate", "model=tiny", "compilation_cache=false", f"output={output}"])
    assert main() == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_ratios_that_are_there_are_not_replaced_without_a_word(monkeypatch, capsys):
    """The tiny model comes with its own."""
    monkeypatch.setattr("pipeline.calibrate.magnitudes.measure_ratios", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr("sys.argv", ["calibrate", "model=tiny", "compilation_cache=false"])
    assert main() == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: \S*magcache.json: holds ratios already; .* or overwrite=true\n", error)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("output=model_index.json", "overwrite=true"), r"cache=magcache: model_index\.json holds no ratios"),
        (
            ("video=x.mp4", "strength=0.5", "num_inference_steps=4"),
            r"video='x.mp4': the checkpoint's own ratios are of its own weights and of all steps; expected output=FILE",
        ),
        (
            ("video=x.mp4", "strength=0.3", "num_inference_steps=4", "output=x.json"),
            r"num_inference_steps=4, of which strength=0.3 leaves 1: expected 2 or more to compare",
        ),
        (("lora=tiny-outline",), r"lora='tiny-outline': the checkpoint's own ratios are of its own weights"),
    ],
)
def test_ratios_that_would_harm(arguments, message, monkeypatch, tmp_path, capsys, tiny_folder):
    (tmp_path / "model_index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.calibrate.magnitudes.measure_ratios", lambda *_: pytest.fail("work began"))
    given = [f"checkpoint={tiny_folder}", "compilation_cache=false", *arguments]
    monkeypatch.setattr("sys.argv", ["calibrate", *given])
    assert main() == 2
    assert re.match(f"error: {message}", capsys.readouterr().err)


def test_int8_weights_replace_nothing_unasked(monkeypatch, tmp_path, capsys, tiny_folder):
    weights = next((tiny_folder / "transformer").glob("*.safetensors"))
    monkeypatch.setattr("pipeline.checkpoints.quantized.save_quantized", lambda *_: pytest.fail("written"))
    for more, said in (
        ([], "is there already; give another name"),
        (["overwrite=true"], "weights are read from there"),
    ):
        monkeypatch.setattr("sys.argv", ["quantize", f"checkpoint={tiny_folder}", f"output={weights}", *more])
        assert quantize.main() == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("output", ["/dev/null/x.safetensors", "/proc/x.safetensors", "there.safetensors"])
def test_int8_weights_that_cannot_be_written_are_refused_before_any_work(output, monkeypatch, tmp_path, capsys):
    (tmp_path / "there.safetensors").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["quantize", f"output={output}"])
    monkeypatch.setattr("pipeline.checkpoints.checks.checkpoint_of", lambda *_: pytest.fail("work began"))
    assert quantize.main() == 2
    assert re.fullmatch(rf"error: output='{output}': .*\n", capsys.readouterr().err)
