"""Reading real media."""

import subprocess
from pathlib import Path

import decord
import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from preprocess.media.reader import probe, read_frames
from tests.preprocess.conftest import PHOTOS, PICTURES, VIDEOS, render_clip


@pytest.mark.parametrize("name", ["bikes.mp4"])
def test_single_frames_are_those_of_the_whole_video(name: str) -> None:
    """Seeking frame by frame gives what reading everything in order gives."""
    path = VIDEOS / name
    everything = decord.VideoReader(str(path)).get_batch(range(100)).asnumpy()
    indices = [3, 5, 7, 40, 41, 99]
    for index, frame in zip(indices, read_frames(path, "video", indices), strict=True):
        assert (frame == everything[index]).all()


def test_probing(tmp_path: Path) -> None:
    seen = probe(VIDEOS / "bikes.mp4", "video")
    assert (seen.frames, seen.height, seen.width, seen.fps) == (250, 272, 640, 25.0)
    seen = probe(PHOTOS / "china.jpg", "image")
    assert (seen.frames, seen.height, seen.width, seen.fps) == (1, 427, 640, None)


def test_a_video_filmed_upright_is_upright(tmp_path: Path) -> None:
    render_clip(tmp_path / "lying.mp4", height=64, width=112, frames=6)
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    files = ["-i", str(tmp_path / "lying.mp4"), "-c", "copy", str(tmp_path / "upright.mp4")]
    subprocess.run([ffmpeg, "-loglevel", "error", "-display_rotation", "90", *files], check=True)
    seen = probe(tmp_path / "upright.mp4", "video")
    assert (seen.height, seen.width) == (112, 64)
    (frame,) = read_frames(tmp_path / "upright.mp4", "video", [2])
    (lying,) = read_frames(tmp_path / "lying.mp4", "video", [2])
    assert (frame == np.rot90(lying)).all()


FLIPS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What EXIF's orientations 1 to 8 ask of a viewer."""


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp", "avif"])
@pytest.mark.parametrize("orientation", FLIPS)
def test_orientation_of_pictures(orientation: int, ending: str, tmp_path: Path) -> None:
    """What is probed is what is read, and what viewers show, whichever way the camera was held."""
    path = tmp_path / f"photo.{ending}"
    image = Image.new("RGB", (48, 32), (10, 10, 10))
    for colour, corner in {(250, 0, 0): (0, 0), (0, 250, 0): (32, 0), (0, 0, 250): (0, 16)}.items():
        image.paste(colour, (*corner, corner[0] + 16, corner[1] + 16))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **({} if ending in ("png", "tif") else {"quality": 95}))
    flip = FLIPS[orientation]
    shown = np.asarray(image if flip is None else image.transpose(flip))
    seen = probe(path, "image")
    (frame,) = read_frames(path, "image", [0])
    assert frame.shape == shown.shape == (seen.height, seen.width, 3)
    assert np.abs(frame.astype(int) - shown).mean() < 4


@pytest.mark.parametrize("name", ["camera.png", "logo.png", "horse.png", "chelsea.png"])
def test_grey_and_transparent_pictures_become_rgb(name: str) -> None:
    (frame,) = read_frames(PICTURES / name, "image", [0])
    assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
    assert frame.std() > 10
