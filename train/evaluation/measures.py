"""What is measured of a clip: motion, contrast, saturation, sharpness; variety of several.

Pure functions of (F, H, W, 3) uint8 RGB. Definitions and their sources: docs/evaluate.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from shared.errors import UserError
from shared.io.mp4 import Clip

try:
    import cv2
except ImportError as error:
    raise UserError(
        f"wantrain evaluate measures motion with OpenCV, which can't be imported ({error}). "
        "Install it: pip install 'wandistill[evaluate]'"
    ) from error

MOTION_SIDE = 256
"""Motion is measured in pixels of frames whose shorter side is this."""
FASTEST = 0.05
"""Share of a frame's pixels whose mean speed says whether something in it moves."""
DYNAMIC_ABOVE = 3.0
"""Pixels a frame: with a mean speed of the fastest pixels above it, a clip is dynamic."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_THUMBNAIL_FRAMES, _THUMBNAIL_SIDE = 16, 32


@dataclass(frozen=True, kw_only=True)
class Measures:
    """Of one clip."""

    motion: float
    """Mean length of optical flow over pixels and pairs of frames; pixels a frame."""
    dynamic: float
    """1 where the fastest pixels' mean is above `DYNAMIC_ABOVE`, else 0."""
    contrast: float
    """Standard deviation of luma in a frame, mean over frames; 0 to 127.5."""
    saturation: float
    """Mean of (max − min of R, G, B) / 255; 0 to 1."""
    sharpness: float
    """Variance of luma's Laplacian in a frame, mean over frames."""


def measure(clip: Clip) -> Measures:
    """All measures of a clip of at least 2 frames, frame by frame."""
    assert len(clip) > 1, "motion is between frames"
    flow: Any = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    before: Any = None
    speeds, fastest, contrasts, saturations, sharpnesses = [], [], [], [], []
    for frame in clip:
        grey = _shorter_side(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY))
        if before is not None:
            speed = np.linalg.norm(flow.calc(before, grey, None), axis=-1).ravel()
            speeds.append(speed.mean())
            few = max(1, round(FASTEST * speed.size))
            fastest.append(np.partition(speed, -few)[-few:].mean())
        before = grey
        luma = frame @ _LUMA
        contrasts.append(luma.std())
        sharpnesses.append(cv2.Laplacian(luma, cv2.CV_32F).var())
        saturations.append(np.ptp(frame, axis=-1).mean() / 255)
    return Measures(
        motion=float(np.mean(speeds)),
        dynamic=float(np.mean(fastest) > DYNAMIC_ABOVE),
        contrast=float(np.mean(contrasts)),
        saturation=float(np.mean(saturations)),
        sharpness=float(np.mean(sharpnesses)),
    )


def _shorter_side(grey: Any) -> Any:
    """A frame (H, W) with a shorter side of `MOTION_SIDE`."""
    height, width = grey.shape
    scale = MOTION_SIDE / min(height, width)
    size = (round(width * scale), round(height * scale))
    filtered = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(grey, size, interpolation=filtered)


def thumbnail(clip: Clip) -> Clip:
    """What `variety` compares: (16, 32, 32, 3), of a clip of any size."""
    chosen = np.linspace(0, len(clip) - 1, _THUMBNAIL_FRAMES).round().astype(int)
    size = (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE)
    return np.stack([cv2.resize(clip[i], size, interpolation=cv2.INTER_AREA) for i in chosen])


def variety(thumbnails: Sequence[Clip]) -> float | None:
    """Root mean square difference of thumbnails, mean over all pairs; 0 to 255, None for one."""
    distances = [
        np.sqrt(np.square(a.astype(np.float64) - b).mean()) for a, b in combinations(thumbnails, 2)
    ]
    return float(np.mean(distances)) if distances else None


def preview(clip: Clip) -> Clip:
    """The clip with a shorter side of at most `MOTION_SIDE`, for a page."""
    _, height, width, _ = clip.shape
    scale = MOTION_SIDE / min(height, width)
    if scale >= 1:
        return clip
    size = (round(width * scale), round(height * scale))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in clip])
