"""Drawn scenes: inside the frame, as large and as far as asked for, the same for the same generator."""

import numpy as np
import pytest

from pipeline.checkpoints.shapes import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    captions,
    draw,
    random_scene,
    signed_distance,
)


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize(("height", "width"), [(64, 96), (80, 48)])
def test_the_shape_stays_inside(rng, motion, height, width):
    for shape in SHAPES:
        scene = random_scene(rng, height, width, shape=shape, motion=motion)
        differs = (draw(scene, 9, height, width) != scene.background).any(axis=-1)
        assert differs.any(axis=(1, 2)).all()
        edges = (differs[:, 0], differs[:, -1], differs[:, :, 0], differs[:, :, -1])
        assert not any(edge.any() for edge in edges), scene


def test_a_circle_is_drawn_to_measure(rng):
    scene = random_scene(rng, 64, 96, colour="white", shape="circle", motion="stands still")
    frame = draw(scene, 1, 64, 96)[0].astype(float)
    coverage = (frame[..., 0] - scene.background) / (COLOURS["white"][0] - scene.background)
    assert coverage.sum() == pytest.approx(np.pi * (64 * scene.start_radius) ** 2, rel=0.01)
    y, x = np.indices(coverage.shape) + 0.5
    assert (coverage * x).sum() / coverage.sum() == pytest.approx(64 * scene.start[0], abs=0.05)
    assert (coverage * y).sum() / coverage.sum() == pytest.approx(64 * scene.start[1], abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_is_negative_inside_and_grows_outwards(shape):
    steps = np.linspace(0, 3, 31)
    distance = signed_distance(shape, np.zeros(31), -steps)  # up from the centre
    assert distance[0] < 0 < distance[-1]
    assert (np.diff(distance[steps >= 1.3]) == pytest.approx(0.1, abs=1e-6)) or shape == "square"
    assert (np.diff(distance) > -1e-9).all()


@pytest.mark.parametrize("motion", DIRECTIONS)
def test_the_centre_goes_the_way_that_is_said(rng, motion):
    scene = random_scene(rng, 64, 96, motion=motion)
    way = np.sign(np.round(np.array(scene.end) - np.array(scene.start), 6))
    assert tuple(way) == DIRECTIONS[motion]
    assert scene.caption in captions()


def test_the_same_generator_draws_the_same():
    first, second = (random_scene(np.random.default_rng(3), 64, 96) for _ in range(2))
    assert first == second
