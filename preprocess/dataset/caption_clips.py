"""Which bucket a caption without a medium gets. Pure.

VideoX-Fun's trainers draw it for every batch from all aspect ratios alike; here it is drawn once,
from the seed and the caption, so that a cache is the same wherever it is made.
"""

from preprocess.dataset.clips import Clip, ClipRule, longest
from preprocess.dataset.draws import Draws
from shared.format.buckets import BASE_BUCKETS, Bucket, nearest_base


def caption_clips(
    sha256: str, rule: ClipRule, *, shape: tuple[int, int] | None, frames: int | None
) -> tuple[Clip, ...]:
    """The buckets of a caption whose UTF-8 has the hex digest `sha256`, each once, without frames.

    `shape`: (height, width) of a medium that it would fit, whose bucket it then gets; `frames`:
    how many that would have at most.
    """
    variants = (Draws(seed=rule.seed, sha256=sha256, variant=n) for n in range(rule.variants))
    return tuple(dict.fromkeys(_drawn(draws, rule, shape, frames) for draws in variants))


def _drawn(draws: Draws, rule: ClipRule, shape: tuple[int, int] | None, frames: int | None) -> Clip:
    def base() -> tuple[int, int]:
        if shape is not None:
            return nearest_base(*shape)
        return BASE_BUCKETS[draws.uniform(len(BASE_BUCKETS), "caption bucket")]

    size = rule.video_size
    if rule.adapt and rule.token_budget:
        size = rule.token_size_of("image", (0, 0), draws)
    most = rule.most_frames(size)
    count = longest(min(most, frames or most), rule.temporal_stride)
    return Clip(bucket=Bucket(*rule.sides(size, base), count), frame_indices=(), asked=count)
