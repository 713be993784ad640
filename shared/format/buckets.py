"""Which shapes samples have: aspect buckets.

Sizes here are pixels, (height, width); frames are counted in pixels' time (4n+1), not in latents.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from shared.format.strict_json import is_count

SIDES = ("height", "width", "frames")
_LONGEST_SIDE = 1 << 20

BASE_SIZE = 512
# [height, width] at BASE_SIZE; the transposed ones are added below. The aspect table that
# trainers of Wan use, so that caches mix with what people know (design brief, section 3).
_LANDSCAPE = (
    (256, 1024), (256, 992), (256, 960), (256, 928), (288, 896), (288, 864), (288, 832),
    (320, 800), (320, 768), (352, 736), (352, 704), (352, 672), (384, 672), (384, 640),
    (416, 608), (416, 576), (448, 576), (448, 544), (480, 544), (480, 512), (512, 512),
)  # fmt: skip
BASE_BUCKETS = _LANDSCAPE + tuple((w, h) for h, w in reversed(_LANDSCAPE) if h != w)


@dataclass(frozen=True, order=True)
class Bucket:
    """Samples of one shape: pixels high and wide, pixel frames (4n+1; 1 for images)."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"

    def latent_shape(self, channels: int, stride: tuple[int, int, int]) -> tuple[int, ...]:
        """(C, T, H, W) of the latents under a VAE of strides (t, h, w)."""
        time, high, wide = stride
        frames = (self.frames - 1) // time + 1
        return (channels, frames, self.height // high, self.width // wide)


def is_bucket(value: Any) -> bool:
    """Whether a parsed value is an object with the sides of a bucket."""
    return isinstance(value, dict) and all(
        is_count(value.get(side), least=1, most=_LONGEST_SIDE) for side in SIDES
    )


def bucket_of(value: Mapping[str, Any]) -> Bucket:
    """The bucket of an object that has its sides."""
    return Bucket(*(value[side] for side in SIDES))


@cache
def scaled_size(base: tuple[int, int], size: int, multiple: int) -> tuple[int, int]:
    """A base bucket at `size`: scaled by size/512, sides floored to `multiple` (at least one)."""

    def side(length: int) -> int:
        return max(multiple, length * size // BASE_SIZE // multiple * multiple)

    return side(base[0]), side(base[1])


@cache
def nearest_base(height: int, width: int) -> tuple[int, int]:
    """The base bucket of nearest aspect ratio by |log| distance, ties to the squarer one."""
    ratio = math.log(height / width)

    def distance(base: tuple[int, int]) -> tuple[float, float]:
        log_base = math.log(base[0] / base[1])
        # Rounded, so that a tie is a tie whatever the last bit of log() says.
        return round(abs(log_base - ratio), 9), abs(log_base)

    return min(BASE_BUCKETS, key=distance)


def bucket_size(height: int, width: int, *, size: int, multiple: int) -> tuple[int, int]:
    """(height, width) in pixels to which a `height`×`width` source is resized and cropped."""
    return scaled_size(nearest_base(height, width), size, multiple)
