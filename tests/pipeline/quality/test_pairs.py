"""The page of pairs: made once, also after a crash; a mode that fails costs itself; prompts need no captions."""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.quality import judge, pairs
from pipeline.quality.config import Budget, QualityConfig
from pipeline.quality.page import predicted_times
from pipeline.quality.pairs import side_by_side
from pipeline.quality.render import Made
from pipeline.requests.errors import RequestError
from pipeline.requests.request import GenerateRequest
from splash_workbench.errors import UserError
from splash_workbench.records import jsonl
from splash_workbench.records.quality import PairRecord, QualityRecord

#: Names of candidates, and how far their videos are from the reference's.
ERRORS = {"reference": 0.0, "near": 0.002, "far": 0.05, "broken": 0.0}
FAR, NEAR, BROKEN = {"name": "far", "dtype": "bfloat16"}, {"name": "near", "quantization": "int8"}, {"name": "broken"}
ON_TPU = {"name": "on tpu", "attention": {"implementation": "pallas_tpu"}}


class Renderer:
    """In place of the pipeline's: counts what it makes, and can be killed."""

    def __init__(self) -> None:
        self.made: list[tuple[str, str, int]] = []
        self.dies_after = 10**9

    def __call__(self, variant, wanted, cache_dir, progress):
        for prompt, seed in wanted:
            if variant.name == "broken":
                raise RequestError("parallel.plan='broken': expected another")
            if len(self.made) == self.dies_after:
                raise KeyboardInterrupt
            self.made.append((variant.name, prompt, seed))
            noise = np.random.default_rng([seed, *prompt.encode()])
            frames = noise.random((2, 32, 48, 3), np.float32) * 0.5
            yield Made(frames + np.float32(ERRORS[variant.name]), 2.0, 8)


@pytest.fixture
def renderer(monkeypatch) -> Renderer:
    made = Renderer()
    monkeypatch.setattr(pairs, "variant_videos", made)
    return made


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "mine.txt"
    path.write_text("a cat <on> a sofa\n\na dog\n")
    return path


@pytest.fixture
def settings(tmp_path, prompts) -> QualityConfig:
    """The command's on two prompts with their page, without the learned metric, which takes longer than all else."""
    given = {"modes": "own", "prompts": str(prompts), "seeds": [3], "candidates": [FAR, NEAR], "lpips": False}
    return QualityConfig(**given, compilation_cache=False, page_dir=str(tmp_path / "page"))


@pytest.fixture
def run(settings, monkeypatch):
    """Judges with changes of the settings, and files in place of videos; returns the exit code."""
    monkeypatch.setattr(pairs, "write_mp4", lambda path, frames, fps: write(path, frames))

    def write(path: Path, frames: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(frames.tobytes())

    return lambda **changes: judge.judge(dataclasses.replace(settings, **changes))


def test_the_page_shows_each_prompt_with_each_mode_the_nearest_first(settings, renderer, tmp_path):
    settings = dataclasses.replace(settings, lpips=True, results_path=str(tmp_path / "quality.jsonl"))
    assert judge.judge(settings) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.index(">near</td>") < page.index(">far</td>")
    assert "a cat &lt;on&gt; a sofa" in page and "Nothing is read back" in page
    videos = re.findall(r'<video src="([^"]+)"', page)
    assert len(videos) == len(set(videos)) == 4
    assert all((tmp_path / "page" / video).read_bytes()[4:8] == b"ftyp" for video in videos)
    assert not re.search(r'(src|href)="(https?:|/)', page)
    reference, far, near = jsonl.read(tmp_path / "quality.jsonl", QualityRecord)
    assert reference.psnr_db == (None, None) and reference.lpips == (0.0, 0.0)
    assert max(near.lpips) < min(far.lpips) and far.read_back == {} and near.chosen["quantization"] == "int8"
    assert near.denoise_times_s == (2.0, 2.0) and near.steps_computed == (8, 8)
    assert not (tmp_path / "page" / "reference").exists()


def test_what_was_made_before_a_crash_is_not_made_again(run, renderer, tmp_path):
    renderer.dies_after = 3
    with pytest.raises(KeyboardInterrupt):
        run()
    assert [name for name, *_ in renderer.made] == ["reference", "reference", "far"]
    renderer.dies_after = 10**9
    assert run() == 0
    assert [name for name, *_ in renderer.made] == ["reference", "reference", "far", "far", "near", "near"]
    first = (tmp_path / "page" / "index.html").read_text()
    assert run() == 0 and len(renderer.made) == 6
    assert (tmp_path / "page" / "index.html").read_text() == first
    records = jsonl.read(tmp_path / "page" / pairs.PAIRS_FILE, PairRecord)
    assert [(record.candidate, record.prompt, record.seed) for record in records] == renderer.made


def test_another_request_or_a_lost_video_is_made_anew(run, renderer, tmp_path):
    assert run(only=["near"]) == 0 and len(renderer.made) == 4
    assert run(only=["near"], num_inference_steps=7) == 0 and len(renderer.made) == 8
    record = jsonl.read(tmp_path / "page" / pairs.PAIRS_FILE, PairRecord)[-1]
    (tmp_path / "page" / "videos" / f"{record.key}.mp4").unlink()
    assert run(only=["near"], num_inference_steps=7) == 0
    assert [name for name, *_ in renderer.made[8:]] == ["reference", "near"]


def test_a_mode_that_fails_costs_only_itself(run, renderer, tmp_path, capsys):
    assert run(candidates=[BROKEN, FAR, NEAR]) == 1
    printed = capsys.readouterr().out
    assert "broken                 not made: parallel.plan='broken': expected another" in printed
    assert printed.endswith("all within budget, 1 not made\n")
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.index(">near</td>") < page.index(">far</td>") < page.index("not made: parallel.plan")
    assert (tmp_path / "page" / "reference").exists()  # for when it can be made


def test_the_page_says_which_limits_a_mode_breaks_and_where_there_are_none(run, renderer, tmp_path):
    page = tmp_path / "page" / "index.html"
    assert run() == 0 and page.read_text().count(">no limits set<") == 2
    assert run(budget=Budget(psnr_db=30)) == 1
    assert page.read_text().count('class="bad"') == page.read_text().count('class="bad">PSNR 26.0 dB &lt; 30 dB<') == 1
    assert page.read_text().count(">within budget<") == 1 and len(renderer.made) == 6


def test_predicted_times_are_of_the_same_video():
    path = Path(__file__).parents[3] / "results" / "predict.jsonl"
    request = GenerateRequest("a cat", "zai-org/CogVideoX1.5-5B")
    checkpoint = SimpleNamespace(config=lambda part: {})
    found = predicted_times(str(path), request, checkpoint)
    assert found.keys() == {"exact", "fast", "fastest"}
    for text in found.values():
        slices = [part.split(" s on ")[1] for part in text.split(", ")]
        assert {"v6e-8", "v6e-4"} <= set(slices) and len(set(slices)) == len(slices)
    assert predicted_times(str(path), dataclasses.replace(request, num_inference_steps=49), checkpoint) == {}
    assert predicted_times(None, request, checkpoint) == {}


@pytest.mark.filterwarnings("ignore:.*torn line")
@pytest.mark.parametrize("content", ["GARBAGE", "", '{"kind": "other"}'])
def test_a_file_without_predictions_is_refused(content, tmp_path):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"expected a file of|not a PredictionRecord"):
        predicted_times(str(tmp_path / "p.jsonl"), GenerateRequest("a cat"), SimpleNamespace(config=lambda part: {}))


def test_a_pairs_video_shows_both_and_the_enlarged_difference():
    reference = np.full((1, 2, 2, 3), 0.5, np.float32)
    shown = side_by_side(reference, reference + np.float32(0.01))
    assert shown.shape == (1, 2, 6, 3)
    assert np.allclose(shown[0, 0, ::2, 0], [0.5, 0.51, 0.58])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": "mine.jsonl"}, "prompts='mine.jsonl': expected a file *.txt, a prompt a line"),
        ({"prompt": "a cat"}, "expected one of them"),
        ({"predictions": "nope"}, "predictions='nope': expected a file of python -m pipeline.predict"),
        ({"image": "nope.png"}, "image='nope.png'"),
        ({"candidates": [], "page_dir": None}, "candidates=[]: expected some to compare"),
        ({"candidates": [NEAR, NEAR]}, "candidates: 'near' is the name of two"),
        ({"candidates": [{"name": "reference"}]}, "candidates: 'reference' is the name of two"),
        ({"candidates": [{"name": "x", "prompt": "b"}]}, "candidate 'x': prompt is the same for all, or used by none"),
        ({"quality": "fast"}, "quality=fast: expected exact, what candidates are compared with"),
        ({"candidates": [{"name": "x", "height": 96}]}, "candidate 'x': height=96: expected the reference's, "),
        ({"candidates": [ON_TPU]}, "candidate 'on tpu': attention.implementation='pallas_tpu': needs a TPU"),
    ],
)
def test_bad_input_is_told_before_any_video(run, renderer, changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(**changes)
    assert not renderer.made
