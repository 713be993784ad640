"""How one of several datasets is cut, where it says so itself instead of the command line."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from preprocess.dataset.clips import Clip, ClipRule, caption_clips, choose_clips
from preprocess.frames.media_info import MediaError, Probe
from preprocess.frames.picks import picks_of
from shared.format.buckets import bucket_size

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
    """What a dataset says; the rest is as the command line says."""

    own: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Fields of `ClipRule`."""
    resolutions: tuple[Resolution | int, ...] = ()
    """Sizes of images and videos, in place of those in `own`; a sample in each of them."""
    lengths: tuple[int, ...] = ()
    """Frames that a video may have, ascending, in place of `frames`; a shorter one is rejected."""
    every_length: bool = False
    """A clip of each of the `lengths` that the video has, not only of the longest."""

    def clips(self, probe: Probe, sha256: str, rule: ClipRule) -> tuple[Clip, ...]:
        """The clips of a media file, each once, by `rule` where this says nothing.

        Raises MediaError where nothing can be cut out.
        """
        return self._each(rule, probe, lambda one: choose_clips(probe, sha256, one))

    def caption_clips(
        self, sha256: str, rule: ClipRule, *, shape: tuple[int, int] | None, frames: int | None
    ) -> tuple[Clip, ...]:
        """The buckets of a text-only caption; see `preprocess.dataset.clips`."""
        return self._each(
            rule, None, lambda one: caption_clips(sha256, one, shape=shape, frames=frames)
        )

    def _each(
        self, rule: ClipRule, probe: Probe | None, choose: Callable[[ClipRule], tuple[Clip, ...]]
    ) -> tuple[Clip, ...]:
        """The clips of every size and length, each once."""
        rules = (one for sized in self._sized(rule) for one in self._long(sized, probe))
        return tuple(dict.fromkeys(clip for one in rules for clip in choose(one)))

    def _sized(self, rule: ClipRule) -> Iterator[ClipRule]:
        own = replace(rule, **self.own)
        # What the command line says in another way must not outlive what the dataset says.
        own = replace(own, fps=self.own.get("fps", None if "stride" in self.own else rule.fps))
        if self.resolutions or {"image_size", "video_size"} & self.own.keys():
            own = replace(own, fixed_size=self.own.get("fixed_size"))
        for one in self.resolutions:
            size = one if isinstance(one, int) else one.size(rule.multiple)
            yield replace(own, image_size=size, video_size=size)
        if not self.resolutions:
            yield own

    def _long(self, rule: ClipRule, probe: Probe | None) -> Iterator[ClipRule]:
        """A rule for each length of the file's clips; `probe` None: text-only, so of any length."""
        if not self.lengths or (probe is not None and probe.type == "image"):
            yield rule
            return
        fitting = self.lengths
        if probe is not None:
            picks = picks_of(probe, stride=rule.stride, fps=rule.fps)
            there = picks.reachable()
            fitting = tuple(length for length in self.lengths if length <= there)
            if not fitting:
                raise MediaError(
                    f"{probe.frames} frames at stride {picks.step:g}: fewer than "
                    f"{self.lengths[0]}, the least that its dataset asks for"
                )
        for frames in fitting if self.every_length else fitting[-1:]:
            yield replace(rule, frames=frames)
