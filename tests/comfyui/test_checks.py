"""The nodes check what they are given, in the widgets' words, before any work; and the node that tells of a size."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.requests.errors import PipelineError, RequestError

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("small_tiny")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 80}, "num_frames=80: expected 8k [+] 1.* the nearest is 73 or 81"),
        ({"height": 100}, "height=100: expected a multiple of 16; the nearest is 96 or 112"),
        ({"width": 24}, "width=24: expected a multiple of 16; the nearest is 16 or 32"),
        ({"num_devices": 512}, "num_devices=512: JAX sees"),
        ({"kernel": "fixed_bound"}, "kernel=fixed_bound: needs a TPU"),
        ({"kernel": "int8"}, "kernel=int8: needs a TPU"),
        ({"scheduler": "euler"}, "scheduler='euler': expected one of checkpoint, ddim, dpm"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_scale": "6"}, "guidance_scale='6': expected a number from 0.0 to 1000"),
        ({"kernel": "foo"}, "kernel='foo': expected one of auto, fixed_bound"),
        ({"kernel": ["auto"]}, "kernel=.* expected one of auto"),
        ({"parallel_plan": "foo"}, "parallel_plan='foo': expected one of auto, ulysses"),
        ({"num_devices": -1}, "num_devices=-1: expected a whole number from 0 to 4096"),
        ({"quality": "best"}, "quality='best': expected one of exact, fast, fastest"),
        ({"seed": 1.5}, "seed=1.5: expected a whole number from 0 to"),
    ],
)
def test_bad_values_before_any_work(run: Any, comfy: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(**changes)
    assert not comfy.texts, "no text was encoded"


@pytest.mark.parametrize(
    ("node", "changes", "message"),
    [
        ("CogVideoXTextEncoder", {"dtype": "float16"}, "dtype='float16': expected one of auto, bfloat16, float32"),
        ("CogVideoXTextEncoder", {"prompt": None}, "prompt=None: expected text"),
        ("CogVideoXTextEncoder", {"model_id": "/etc"}, "model_id='/etc': expected a Hub id"),
        ("CogVideoXTPUVAEDecoder", {"fps": 0}, "fps=0: expected a number from 1.0 to 240"),
        (
            "CogVideoXTPUInfo",
            {"device": "foo"},
            "device='foo': expected one of TPU v6 lite, TPU v5 lite, TPU v5, TPU7x",
        ),
        ("CogVideoXTPUInfo", {"predict": "yes"}, "predict='yes': expected true or false"),
        ("CogVideoXTPUInfo", {"width": 4096}, "width=4096: the rotary table of model_id='tiny' ends at"),
        (
            "CogVideoXTPUInfo",
            {"num_devices": 1, "device": "TPU7x", "predict": True},
            "num_devices=1: expected one of 2, 8, 16",
        ),
    ],
)
def test_every_node_checks_its_widgets(
    values: dict[str, Any], nodes: dict[str, Any], comfy: Any, node: str, changes: dict[str, Any], message: str
) -> None:
    slots = nodes[node].define_schema().inputs
    given = {slot.id: slot.default if slot.is_widget else None for slot in slots}
    small = {name: value for name, value in {**values, "model_id": "tiny"}.items() if name in given}
    with pytest.raises(PipelineError, match=f"^{message}") as caught:
        nodes[node].execute(**{**given, **small, **changes})
    assert "\n" not in str(caught.value)
    assert not {"checkpoint=", "topology=", "parallel.", "attention."} & set(str(caught.value).split())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("checkpoint='x/y' revision=None: the Hub refused it", "model_id='x/y': the Hub refused it"),
        ("parallel.num_devices=3: only 2 are here", "num_devices=3: only 2 are here"),
        (
            "topology='v6e-3': expected v6e-N with N one of 1, 4, or chips as v6e:2x4.",
            "num_devices=3: expected one of 1, 4.",
        ),
        (
            "denoise: try more chips, parallel=ulysses_sharded, or",
            "denoise: try more chips, parallel_plan=ulysses, weights sharded, or",
        ),
        (
            "image='as given': checkpoint='x' is a text-to-video model",
            "the node CogVideoX TPU Image: model_id='x' is a text-to-video model",
        ),
        ("image=null: checkpoint='x' is an image-to-video model", "no image: model_id='x' is an image-to-video model"),
        ("is for 49 frames; expected num_frames=49 or less, or context_frames=49", "is for 49 frames; expected num_f"),
        (
            "checkpoint='x': no such folder; expected tiny, tiny-i2v, tiny-random, an existing folder, or owner/name",
            "model_id='x'",
        ),
    ],
)
def test_errors_name_the_widgets(part: Any, message: str, expected: str) -> None:
    class Node:
        @staticmethod
        def define_schema() -> Any:
            return SimpleNamespace(inputs=[])

        @classmethod
        @part("settings").checked_widgets
        def execute(cls) -> None:
            raise RequestError(message)

    with pytest.raises(RequestError) as caught:
        Node.execute()
    assert str(caught.value).startswith(expected)
    assert not any(term in str(caught.value) for term in ("tiny-random", "as given", "context_frames"))


def test_info(values: dict[str, Any], nodes: dict[str, Any], comfy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {**values, "num_devices": 2, "model_id": "tiny", "device": "TPU v6 lite", "predict": False}
    del values["seed"]
    output = nodes["CogVideoXTPUInfo"].execute(**values)
    (report,) = output.args
    assert output.ui["text"][0] == report == comfy.texts[-1][0]
    assert "attention on each device: 1x2x31x64" in report  # 2 x 3 patches in 2 pairs of frames, 19 text tokens
    assert "dp=2 x model=1" in report
    with pytest.raises(RequestError, match=r"num_devices=3: 3 devices a prompt do not .* parallel_plan=ulysses_all"):
        nodes["CogVideoXTPUInfo"].execute(**{**values, "num_devices": 3, "parallel_plan": "ulysses"})
    (report,) = nodes["CogVideoXTPUInfo"].execute(**{**values, "num_devices": 3}).args
    assert "dp=1 x model=1 x kv=3" in report and "2x2x11:31x64" in report  # a third of the queries, all keys
    published = {
        "model_id": "zai-org/CogVideoX1.5-5B",
        "height": 720,
        "width": 1280,
        "num_frames": 81,
        "num_devices": 8,
    }
    (report,) = nodes["CogVideoXTPUInfo"].execute(**{**values, **published}).args  # without fetching anything
    assert "attention on each device: 1x12x39826x64" in report
    assert "no time is known" in nodes["CogVideoXTPUInfo"].execute(**values, kernel="xla").args[0]


def test_info_predicts_when_asked(
    values: dict[str, Any], nodes: dict[str, Any], comfy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.predict import planner

    asked: list[Any] = []
    kind: list[str] = []

    def predict(self: Any, stages: Any, parallel: Any) -> Any:
        asked.append((self.topology, stages, parallel.num_devices, self.request.do_classifier_free_guidance))
        kind.append(parallel.plan)
        self.say("compiling")
        results = {"denoise": {"time_s": 2.5, "peak_hbm_bytes": 3 * 2**30, "hbm_bytes": 2**35}}
        return planner.VideoPrediction(None, results, {})  # type: ignore[arg-type]

    monkeypatch.setattr(planner.Predictor, "predict", predict)
    values = {**values, "num_devices": 4, "model_id": "tiny", "device": "TPU v6 lite", "predict": True}
    del values["seed"]
    with pytest.raises(RequestError, match="4"):  # the check of heads comes first
        nodes["CogVideoXTPUInfo"].execute(**{**values, "num_devices": 8, "parallel_plan": "megatron"})
    (report,) = nodes["CogVideoXTPUInfo"].execute(**values).args
    assert asked == [("v6e-4", ("denoise",), 4, True)]
    assert kind == ["ulysses"], "what auto runs as"
    assert comfy.texts == [("compiling", "7"), (report, "7")]
    assert "denoising on v6e-4: 2.5 s a step, 7.5 s in all" in report and "3.00 of 32 GiB" in report
