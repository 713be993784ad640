"""The clips of a media file: which frames, which bucket; the bucket of a text-only sample. No I/O.

The rule of the design brief, sections 2 and 3: frames at a stride or a frame rate, 4n+1 of them,
from a start drawn from the seed and the file's content; resized to cover its bucket (bilinear,
antialiased, in uint8) and centre-cropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from preprocess.dataset.draws import Draws
from preprocess.dataset.sizes import (
    RATIO_CROPS,
    Clips,
    adapted_sizes,
    adapted_weights,
    budget_frames,
    token_sizes,
)
from preprocess.frames.media_info import MediaError, MediaKind, Probe
from preprocess.frames.picks import Picks, picks_of
from shared.format.buckets import BASE_BUCKETS, BASE_SIZE, Bucket, nearest_base, scaled_size

RESIZE_RULE = "cover, PIL bilinear (antialiased, uint8), centre crop"

# The table ends at 4:1. Far beyond it hardly anything of the picture survives the crop, and the
# resized strip (as long as the ratio says) would eat the memory.
MOST_EXTREME_RATIO = 16


@dataclass(frozen=True, kw_only=True)
class ClipRule:
    """The settings that decide which pixels become a sample."""

    image_size: int
    video_size: int
    stride: int
    """Every stride-th source frame is taken."""
    frames: int
    """Most frames of a clip, 4n+1."""
    seed: int
    multiple: int
    """Both sides of a bucket are multiples of this many pixels."""
    temporal_stride: int
    """Pixel frames per latent frame."""
    fps: float | None = None
    """Frames a second that are taken, nearest in time, in place of every stride-th."""
    token_budget: bool = False
    """Shorten clips until they have no more tokens than `frames` at `token_size`."""
    token_size: int = BASE_SIZE
    adapt: bool = False
    """Draw the size (random_hw_adapt)."""
    buckets: bool = True
    """False: a square of the size, whatever the media file's shape."""
    fixed_size: tuple[int, int] | None = None
    """(height, width) of every sample, in place of sizes, budget and buckets."""
    ratio_crop: bool = False
    """Draw the aspect ratio instead of taking the nearest."""
    clips: Clips = "random"
    clips_per_video: int = 1
    """How many, where `clips` is random or uniform."""
    variants: int = 1
    """How often all that is drawn is drawn."""

    def sides(self, size: int, base: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """(height, width) at this size of the bucket that `base` gives, if that is asked."""
        if self.fixed_size is not None:
            height, width = (side // self.multiple * self.multiple for side in self.fixed_size)
            return height, width
        square = (BASE_SIZE, BASE_SIZE)
        return scaled_size(base() if self.buckets else square, size, self.multiple)

    def most_frames(self, size: int) -> int:
        """Of a clip of this size."""
        if not self.token_budget or self.fixed_size is not None:
            return self.frames
        return budget_frames(
            size,
            frames=self.frames,
            token_size=self.token_size,
            temporal_stride=self.temporal_stride,
        )

    def token_size_of(self, kind: MediaKind, source: tuple[int, int], draws: Draws) -> int:
        """A drawn size of a media file of (height, width) `source`, under a token budget."""
        sizes = token_sizes(
            kind, image_size=self.image_size, video_size=self.video_size, source=source
        )
        return sizes[draws.uniform(len(sizes), "size")]


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A window in time and the bucket that it is fitted to."""

    bucket: Bucket
    frame_indices: tuple[int, ...]
    """Empty for a text-only sample."""
    frame_rule: int = 1
    """2: of a file of which the first frame rule may have read other pictures."""
    asked: int = field(default=1, compare=False)
    """Frames that it would have, were the source long enough."""

    def transform(self) -> dict[str, Any]:
        """What, beside the media's bytes, decides the pixels; enters the sample's key."""
        size = [self.bucket.height, self.bucket.width]
        frames = list(self.frame_indices) or self.bucket.frames  # the latter if text-only
        rule = {} if self.frame_rule == 1 else {"frame_rule": self.frame_rule}
        return {"size": size, "frames": frames, **rule}


def choose_clips(probe: Probe, sha256: str, rule: ClipRule) -> tuple[Clip, ...]:
    """The clips of a media file whose content has the hex digest `sha256`, each once.

    A pure function of its arguments, so every machine chooses the same. Raises MediaError where
    nothing can be cut out.
    """
    ratio = max(probe.height, probe.width) / min(probe.height, probe.width)
    if ratio > MOST_EXTREME_RATIO:
        raise MediaError(
            f"{probe.width}x{probe.height} pixels: a side ratio over {MOST_EXTREME_RATIO}:1"
        )
    variants = (Draws(seed=rule.seed, sha256=sha256, variant=n) for n in range(rule.variants))
    drawn = (clip for draws in variants for clip in _variant(probe, draws, rule))
    return tuple(dict.fromkeys(drawn))


def _variant(probe: Probe, draws: Draws, rule: ClipRule) -> Iterator[Clip]:
    size = _size(probe, draws, rule)
    height, width = rule.sides(size, lambda: _base(probe, draws, rule))
    frame_rule = 1 if probe.old_reading is None else 2
    if probe.type == "image":
        bucket = Bucket(height, width, 1)
        yield Clip(bucket=bucket, frame_indices=(0,), frame_rule=frame_rule)
        return
    asked = rule.most_frames(size)
    picks = picks_of(probe, stride=rule.stride, fps=rule.fps)
    for indices in _windows(picks, asked, draws, rule):
        bucket = Bucket(height, width, len(indices))
        yield Clip(bucket=bucket, frame_indices=indices, frame_rule=frame_rule, asked=asked)


def _size(probe: Probe, draws: Draws, rule: ClipRule) -> int:
    kind = probe.type
    own = rule.image_size if kind == "image" else rule.video_size
    if not rule.adapt:
        return own
    if rule.token_budget:
        return rule.token_size_of(kind, (probe.height, probe.width), draws)
    sizes = adapted_sizes(kind, image_size=rule.image_size, video_size=rule.video_size)
    return sizes[draws.weighted(adapted_weights(len(sizes)), "size")]


def _base(probe: Probe, draws: Draws, rule: ClipRule) -> tuple[int, int]:
    """(height, width) of the base bucket."""
    if not rule.ratio_crop:
        return nearest_base(probe.height, probe.width)
    base, _ = RATIO_CROPS[draws.weighted([often for _, often in RATIO_CROPS], "ratio")]
    return base


def caption_clips(
    sha256: str, rule: ClipRule, *, shape: tuple[int, int] | None, frames: int | None
) -> tuple[Clip, ...]:
    """The buckets of a text-only caption, each once; its UTF-8 has the hex digest `sha256`.

    VideoX-Fun's trainers draw them for every batch from all aspect ratios alike; here they are
    drawn once, from the seed and the caption, so that a cache is the same wherever it is made.
    `shape`: (height, width) of a media file that it would fit, whose bucket it then gets; `frames`:
    how many that would have at most.
    """
    variants = (Draws(seed=rule.seed, sha256=sha256, variant=n) for n in range(rule.variants))
    return tuple(dict.fromkeys(_of_caption(draws, rule, shape, frames) for draws in variants))


def _of_caption(
    draws: Draws, rule: ClipRule, shape: tuple[int, int] | None, frames: int | None
) -> Clip:
    def base() -> tuple[int, int]:
        if shape is not None:
            return nearest_base(*shape)
        return BASE_BUCKETS[draws.uniform(len(BASE_BUCKETS), "caption bucket")]

    size = rule.video_size
    if rule.adapt and rule.token_budget:
        size = rule.token_size_of("image", (0, 0), draws)
    most = rule.most_frames(size)
    count = _longest(min(most, frames or most), rule.temporal_stride)
    return Clip(bucket=Bucket(*rule.sides(size, base), count), frame_indices=(), asked=count)


def _longest(frames: int, temporal_stride: int) -> int:
    """The largest 4n+1 of so many frames, which are at least one."""
    return (frames - 1) // temporal_stride * temporal_stride + 1


def _windows(picks: Picks, asked: int, draws: Draws, rule: ClipRule) -> Iterator[tuple[int, ...]]:
    """Source frames of each clip, ascending."""
    there = picks.reachable()
    frames = _longest(min(asked, there), rule.temporal_stride)
    if rule.clips == "chunk":
        # The rest is dropped, unless there is nothing else.
        for first in range(0, max(1, there // asked) * frames, frames):
            yield tuple(picks.at(number) for number in range(first, first + frames))
        return
    places = picks.starts(frames)
    for number in range(1 if rule.clips == "first" else rule.clips_per_video):
        start = 0
        if rule.clips == "random":
            start = draws.uniform(places, "clip start" + (f" {number}" if number else ""))
        elif rule.clips == "uniform":
            gaps = rule.clips_per_video - 1
            start = (places - 1) * number // gaps if gaps else (places - 1) // 2
        yield tuple(picks.at(number, start) for number in range(frames))
