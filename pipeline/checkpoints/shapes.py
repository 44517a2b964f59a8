"""Videos of one plain shape that moves, drawn by the program, and the captions that say what they show.

The tiny model is trained on these, and what a video shows is read back against them (`pipeline.quality.read_back`).
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 225),
    "yellow": (240, 210, 40),
    "white": (245, 245, 245),
    "purple": (160, 60, 190),
}
SHAPES = ("circle", "square", "triangle", "star")
#: What a caption says of motion -> the way the centre goes in x and y (down is positive).
DIRECTIONS: Mapping[str, tuple[int, int]] = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stands still": (0, 0),
}
MOTIONS = (*DIRECTIONS, "grows", "shrinks")
BACKGROUND_GREYS = (20, 90)  # darkest and brightest
OUTLINE_WIDTH = 3 / 64  # of the tiny LoRA's outlines, in units of the shorter side: what the tiny VAE can show

_REACH = 1.25  # how far a shape reaches from its centre, in its radius
_STAR_INNER = 0.45


@dataclasses.dataclass(frozen=True)
class Scene:
    """One shape in one video. Lengths are in units of the frame's shorter side.

    start, end: the centre (x, y) in the first and last frame. start_radius, end_radius: sizes there.
    background: a grey level, 0 to 255.
    """

    colour: str
    shape: str
    motion: str
    start: tuple[float, float]
    end: tuple[float, float]
    start_radius: float
    end_radius: float
    background: int

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion}"


def captions() -> list[str]:
    """Return every caption there is."""
    return [f"a {colour} {shape} {motion}" for colour, shape, motion in itertools.product(COLOURS, SHAPES, MOTIONS)]


def parse_caption(caption: str) -> dict[str, str]:
    """Parse the attributes that a caption names, e.g. "a red circle moves right". Raises ValueError."""
    match caption.split(maxsplit=3):
        case ["a", colour, shape, motion] if colour in COLOURS and shape in SHAPES and motion in MOTIONS:
            return {"colour": colour, "shape": shape, "motion": motion}
    raise ValueError(
        f"prompt={caption!r}: expected 'a COLOUR SHAPE MOTION' with COLOUR of {', '.join(COLOURS)}; SHAPE of "
        f"{', '.join(SHAPES)}; MOTION of {', '.join(DIRECTIONS)}, grows, shrinks"
    )


def random_scene(
    rng: np.random.Generator,
    height: int,
    width: int,
    colour: str | None = None,
    shape: str | None = None,
    motion: str | None = None,
    spread: float = 1.0,
) -> Scene:
    """Draw at random a scene that lies within frames of this size throughout, with the attributes that are named.

    spread: of places, sizes and background about the middle of what they may be, 0 (always the same) to 1.
    """

    def uniform(low: Any, high: Any) -> Any:
        middle = (np.asarray(low) + high) / 2
        return middle + spread * (rng.uniform(low, high) - middle)

    colour = colour or str(rng.choice(list(COLOURS)))
    shape = shape or str(rng.choice(SHAPES))
    motion = motion or str(rng.choice(MOTIONS))
    short = min(height, width)
    size = np.array([width, height]) / short
    small, large = float(uniform(0.13, 0.16)), float(uniform(0.25, 0.3))
    radii = {"grows": (small, large), "shrinks": (large, small)}.get(motion, (float(uniform(0.18, 0.23)),) * 2)
    reach = _REACH * max(radii)
    travel = np.array(DIRECTIONS.get(motion, (0, 0))) * np.minimum(uniform(0.6, 0.9) * (size - 2 * reach), 0.6)
    low, high = reach + np.maximum(-travel, 0), size - reach - np.maximum(travel, 0)
    x, y = start = uniform(low, high)
    to_x, to_y = start + travel
    ends = (float(x), float(y)), (float(to_x), float(to_y))
    return Scene(colour, shape, motion, *ends, *radii, background=round(float(uniform(*BACKGROUND_GREYS))))


def draw(scene: Scene, num_frames: int, height: int, width: int, line_width: float | None = None) -> np.ndarray:
    """Draw the scene's video, uint8 [num_frames, height, width, 3], edges smoothed over a pixel.

    line_width: of outlines instead of filled shapes, in units of the shorter side, on their inside.
    """
    short = min(height, width)
    along = np.linspace(0, 1, num_frames)[:, None]
    centre = (1 - along) * np.array(scene.start) + along * np.array(scene.end)
    radius = ((1 - along) * scene.start_radius + along * scene.end_radius)[:, :, None]
    y, x = ((np.arange(height) + 0.5) / short)[:, None], (np.arange(width) + 0.5) / short
    dx, dy = x - centre[:, :1, None], y - centre[:, 1:, None]
    distance = signed_distance(scene.shape, dx / radius, dy / radius) * radius
    if line_width is not None:
        distance = np.maximum(distance, -distance - line_width)
    coverage = np.clip(0.5 - distance * short, 0, 1)[..., None]
    frames = coverage * np.array(COLOURS[scene.colour]) + (1 - coverage) * scene.background
    return np.round(frames).astype(np.uint8)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance of points from the outline of a shape of radius 1 around the origin, negative inside."""
    x, y = np.broadcast_arrays(x, y)
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        outside_x, outside_y = np.abs(x) - 0.88, np.abs(y) - 0.88
        outside = np.hypot(np.maximum(outside_x, 0), np.maximum(outside_y, 0))
        return outside + np.minimum(np.maximum(outside_x, outside_y), 0)
    return _polygon_distance(_corners(shape), x, y)


def _corners(shape: str) -> np.ndarray:
    count = {"triangle": 3, "star": 10}[shape]
    angles = np.arange(count) * 2 * np.pi / count
    radii = np.where((shape == "star") & (np.arange(count) % 2), _REACH * _STAR_INNER, _REACH)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _polygon_distance(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    squared = np.full(x.shape, np.inf)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        along = np.clip(((x - ax) * ex + (y - ay) * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (x - ax - along * ex) ** 2 + (y - ay - along * ey) ** 2)
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < ax + (y - ay) * ex / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared)
