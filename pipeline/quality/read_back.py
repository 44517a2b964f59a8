"""Reads colour, shape and motion back from a video of one plain shape, by classical image processing.

Frame by frame: the background is the median colour, the shape the largest connected region that differs from it. The
colour is the nearest of the known ones; the shape the one whose outline, drawn with the region's centre and area,
overlaps it best; the motion follows from straight lines through the centre's and the size's course.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from pipeline.checkpoints.shapes import COLOURS, DIRECTIONS, SHAPES, parse_caption, signed_distance

ATTRIBUTES = ("colour", "shape", "motion")

_MIN_CONTRAST = 40.0  # Euclidean, in 8-bit RGB; the closest pair drawn (blue, bright grey) is 140 apart
_MIN_AREA = 16  # pixels; the smallest shape drawn in 64x96 has 90
_MIN_SEEN = 0.75  # of the frames
# Half of the least that is drawn: the centre's way in units of the shorter side, the size's change as a factor.
_MIN_TRAVEL = 0.128
_MIN_GROWTH = 1.25


@dataclasses.dataclass(frozen=True)
class Reading:
    """Colour, shape and motion seen in a video, None where unclear. overlap: mean IoU with the shape read, 0 to 1."""

    colour: str | None
    shape: str | None
    motion: str | None
    overlap: float

    def agrees(self, caption: str) -> dict[str, bool]:
        """Compare each of ATTRIBUTES with a caption of `checkpoints.shapes`. Raises ValueError for another caption."""
        expected = parse_caption(caption)
        return {name: getattr(self, name) == expected[name] for name in ATTRIBUTES}


def read_video(frames: np.ndarray) -> Reading:
    """Read uint8 frames [frames, height, width, 3]."""
    found = {index: _region(frame) for index, frame in enumerate(frames.astype(np.float64))}
    regions = {index: region for index, region in found.items() if region is not None}
    if len(regions) < max(2, _MIN_SEEN * len(frames)):
        return Reading(None, None, None, 0.0)
    masks = [ndimage.binary_fill_holes(mask) for mask in regions.values()]  # of an outline, what it encloses
    pixels = np.median(np.concatenate([frames[index][_core(mask)] for index, mask in regions.items()]), axis=0)
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(pixels - np.array(COLOURS[name]))))
    overlaps = np.mean([_overlaps(mask) for mask in masks], axis=0)
    best = int(np.argmax(overlaps))
    return Reading(colour, SHAPES[best], _motion(list(regions), masks, len(frames)), float(overlaps[best]))


def fractions(readings: Sequence[Reading], captions: Sequence[str]) -> dict[str, float]:
    """Return the fractions of readings that agree with their captions, in each attribute and in all."""
    agreed = [reading.agrees(caption) for reading, caption in zip(readings, captions, strict=True)]
    each = {name: float(np.mean([one[name] for one in agreed])) for name in ATTRIBUTES}
    return {**each, "all": float(np.mean([all(one.values()) for one in agreed]))}


def _region(frame: np.ndarray) -> np.ndarray | None:
    """Mask [height, width] of the largest region that differs from the frame's median colour."""
    distance = np.linalg.norm(frame - np.median(frame, axis=(0, 1)), axis=-1)
    peak = np.quantile(distance, 1 - _MIN_AREA / distance.size)
    if peak < _MIN_CONTRAST:
        return None
    labels, count = ndimage.label(distance > peak / 2)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    if areas.max() < _MIN_AREA:
        return None
    return labels == 1 + int(np.argmax(areas))


def _core(mask: np.ndarray) -> np.ndarray:
    """Return the mask without its blended edge, where anything is left without it."""
    inner = ndimage.binary_erosion(mask)
    return inner if inner.any() else mask


def _overlaps(mask: np.ndarray) -> list[float]:
    """IoU of a mask with each of SHAPES, drawn with the mask's centre and area."""
    (rows, columns), *_ = ndimage.find_objects(mask.astype(int))
    mask = np.pad(mask[rows, columns], max(mask[rows, columns].shape) // 2)  # no shape of this area reaches further
    y, x = np.indices(mask.shape)
    centre_y, centre_x = ndimage.center_of_mass(mask)
    overlaps = []
    for shape in SHAPES:
        radius = np.sqrt(mask.sum() / _unit_area(shape))
        drawn = signed_distance(shape, (x - centre_x) / radius, (y - centre_y) / radius) < 0
        overlaps.append(float((drawn & mask).sum() / (drawn | mask).sum()))
    return overlaps


@functools.cache
def _unit_area(shape: str) -> float:
    axis = np.linspace(-1.5, 1.5, 601)
    return float((signed_distance(shape, axis[None], axis[:, None]) < 0).sum() * (axis[1] - axis[0]) ** 2)


def _motion(seen: Sequence[int], masks: Sequence[np.ndarray], num_frames: int) -> str:
    """Return the strongest change, in units of the least that counts; "stands still" where none does."""
    height, width = masks[0].shape
    centres = np.array([ndimage.center_of_mass(mask) for mask in masks])
    sizes = np.sqrt([mask.sum() for mask in masks])
    (slope_y, slope_x), _ = np.polyfit(seen, centres, 1)
    size_slope, size_start = np.polyfit(seen, sizes, 1)
    size_end = size_start + size_slope * (num_frames - 1)
    growth = np.log(max(size_end, 1.0) / max(size_start, 1.0)) / np.log(_MIN_GROWTH)
    to_units = (num_frames - 1) / min(height, width) / _MIN_TRAVEL
    ways = {name: (x * slope_x + y * slope_y) * to_units for name, (x, y) in DIRECTIONS.items()}
    strengths = {"grows": growth, "shrinks": -growth, **ways, "stands still": 1.0}
    return max(strengths, key=lambda name: float(strengths[name]))
