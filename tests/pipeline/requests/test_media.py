"""Images of any size, mode and orientation, and videos, as diffusers takes them; and files that are none."""

import os
import struct
import subprocess
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pipeline.requests.errors import RequestError
from pipeline.requests.media import check_files, check_video, content_digest, open_image, read_latents, read_video
from pipeline.requests.request import GenerateRequest
from pipeline.runs.video import write_mp4
from pipeline.stages.conditioning import source_frames

HEIGHT, WIDTH = 48, 80


def _gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([255 * x / width, 255 * y / height, 90 + 0 * x], -1).astype(np.uint8))


def _request(**changes) -> GenerateRequest:
    return GenerateRequest("a", height=HEIGHT, width=WIDTH, num_frames=9, **changes)


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("size", [(80, 48), (31, 97), (400, 30), (1, 1)])
def test_an_image_is_as_diffusers_prepares_it(mode, size, tmp_path):
    from diffusers.utils import load_image
    from diffusers.video_processor import VideoProcessor

    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    _gradient(*size).convert(mode).save(path)
    actual = source_frames(_request(image=str(path)))
    expected = VideoProcessor(vae_scale_factor=8).preprocess(load_image(str(path)), height=HEIGHT, width=WIDTH)
    assert actual.shape == (1, HEIGHT, WIDTH, 3) and actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_upright(orientation, tmp_path):
    upright = _gradient(40, 24)
    turn = {
        **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM},
        **{5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE},
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(turn[orientation]) if orientation in turn else upright
    stored.save(tmp_path / "image.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / "image.png"))), np.asarray(upright))


def test_sixteen_bits_are_not_cut_off(tmp_path):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "image.png")
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / "image.png")))[..., 0], values >> 8)


def _twelve_bits(path: Path, values: np.ndarray) -> None:
    """Write a TIFF of 12 bits a pixel, two pixels in three bytes."""
    first, second = values.reshape(-1, 2).T
    data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(data)))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4))


def test_twelve_bits_are_not_dark(tmp_path):
    values = np.arange(0, 4096, 4).reshape(32, 32)
    _twelve_bits(tmp_path / "image.tif", values)
    np.testing.assert_array_equal(np.asarray(open_image(str(tmp_path / "image.tif")))[..., 0], values >> 4)


def test_sixteen_bits_that_are_read_as_thirty_two(tmp_path):
    values = np.arange(0, 65536, 64, dtype=">u2")
    (tmp_path / "image.pgm").write_bytes(b"P5 32 32 65535\n" + values.tobytes())
    found = np.asarray(open_image(str(tmp_path / "image.pgm")))[..., 0]
    np.testing.assert_array_equal(found.ravel(), values >> 8)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(256, dtype=np.int32), "whole numbers of 32 bits, or with a sign, from 0 to 255, which do not say"),
        (np.linspace(-5, 2**31 - 1, 256).astype(np.int32), "from -5 to 2147483647, .*; expected 8 or 16 bits a colour"),
        (np.linspace(0, 65535, 256).astype(np.float32), "holds floats to 65535; expected them from 0 to 1, or to 255"),
    ],
)
def test_an_image_that_does_not_say_what_white_is(values, message, tmp_path):
    """Whole numbers to 255 were black, and beyond 16 bits white."""
    Image.fromarray(values.reshape(16, 16)).save(tmp_path / "image.tif")
    with pytest.raises(RequestError, match=message):
        open_image(str(tmp_path / "image.tif"))


def test_an_image_of_floats_is_not_black(tmp_path):
    values = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(values).save(tmp_path / "image.tiff")
    found = np.asarray(open_image(str(tmp_path / "image.tiff")))[..., 0]
    np.testing.assert_array_equal(found, (values * 255).round())


def test_noise_on_an_image_is_of_the_seed(tmp_path):
    _gradient(80, 48).save(tmp_path / "image.png")
    image = str(tmp_path / "image.png")
    plain = source_frames(_request(image=image))
    noisy, again, other = (
        source_frames(_request(image=image, noise_aug_strength=0.1, seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(noisy, again)
    assert not np.array_equal(noisy, other)
    assert (noisy - plain).std() == pytest.approx(0.1, rel=0.05)


def test_a_stretched_image_is_told_of(tmp_path, caplog):
    _gradient(80, 80).save(tmp_path / "image.png")
    source_frames(_request(image=str(tmp_path / "image.png")))
    assert "image: 80x80 is stretched to 80x48; crop it before" in caplog.text


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    frames = np.stack([np.full((32, 48, 3), 20 * index, np.uint8) for index in range(11)])
    write_mp4(path, frames, 8)
    return path


def test_the_first_frames_of_a_video(video):
    frames = read_video(str(video), 9)
    assert [frame.size for frame in frames] == [(48, 32)] * 9
    assert [round(float(np.asarray(frame).mean())) for frame in frames] == pytest.approx(range(0, 180, 20), abs=3)
    actual = source_frames(_request(video=str(video)))
    assert actual.shape == (9, HEIGHT, WIDTH, 3)
    np.testing.assert_allclose(actual[:, 0, 0, 0], np.arange(0, 180, 20) / 127.5 - 1, atol=0.03)


@pytest.mark.parametrize("pixels", ["yuv420p10le", "gray", "rgba64le"])
def test_a_video_of_other_pixels_is_read_as_rgb(pixels, tmp_path):
    path = tmp_path / "deep.mkv"
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "color=white:size=32x16:rate=8"]
    subprocess.run([*command, "-frames:v", "3", "-c:v", "ffv1", "-pix_fmt", pixels, str(path)], check=True)
    check_video(str(path), 3)
    frames = read_video(str(path), 3)
    assert [(frame.mode, frame.size) for frame in frames] == [("RGB", (32, 16))] * 3
    assert np.asarray(frames[2]).min() > 240


def test_a_video_that_is_too_short_or_none(video, tmp_path):
    check_video(str(video), 11)
    with pytest.raises(
        RequestError, match=r"video='.*': holds 11 frames; expected num_frames=17 of them, or a smaller"
    ):
        check_video(str(video), 17)
    (tmp_path / "text.mp4").write_text("no video")
    for name, message in (("text.mp4", "ffmpeg cannot read it"), ("absent.mp4", "no such file")):
        with pytest.raises(RequestError, match=message) as error:
            check_files(_request(video=str(tmp_path / name)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"), [("absent.png", "No such file"), ("text.png", "no image that can be read"), (".", "directory")]
)
def test_what_is_no_image(name, message, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(RequestError, match=f"^image='.*{message}"):
        check_files(_request(image=str(tmp_path / name)))


def test_a_digest_is_of_the_content(tmp_path):
    path = tmp_path / "file"
    digests = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        digests.append(content_digest("image", str(path)))
    assert digests[0] == digests[2] != digests[1]
    with pytest.raises(RequestError, match="image='absent'"):
        content_digest("image", "absent")


def test_latents_of_a_file(tmp_path):
    path, latents = tmp_path / "x.safetensors", torch.randn(1, 2, 3, 4, 5)
    save_file({"noise": latents}, path)
    assert torch.equal(read_latents(str(path), (1, 2, 3, 4, 5)), latents)
    with pytest.raises(RequestError, match=r"has shape \[1, 2, 3, 4, 5\]; expected \[1, 4, 3, 4, 5\]"):
        read_latents(str(path), (1, 4, 3, 4, 5))
    save_file({"a": latents, "b": latents.clone()}, path)
    with pytest.raises(RequestError, match="holds a, b; expected one tensor, or 'latents'"):
        read_latents(str(path))
    for wrong, said in ((latents * np.nan, "NaN or infinite"), (latents.to(torch.complex64), "complex64")):
        save_file({"noise": wrong}, path)
        with pytest.raises(RequestError, match=f"holds {said}.*; expected finite floating-point numbers"):
            read_latents(str(path))
    save_file({}, path)
    with pytest.raises(RequestError, match="holds no tensor"):
        read_latents(str(path))
    path.write_bytes(b"no")
    with pytest.raises(RequestError, match="expected a file of safetensors with one tensor"):
        read_latents(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "a", "video": "b"}, "image='a' and video='b': expected one of them"),
        ({"video": "a", "latents": "b"}, "video and latents"),
        ({"image": ""}, "image='': expected the path of a file"),
        ({"strength": 1.5}, "strength=1.5: expected a number from 0 to 1"),
        ({"video": "a", "strength": 0.01, "num_inference_steps": 50}, "leaves none of 50 steps; expected 0.02 or more"),
        ({"context_overlap": -8}, "context_overlap=-8: expected a whole number from 0 to"),
        ({"noise_aug_strength": 0.1}, "noise_aug_strength=0.1: expected image="),
    ],
)
def test_inputs_that_cannot_be(changes, message):
    with pytest.raises(RequestError, match=message):
        _request(**changes)


def test_a_video_is_put_through_the_last_steps():
    assert _request(video="a", strength=0.6, num_inference_steps=50).steps_left_out == 20
    assert _request(strength=0.6, num_inference_steps=50).steps_left_out == 0


def test_an_image_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(RequestError, match=r"image='.*pipe.png': not a file"):
        open_image(str(tmp_path / "pipe.png"))


def test_an_image_that_is_not_finite(tmp_path):
    path = tmp_path / "x.tiff"
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(path)
    with pytest.raises(RequestError, match=r"x\.tiff': holds NaN or infinity; expected finite values"):
        open_image(str(path))


def test_an_image_of_more_pixels_than_pillow_reads(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.new("RGB", (4, 4)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(RequestError, match=r"x\.png': more pixels than Pillow reads .*; expected a smaller one"):
        open_image(str(path))
