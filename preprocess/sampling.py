"""How one of several datasets is cut, where it says so itself instead of the command line."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from preprocess.clips import Clip, ClipRule, choose_clip
from preprocess.media import MediaError, Probe
from shared.buckets import bucket_size, frame_count

_NAMED_STEP = 160


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """(width, height) that a dataset names, in pixels."""

    width: int
    height: int

    def size(self, multiple: int) -> int:
        """The size whose bucket of this ratio is this resolution, or has about its area.

        [832, 480] is size 640, as people call it; the root of its area, 632, would give 816x464.
        """
        root = round(math.sqrt(self.width * self.height))
        # Of several, the one that people name: 320, 480, 640, 960.
        around = range(root - root // 8, root + root // 8 + 1)
        near = sorted(around, key=lambda s: (s % _NAMED_STEP != 0, abs(s - root)))
        wanted = (self.height, self.width)
        exact = (s for s in near if bucket_size(*wanted, size=s, multiple=multiple) == wanted)
        return next(exact, root)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a dataset says; None: as the command line says."""

    image_size: int | None = None
    video_size: int | None = None
    resolutions: tuple[Resolution | int, ...] = ()
    """Sizes of images and videos, in place of the two above; a sample in each of them."""
    stride: int | None = None
    frames: int | None = None
    lengths: tuple[int, ...] = ()
    """Frames that a video may have, ascending, in place of `frames`; a shorter one is rejected."""
    every_length: bool = False
    """A clip of each of the `lengths` that the video has, not of the longest alone."""

    def clips(
        self, probe: Probe, kind: Literal["video", "image"], sha256: str, rule: ClipRule
    ) -> tuple[Clip, ...]:
        """The clips of a medium, each once, by `rule` where this says nothing.

        Raises MediaError where nothing can be cut out.
        """
        return tuple(
            dict.fromkeys(
                choose_clip(probe, kind, sha256, one)
                for sized in self._sized(rule)
                for one in self._long(sized, probe, kind)
            )
        )

    def _sized(self, rule: ClipRule) -> Iterator[ClipRule]:
        given = {
            "image_size": self.image_size,
            "video_size": self.video_size,
            "stride": self.stride,
            "frames": self.frames,
        }
        own = replace(rule, **{name: value for name, value in given.items() if value is not None})
        for one in self.resolutions:
            size = one if isinstance(one, int) else one.size(rule.multiple)
            yield replace(own, image_size=size, video_size=size)
        if not self.resolutions:
            yield own

    def _long(
        self, rule: ClipRule, probe: Probe, kind: Literal["video", "image"]
    ) -> Iterator[ClipRule]:
        if kind == "image" or not self.lengths:
            yield rule
            return
        step = {"stride": rule.stride, "temporal_stride": rule.temporal_stride}
        fitting = [n for n in self.lengths if frame_count(probe.frames, wanted=n, **step) == n]
        if not fitting:
            raise MediaError(
                f"{probe.frames} frames at stride {rule.stride}: fewer than {self.lengths[0]}, the "
                "least that its dataset asks for"
            )
        for frames in fitting if self.every_length else fitting[-1:]:
            yield replace(rule, frames=frames)
