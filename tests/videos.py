"""The file of a batch of videos, and what ffmpeg reads back from one."""

import json
import re
import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from helpers import PLENTY_S

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
