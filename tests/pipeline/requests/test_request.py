import dataclasses

import pytest

from pipeline.requests.errors import RequestError
from pipeline.requests.request import AttentionOptions, GenerateRequest, nearest_multiples, parse_stages


def test_defaults_are_valid_and_frozen():
    request = GenerateRequest(prompt="a cat")
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.seed = 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 50}, r"num_frames=50: .*8k \+ 1.* nearest is 49 or 57"),
        ({"num_frames": 8}, r"num_frames=8: .* nearest is 1 or 9"),
        ({"num_frames": 0}, r"num_frames=0: expected a whole number from 1"),
        ({"height": 100}, r"height=100: expected a multiple of 16; the nearest is 96 or 112"),
        ({"width": 7}, r"width=7: .* nearest is 16$"),
        ({"width": -16}, r"width=-16"),
        ({"num_inference_steps": -1}, r"num_inference_steps=-1: expected a whole number from 1 to 1000"),
        ({"num_inference_steps": 2.5}, r"num_inference_steps=2.5"),
        ({"guidance_scale": float("nan")}, r"guidance_scale=nan"),
        ({"guidance_scale": -0.5}, r"guidance_scale=-0.5"),
        ({"seed": -1}, r"seed=-1"),
        ({"seed": True}, r"seed=True"),
        ({"fps": 0}, r"fps=0"),
        ({"fps": 240.5}, r"fps=240.5: expected a number from 1 to 240"),
        ({"fps": float("nan")}, r"fps=nan"),
        ({"fps": "24"}, r"fps='24'"),
        ({"prompt": None}, r"prompt=null: expected some text, e.g. prompt="),
        ({"negative_prompt": None}, r"negative_prompt=null: expected text"),
        ({"prompt": "a word " * 1000 + "\0"}, r"prompt='a word .{,80}\.\.\.: holds a NUL"),
        ({"checkpoint": ""}, r"checkpoint=''"),
        ({"dtype": "float64"}, r"dtype='float64': expected one of float32, bfloat16"),
        ({"scheduler": "euler"}, r"scheduler='euler': expected one of checkpoint, ddim, dpm"),
        ({"quantization": "int4"}, r"quantization='int4': expected one of none, int8"),
    ],
)
def test_bad_values_name_value_and_expectation(changes, message):
    with pytest.raises(RequestError, match=message):
        GenerateRequest(**{"prompt": "a cat", **changes})


@pytest.mark.parametrize("num_frames", [1, 9, 17, 41, 49, 57, 65, 73, 81, 89, 97])
def test_frame_counts_of_the_rule_are_accepted(num_frames):
    assert ((num_frames - 1) // 4 + 1) % 2 == 1
    GenerateRequest(prompt="a cat", num_frames=num_frames)


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt_is_a_prompt(prompt):
    assert GenerateRequest(prompt=prompt, guidance_scale=2.0).prompts == ["", prompt]


@pytest.mark.parametrize(("fps", "expected"), [(23.976, 23.976), (29.97, 29.97), (12.5, 12.5), (16.0, 16), (8, 8)])
def test_fps_may_be_fractional(fps, expected):
    request = GenerateRequest(prompt="a cat", fps=fps)
    assert request.fps == expected
    assert type(request.fps) is type(expected)


def test_unknown_implementation():
    with pytest.raises(RequestError, match=r"attention\.implementation='cuda': expected one of pallas_tpu"):
        AttentionOptions(implementation="cuda")


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ("text,denoise,vae", ("text", "denoise", "vae")),
        ("vae, text", ("text", "vae")),
        (["denoise"], ("denoise",)),
    ],
)
def test_stages_run_in_their_order(stages, expected):
    assert parse_stages(stages) == expected


@pytest.mark.parametrize("stages", ["", "text,foo", [], ["vea"], [["text"]]])
def test_unknown_stages(stages):
    with pytest.raises(RequestError, match="expected some of text,denoise,vae"):
        parse_stages(stages)


@pytest.mark.parametrize("stages", ["text,text", ["vae", "text", "vae"]])
def test_a_stage_is_named_once(stages):
    with pytest.raises(RequestError, match="expected each of text,denoise,vae at most once"):
        parse_stages(stages)


@pytest.mark.parametrize(("value", "expected"), [(50, [49, 57]), (3, [1, 9]), (9, [9, 17])])
def test_nearest_frame_counts(value, expected):
    assert nearest_multiples(value, 8, 1) == expected
