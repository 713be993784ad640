"""What is cut out of a medium: which frames, which bucket, and the pixels. No I/O.

The rule of the design brief, sections 2 and 3: every stride-th frame, 4n+1 of them, from a start
drawn from the seed and the file's content; resized to cover its bucket (bilinear, antialiased, in
uint8) and centre-cropped.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocess.media import Frame, MediaError, Probe
from shared.buckets import Bucket, bucket_size, frame_count
from shared.resize import fit_to

RESIZE_RULE = "cover, PIL bilinear (antialiased, uint8), centre crop"
FRAME_RULE = "every stride-th frame, largest 4n+1, start uniform by SHA-256 of seed and content"

# The table ends at 4:1. Far beyond it hardly anything of the picture survives the crop, and the
# resized strip (as long as the ratio says) would eat the memory.
MOST_EXTREME_RATIO = 16


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """The settings that decide which pixels become a sample."""

    image_size: int
    video_size: int
    stride: int
    frames: int
    seed: int
    multiple: int
    """Both sides of a bucket are multiples of this many pixels."""
    temporal_stride: int
    """Pixel frames per latent frame."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A window in time and the bucket that it is fitted to."""

    bucket: Bucket
    frame_indices: tuple[int, ...]

    def transform(self) -> dict[str, Any]:
        """What, beside the media's bytes, decides the pixels; enters the sample's key."""
        size = [self.bucket.height, self.bucket.width]
        return {"size": size, "frames": list(self.frame_indices)}


def choose_clip(probe: Probe, kind: Literal["video", "image"], sha256: str, rule: ClipRule) -> Clip:
    """The clip of a medium whose content has the hex digest `sha256`.

    A pure function of its arguments, so every machine chooses the same. Raises MediaError where
    nothing can be cut out.
    """
    ratio = max(probe.height, probe.width) / min(probe.height, probe.width)
    if ratio > MOST_EXTREME_RATIO:
        raise MediaError(
            f"{probe.width}x{probe.height} pixels: a side ratio over {MOST_EXTREME_RATIO}:1"
        )
    size = rule.video_size if kind == "video" else rule.image_size
    height, width = bucket_size(probe.height, probe.width, size=size, multiple=rule.multiple)
    if kind == "image":
        return Clip(bucket=Bucket(height, width, 1), frame_indices=(0,))
    frames = frame_count(
        probe.frames,
        wanted=rule.frames,
        stride=rule.stride,
        temporal_stride=rule.temporal_stride,
    )
    span = (frames - 1) * rule.stride + 1
    start = _uniform(probe.frames - span + 1, f"{rule.seed}:{sha256}:clip start")
    return Clip(
        bucket=Bucket(height, width, frames),
        frame_indices=tuple(range(start, start + span, rule.stride)),
    )


def _uniform(choices: int, seed: str) -> int:
    """A draw from 0..choices-1. 256 bits leave the modulo no bias, and no library can change it."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest(), "big") % choices


def fit(frames: Iterable[Frame], bucket: Bucket) -> npt.NDArray[np.uint8]:
    """Resize and crop frames of one size to a bucket: (F, height, width, 3) uint8."""
    images = (fit_to(Image.fromarray(frame), bucket.height, bucket.width) for frame in frames)
    fitted = np.stack([np.asarray(image) for image in images])
    assert fitted.shape == (bucket.frames, bucket.height, bucket.width, 3)
    return fitted
