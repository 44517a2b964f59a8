"""The file of a batch of videos, what ffmpeg reads back from one, and whether its shape is filled."""

import json
import re
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from scipy import ndimage

from helpers import PLENTY_S
from pipeline.quality import read_back

_READ = """
import imageio_ffmpeg, json, sys
reader = imageio_ffmpeg.read_frames(sys.argv[1])
print(json.dumps(next(reader)), file=sys.stderr)
for frame in reader:
    sys.stdout.buffer.write(frame)
"""


def write_batch(folder: Path, *lines: dict | str) -> Path:
    """Write prompts.jsonl with these lines, text as it is; return its path."""
    path = folder / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def probe(path: Path) -> tuple[dict, np.ndarray]:
    """Return what ffmpeg says of a video, and its frames; in another process, because imageio_ffmpeg forks."""
    done = subprocess.run([sys.executable, "-c", _READ, str(path)], capture_output=True, check=True, timeout=PLENTY_S)
    meta = json.loads(done.stderr)
    width, height = meta["size"]
    return meta, np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3)


def tags(path: Path) -> dict[str, str]:
    """Return the tags of a video."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "ffmetadata", "-"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=PLENTY_S)
    lines = re.split(r"(?<!\\)\n", done.stdout.decode())
    return {name: re.sub(r"\\(.)", r"\1", value, flags=re.S) for name, _, value in (x.partition("=") for x in lines)}


def filled_fraction(frames: np.ndarray) -> float:
    """Return how much of the shape's middle, a disc around its centre, is the shape's, as the mean of the frames.

    1 for a filled shape, 0 for an outline, NaN without a shape. frames: uint8 [frames, height, width, 3].
    """
    masks = [mask for frame in frames.astype(np.float64) if (mask := read_back._region(frame)) is not None]
    return float(np.mean([mask[_middle(mask)].mean() for mask in masks])) if masks else np.nan


def _middle(mask: np.ndarray) -> np.ndarray:
    """Return the mask of a disc around a region's centre, a fifth of its sides in radius: within all of SHAPES."""
    (rows, columns), *_ = ndimage.find_objects(mask.astype(int))
    y, x = np.indices(mask.shape)
    centre_y, centre_x = ndimage.center_of_mass(mask)
    radius = 0.2 * np.sqrt((rows.stop - rows.start) * (columns.stop - columns.start))
    return np.hypot(y - centre_y, x - centre_x) <= radius
