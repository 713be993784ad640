"""What is measured, on clips of which it is known."""

import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from shared.errors import UserError
from shared.io.mp4 import Clip, read_mp4, write_mp4
from train.evaluation import measures
from train.evaluation.measures import measure, preview, thumbnail, variety

FRAMES = 6


def moving(
    step: float, *, side: int = 256, frames: int = FRAMES, seed: int = 0, contrast: float = 40
) -> Clip:
    """A blurred random texture that moves to the left by `step` px a frame."""
    noise = np.random.default_rng(seed).normal(size=(side, side + int(step * frames) + 1, 3))
    texture = cv2.GaussianBlur(noise, (0, 0), 2.5 * side / 256)
    texture = 128 + contrast * (texture - texture.mean()) / texture.std()
    wide = np.clip(texture, 0, 255).round().astype(np.uint8)
    return np.stack([wide[:, round(step * t) : round(step * t) + side] for t in range(frames)])


@pytest.mark.parametrize("step", [1, 2, 5])
def test_motion_of_a_texture_is_its_pixels_a_frame(step: int) -> None:
    assert measure(moving(step)).motion == pytest.approx(step, rel=0.03)


@pytest.mark.parametrize(("side", "step", "expected"), [(512, 4, 2), (64, 1, 4)])
def test_motion_is_told_at_a_shorter_side_of_256(side: int, step: int, expected: float) -> None:
    assert measure(moving(step, side=side)).motion == pytest.approx(expected, rel=0.05)
    wide = np.concatenate([moving(step, side=side)] * 2, axis=2)
    assert measure(wide).motion == pytest.approx(expected, rel=0.1)  # a seam in the middle
    assert measure(wide.swapaxes(1, 2).copy()).motion == pytest.approx(expected, rel=0.1)


def test_a_still_clip_has_no_motion_and_is_not_dynamic() -> None:
    still = measure(moving(0))
    assert still.motion == 0 and still.dynamic == 0


def test_a_clip_is_dynamic_if_something_small_in_it_moves() -> None:
    clip, small = moving(0), moving(5, seed=1)
    clip[:, 60:140, 60:140] = small[:, :80, :80]  # a tenth of the picture
    found = measure(clip)
    assert found.motion < 1 and found.dynamic == 1
    assert measure(moving(2)).dynamic == 0  # below 3 px a frame


def test_motion_survives_the_mp4(tmp_path: Path) -> None:
    """Clips are measured as read back; a still clip has next to none."""
    for step, tolerance in ((0, 0.02), (2, 0.06)):
        write_mp4(tmp_path / "clip.mp4", moving(step), 16)
        read = read_mp4(tmp_path / "clip.mp4")
        assert read.shape == (FRAMES, 256, 256, 3)
        assert measure(read).motion == pytest.approx(step, abs=tolerance)


def test_contrast_and_saturation_scale_with_the_pixels() -> None:
    clip = moving(1, contrast=30)
    scaled = (128 + 1.2 * (clip.astype(float) - 128)).round().clip(0, 255).astype(np.uint8)
    plain, stronger = measure(clip), measure(scaled)
    assert stronger.contrast / plain.contrast == pytest.approx(1.2, rel=0.005)
    assert stronger.saturation / plain.saturation == pytest.approx(1.2, rel=0.005)
    assert stronger.motion == pytest.approx(plain.motion, rel=0.02)


def test_contrast_and_saturation_of_known_pictures() -> None:
    halves = np.zeros((2, 32, 32, 3), np.uint8)
    halves[:, :, 16:] = 200
    assert measure(halves).contrast == pytest.approx(100)
    assert measure(halves).saturation == 0  # grey
    red = np.zeros((2, 32, 32, 3), np.uint8)
    red[..., 0] = 255
    assert measure(red).saturation == 1 and measure(red).contrast == pytest.approx(0, abs=1e-4)
    almost_black = np.full((2, 32, 32, 3), (2, 0, 0), np.uint8)
    assert measure(almost_black).saturation < 0.01  # of HSV it would be 1


def test_sharpness_falls_with_blur() -> None:
    clip = moving(1)
    blurred = [
        np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in clip]) for sigma in (1, 3)
    ]
    found = [measure(each).sharpness for each in (clip, *blurred)]
    assert found[0] > 1.5 * found[1] > 3 * found[2] > 0
    assert measure(np.full_like(clip, 90)).sharpness == 0


def test_variety_is_the_mean_distance_of_pairs() -> None:
    same = [thumbnail(moving(1)) for _ in range(3)]
    assert variety(same) == 0 and variety(same[:1]) is None
    flat = [thumbnail(np.full((5, 48, 80, 3), level, np.uint8)) for level in (0, 30, 90)]
    assert variety(flat) == pytest.approx((30 + 90 + 60) / 3)
    other = [thumbnail(moving(1, seed=seed)) for seed in range(3)]
    assert (variety(other) or 0) > 5


def test_a_preview_is_small() -> None:
    assert preview(np.zeros((2, 512, 600, 3), np.uint8)).shape == (2, 256, 300, 3)
    assert preview(np.zeros((2, 64, 48, 3), np.uint8)).shape == (2, 64, 48, 3)


def test_without_opencv_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install 'wandistill\[evaluate\]'"):
        runpy.run_path(measures.__file__)
