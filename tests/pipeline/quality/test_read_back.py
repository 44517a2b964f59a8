"""What is drawn is read back: colour, shape and motion, also through blur and noise; and nothing where nothing is."""

import numpy as np
import pytest
from scipy import ndimage

from pipeline.checkpoints.shapes import MOTIONS, OUTLINE_WIDTH, SHAPES, captions, draw, parse_caption, random_scene
from pipeline.quality.read_back import Reading, fractions, read_video
from videos import filled_fraction

HEIGHT, WIDTH, FRAMES = 64, 96, 17


def drawn(rng: np.random.Generator, caption: str, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return draw(random_scene(rng, height, width, **parse_caption(caption)), FRAMES, height, width)


@pytest.mark.compile
def test_every_caption_is_read_from_its_video(rng):
    readings = [read_video(drawn(rng, caption)) for caption in captions()]
    assert len(readings) == 168
    assert fractions(readings, captions())["all"] >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_through_blur_and_noise(rng, shape):
    for motion in MOTIONS:
        caption = f"a purple {shape} {motion}"
        blurred = ndimage.gaussian_filter(drawn(rng, caption).astype(float), (0, 1, 1, 0))
        noisy = np.clip(blurred + rng.normal(0, 6, blurred.shape), 0, 255).astype(np.uint8)
        assert all(read_video(noisy).agrees(caption).values()), caption


def test_at_another_size(rng):
    for motion in MOTIONS:
        caption = f"a blue star {motion}"
        assert all(read_video(drawn(rng, caption, 96, 80)).agrees(caption).values()), caption


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_are_told_from_filled_shapes_and_read_as_they(rng, shape):
    scene = random_scene(rng, HEIGHT, WIDTH, "yellow", shape, "moves left")
    filled, outline = (draw(scene, FRAMES, HEIGHT, WIDTH, width) for width in (None, OUTLINE_WIDTH))
    assert filled_fraction(filled) > 0.99 and filled_fraction(outline) < 0.5
    assert all(read_video(outline).agrees(scene.caption).values())
    assert np.isnan(filled_fraction(np.zeros_like(filled)))


def test_reversed_in_time_is_the_other_way(rng):
    assert read_video(drawn(rng, "a red circle moves right")[::-1]).motion == "moves left"
    assert read_video(drawn(rng, "a red circle grows")[::-1]).motion == "shrinks"


def test_nothing_is_read_from_a_plain_or_faint_video(rng):
    grey = np.full((FRAMES, HEIGHT, WIDTH, 3), 60, np.uint8)
    faint = grey + (drawn(rng, "a red circle grows") > 128) * np.uint8(10)
    for frames in (grey, faint):
        assert read_video(frames) == Reading(None, None, None, 0.0)


def test_nothing_is_read_where_the_shape_comes_and_goes(rng):
    frames = drawn(rng, "a red circle stands still")
    frames[::2] = frames[0, 0, 0]
    assert read_video(frames).shape is None


def test_a_wrong_attribute_is_told_from_the_right_ones(rng):
    reading = read_video(drawn(rng, "a red circle moves right"))
    assert reading.agrees("a red square moves up") == {"colour": True, "shape": False, "motion": False}
    assert fractions([reading, reading], ["a red circle moves right", "a blue circle grows"]) == {
        "colour": 0.5,
        "shape": 1.0,
        "motion": 0.5,
        "all": 0.5,
    }


@pytest.mark.parametrize("prompt", ["a cat", "a red circle", "a red circle flies", "the red circle grows", ""])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="expected 'a COLOUR SHAPE MOTION' with COLOUR of red"):
        parse_caption(prompt)
