"""Files that a request names: images, videos and latents, opened, and told apart by their content."""

import functools
import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from safetensors import SafetensorError, safe_open

from pipeline.requests.errors import RequestError
from pipeline.requests.request import GenerateRequest
from splash_workbench.files import user_path

_SIXTEEN_BITS_AS_I = ("PNG", "PPM")  # formats of no more bits; some releases of Pillow read them as 32
_BITS_PER_SAMPLE = 258  # a tag of TIFF; 12 are read as 16


def content_digest(name: str, path: str) -> str:
    """Return a digest of a file's bytes, or of a folder's files; of a field `name`, for RequestError's message."""
    found = user_path(path)
    files = sorted(file for file in found.iterdir() if file.is_file()) if found.is_dir() else [found]
    try:
        return "+".join(_digest(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
    except OSError as error:
        raise RequestError(f"{name}={path!r}: {error.strerror}; expected a file") from error


@functools.lru_cache(maxsize=256)
def _digest(path: Path, modified_ns: int, size: int) -> str:
    """modified_ns, size: of the file, whose digest is taken anew when they change."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:32]}"


def open_image(path: str) -> Image.Image:
    """Read an image as RGB, turned upright as its camera noted, transparency dropped. Raises RequestError."""
    source = user_path(path)
    if source.exists() and not source.is_file() and not source.is_dir():  # such as a pipe, which would be waited for
        raise RequestError(f"image={path!r}: not a file; expected one such as PNG, JPEG or WebP")
    try:
        with Image.open(source) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode == "F" or upright.mode.startswith("I"):  # which PIL would cut off at 255
                upright = Image.fromarray(_eight_bits(np.asarray(upright), image, path))
            return upright.convert("RGB")
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise RequestError(
            f"image={path!r}: more pixels than Pillow reads ({error}); expected a smaller one"
        ) from error
    except (OSError, ValueError, SyntaxError, RuntimeError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else "no image that can be read"
        raise RequestError(f"image={path!r}: {problem}; expected a file such as PNG, JPEG or WebP") from error


def _eight_bits(values: np.ndarray, image: Image.Image, path: str) -> np.ndarray:
    """Return the values of an image of floats, 12, 16 or 32 bits as uint8, black and white kept where they are."""
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise RequestError(f"image={path!r}: holds NaN or infinity; expected finite values")
        high = values.max(initial=0)
        if high > 255:
            raise RequestError(f"image={path!r}: holds floats to {high:g}; expected them from 0 to 1, or to 255")
        return (values * 255 if high <= 1 else values).clip(0, 255).round().astype(np.uint8)
    if image.mode == "I" and image.format not in _SIXTEEN_BITS_AS_I:
        low, high = values.min(initial=0), values.max(initial=0)
        raise RequestError(
            f"image={path!r}: whole numbers of 32 bits, or with a sign, from {low} to {high}, which do not say what "
            "white is; expected 8 or 16 bits a colour"
        )
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,))[0] if isinstance(image, TiffImageFile) else 16
    return (values.clip(0, 2**bits - 1) >> (bits - 8)).astype(np.uint8)


def read_video(path: str, num_frames: int) -> list[Image.Image]:
    """Read the first frames of a video, as RGB. Raises RequestError where it has fewer, or cannot be read."""
    data = _decode(path, num_frames)
    header = data[: data.index(b"\n255\n") + len(b"\n255\n")]  # of each image: ffmpeg keeps to the first one's size
    width, height = map(int, header.split()[1:3])
    images = np.frombuffer(data, np.uint8).reshape(-1, len(header) + height * width * 3)[:, len(header) :]
    _check_count(path, len(images), num_frames)
    return [Image.fromarray(image.reshape(height, width, 3)) for image in images]


def check_video(path: str, num_frames: int) -> None:
    """Raise RequestError unless a video has so many frames that can be read."""
    _check_count(path, len(_decode(path, num_frames, "-vf", "scale=1:1")) // len(b"P6\n1 1\n255\n000"), num_frames)


def _check_count(path: str, count: int, num_frames: int) -> None:
    if count < num_frames:
        raise RequestError(
            f"video={path!r}: holds {count} frames; expected num_frames={num_frames} of them, or a smaller num_frames"
        )


def _decode(path: str, num_frames: int, *options: str) -> bytes:
    """Return frames as PPM images, one behind the other."""
    source = user_path(path)
    if not source.is_file():
        raise RequestError(f"video={path!r}: no such file; expected a video")
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", f"file:{source}", "-frames:v", str(num_frames)]
    command += [*options, "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0 or not done.stdout:
        words = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no frames in it"]
        raise RequestError(f"video={path!r}: ffmpeg cannot read it ({words[0]}); expected a video such as mp4")
    return done.stdout


def read_latents(path: str, shape: tuple[int, ...] | None = None) -> Any:
    """Read the one tensor, or that named "latents", of a file of safetensors, a torch.Tensor.

    shape: expected. Raises RequestError.
    """
    try:
        with safe_open(user_path(path), framework="pt", device="cpu") as file:
            names = list(file.keys())
            if not names:
                raise RequestError(f"latents={path!r}: holds no tensor; expected one, or 'latents'")
            name = "latents" if "latents" in names else names[0]
            if len(names) > 1 and name != "latents":
                raise RequestError(f"latents={path!r}: holds {', '.join(names[:5])}; expected one tensor, or 'latents'")
            tensor = file.get_tensor(name)
    except (SafetensorError, OSError, IndexError) as error:
        raise RequestError(f"latents={path!r}: {error}; expected a file of safetensors with one tensor") from error
    if not tensor.is_floating_point() or not bool(tensor.float().isfinite().all()):
        what = "NaN or infinite values" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")
        raise RequestError(f"latents={path!r}: holds {what}; expected finite floating-point numbers")
    if shape is not None and tuple(tensor.shape) != shape:
        raise RequestError(
            f"latents={path!r}: has shape {list(tensor.shape)}; expected {list(shape)}: 1, frames, channels, height, "
            "width, with padding frames"
        )
    return tensor


def check_files(request: GenerateRequest) -> None:
    """Raise RequestError for an image or video of a request that cannot be read."""
    if request.image is not None:
        _check_once(open_image, request.image, *_state(request.image))
    if request.video is not None:
        _check_once(check_video, request.video, request.num_frames, *_state(request.video))


def _state(path: str) -> tuple[int, int]:
    """Return when a file was changed last, and its size; zeros where it is not there, which what opens it tells."""
    try:
        found = user_path(path).stat()
    except (OSError, ValueError):
        return 0, 0
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=4096)
def _check_once(check: Callable[..., Any], path: str, *more: int) -> None:
    """Read a file once that many lines of a batch name; more: arguments, then the file's `_state`."""
    check(path, *more[:-2])


def file_digests(request: GenerateRequest) -> dict[str, Any]:
    """Return what tells apart the content of the files that a request names: field -> digest, of those it has."""
    names = ("image", "video", "latents")
    return {name: content_digest(name, path) for name in names if (path := getattr(request, name)) is not None}
