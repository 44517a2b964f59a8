"""The file of a batch: lines of text or JSON, and what is wrong with them."""

import contextlib
import dataclasses

import pytest

from pipeline.requests.batch_file import LINE_KEYS, entries_of, read_entries
from pipeline.requests.config import GenerateConfig
from pipeline.requests.errors import RequestError
from pipeline.requests.request import LoraFile
from videos import write_batch


@pytest.fixture
def config() -> GenerateConfig:
    return GenerateConfig(checkpoint="anywhere", height=48, width=80, num_frames=9, num_inference_steps=2)


def test_a_text_file_has_a_prompt_a_line(tmp_path, config):
    path = tmp_path / "prompts.txt"
    path.write_text('a cat, "sitting"\n\n  {"prompt": 1} \n')
    entries = read_entries(path, config)
    assert [(entry.line, entry.request.prompt) for entry in entries] == [(1, 'a cat, "sitting"'), (3, '{"prompt": 1}')]


def test_several_videos_of_a_prompt_have_seeds_of_their_own(tmp_path, config):
    config.num_videos = 2
    path = write_batch(tmp_path, {"prompt": "a", "seed": 5}, {"prompt": "b", "num_videos": 1, "lora": ["x:0.5"]})
    entries = read_entries(path, config)
    assert [(entry.request.prompt, entry.request.seed) for entry in entries] == [("a", 5), ("a", 6), ("b", 42)]
    assert len({entry.name for entry in entries}) == 3
    assert entries[2].request.lora == (LoraFile("x", 0.5),)
    config.prompt, config.num_videos = "a", 3
    assert [entry.request.seed for entry in entries_of(config)] == [42, 43, 44]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_videos": 0}, "num_videos=0: expected a whole number from 1 to 1000"),
        ({"num_videos": 2, "name": "x"}, "name='x': the same for 2 videos; expected one with {seed}"),
    ],
)
def test_several_videos_that_cannot_be(changes, message, config):
    with pytest.raises(RequestError, match=message):
        entries_of(dataclasses.replace(config, prompt="a", **changes))


def test_lines_take_what_they_leave_out_from_the_command_line(tmp_path, config):
    config.seed, config.negative_prompt = 3, "blurry"
    path = write_batch(
        tmp_path,
        {"prompt": "a cat"},
        "",
        {"prompt": "日本", "seed": 4, "name": "{line}-{slug}", "attention": {"k_smooth": False}, "fps": 5},
    )
    first, second = read_entries(path, config)
    assert (first.line, first.request.seed, first.request.negative_prompt) == (1, 3, "blurry")
    assert (second.line, second.request.seed, second.name) == (3, 4, "3-video")
    assert second.request.attention.k_smooth is False
    assert second.request.height == first.request.height == 48


PROMPTS = [
    'it\'s a "red" cat ${oc.env:HOME}',
    "C:\\temp\\new ${price} $5 \\",
    "${",
    "???",
    "null",
    "\\${x} {a: b}, [c]",
    "~",
]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_lines_text_is_taken_literally(tmp_path, config, prompt):
    (entry,) = read_entries(write_batch(tmp_path, {"prompt": prompt, "negative_prompt": prompt}), config)
    assert (entry.request.prompt, entry.request.negative_prompt) == (prompt, prompt)
    assert "/" not in entry.name


BAD_LINES = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("3", "3: expected an object"),
    ('{"prompt": "x", "seed": ' + "9" * 5000 + "}", "not JSON"),
    ({"seed": 1}, 'no "prompt" in it'),
    ({"prompt": None}, "prompt=null: expected some text"),
    ({"prompt": 3}, "prompt=3: expected some text"),
    ({"prompt": "a\0b"}, "holds a NUL"),
    ('{"prompt": "\\ud800"}', "half a surrogate pair"),
    ({"prompt": "x", "sead": 1}, "'sead': no such key; expected some of name, prompt"),
    ('{"prompt": "x", "seed": 1, "seed": 2}', "'seed': twice in one line"),
    ({"prompt": "x", "seed": None}, "seed=None: expected a whole number"),
    ({"prompt": "x", "seed": "7"}, "seed='7': expected a whole number"),
    ({"prompt": "x", "num_frames": 50}, "num_frames=50: expected 8k + 1"),
    ('{"prompt": "x", "guidance_scale": NaN}', "guidance_scale=nan: expected a number"),
    ({"prompt": "x", "guidance_scale": True}, "guidance_scale=True: expected a number"),
    ({"prompt": "x", "guidance_scale": 10**400}, "guidance_scale=1000"),
    ({"prompt": "x", "use_dynamic_cfg": "yes"}, "use_dynamic_cfg='yes': expected true or false"),
    ({"prompt": "x", "revision": 3}, "revision=3: expected a branch"),
    ({"prompt": "x", "scheduler": "euler"}, "scheduler='euler': expected one of"),
    ({"prompt": "x", "attention": 3}, "attention=3: expected an object"),
    ({"prompt": "x", "attention": {"block_sizes": 3}}, "attention.block_sizes=3: expected {block_q: ..., block_kv:"),
    ({"prompt": "x", "checkpoint": None}, "checkpoint=null: expected tiny"),
    ({"prompt": "x", "checkpoint": 5}, "checkpoint=5: expected tiny"),
    ({"prompt": "x", "checkpoint": []}, "checkpoint=[]: expected tiny"),
    ({"prompt": "x", "cache": {"method": "magcache", "ratios": 5}}, "cache.ratios=5: expected a file"),
    ({"prompt": "x", "name": "{seed:>9999999999}"}, "name='{seed:>9999999999}': a width of more than 200"),
    ({"prompt": "x", "strength": 0.5}, "strength=0.5: only with video=...; leave it out"),
    (
        {"prompt": "x", "guidance_scale": 1, "cache": {"unconditional_every": 2}},
        "cache.unconditional_every=2: only with guidance_scale above 1",
    ),
    ({"prompt": "x", "num_frames": 9, "context_frames": 17}, "context_frames=17: only up to num_frames (it is 9)"),
    ({"prompt": "x", "cache": {"threshold": 0.3}}, "cache.threshold=0.3: only with cache=teacache"),
    ({"prompt": "x", "attention": {"k_smooth": "no"}}, "attention.k_smooth='no'"),
    ({"prompt": "x", "name": "a/b"}, "name='a/b': expected the name of one folder"),
    ({"prompt": "x", "name": 3}, "name=3"),
    ({"prompt": "x", "name": "{nope}"}, "unknown field {nope}"),
    ({"prompt": "ok", "fps": 9}, "would go to 'ok-80x48x9-seed42-"),
]


def test_every_bad_line_is_named_with_what_is_wrong(tmp_path, config):
    path = write_batch(tmp_path, {"prompt": "ok"}, *(line for line, _ in BAD_LINES))
    with pytest.raises(RequestError) as caught:
        read_entries(path, config)
    assert len(caught.value.messages) == len(BAD_LINES)
    for number, (error, (_, message)) in enumerate(zip(caught.value.messages, BAD_LINES, strict=True), start=2):
        assert error.startswith(f"{path}:{number}: "), error
        assert message in error
        assert "\n" not in error


@pytest.mark.parametrize("key", LINE_KEYS)
def test_a_value_of_any_type_is_taken_or_refused(tmp_path, config, key):
    for value in (None, 5, -1, 0.5, True, "", "x", [], [[]], {}, {"x": []}):
        path = write_batch(tmp_path, {"prompt": "ok", key: value})
        with contextlib.suppress(RequestError):
            read_entries(path, config)


def test_a_line_without_use_for_what_the_command_line_gives_is_no_error(tmp_path, config):
    config.strength, config.cache.threshold, config.cache.unconditional_every = 0.5, 0.3, 2
    lines = {"prompt": "a"}, {"prompt": "b", "video": "x", "quality": "fast"}
    unguided = {"prompt": "c", "guidance_scale": 1, "cache": {"method": "first_block"}}
    assert len(read_entries(write_batch(tmp_path, *lines, unguided), config)) == 3


def test_files_that_are_none(tmp_path, config):
    with pytest.raises(RequestError, match="holds no prompts"):
        read_entries(write_batch(tmp_path, "", " "), config)
    with pytest.raises(RequestError, match=r"nowhere\.jsonl': No such file"):
        read_entries(tmp_path / "nowhere.jsonl", config)
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(RequestError, match="not UTF-8"):
        read_entries(tmp_path / "latin", config)
