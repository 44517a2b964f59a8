"""Writes frames as mp4 (H.264, yuv420p: plays everywhere)."""

import errno
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from pipeline.requests.errors import PipelineError
from splash_workbench.files import atomic_path

_CONSTANT_RATE_FACTOR = "17"  # visually lossless
MAX_TAG_LENGTH = 16_000  # characters; Linux takes 128 KiB an argument


def write_mp4(path: Path, frames: np.ndarray, fps: float, metadata: Mapping[str, str] | None = None) -> None:
    """Write uint8 frames [frames, height, width, 3], height and width even, under a temporary name, then rename.

    metadata: tags that mp4 knows, e.g. title and comment; values are cut to MAX_TAG_LENGTH.
    Raises PipelineError with ffmpeg's last words if it fails.
    """
    _, height, width, _ = frames.shape
    # Not imageio_ffmpeg.write_frames: it starts ffmpeg with a preexec_fn, hence by a bare fork, which can deadlock in
    # a process with JAX's threads.
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps), "-i", "-")
    target = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", _CONSTANT_RATE_FACTOR, "-movflags", "+faststart")
    tags = [
        part for name, value in (metadata or {}).items() for part in ("-metadata", f"{name}={value[:MAX_TAG_LENGTH]}")
    ]
    with atomic_path(path) as temporary:
        command = (imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *source, *target, *tags, str(temporary))
        data = np.ascontiguousarray(frames).data
        # In a session of its own: Ctrl-C goes to the whole group, and what is being saved should be saved.
        done = subprocess.run(command, input=data, capture_output=True, check=False, start_new_session=True)
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace")
            if os.strerror(errno.ENOSPC) in said:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            last_words = said.strip().splitlines()[-1:] or ["no message"]
            raise PipelineError(f"{path}: ffmpeg could not encode {width}x{height} at {fps} fps ({last_words[0]})")
