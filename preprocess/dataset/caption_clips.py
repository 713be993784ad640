"""Which bucket a caption without a medium gets. Pure.

VideoX-Fun's trainers draw it for every batch from all aspect ratios alike; here it is drawn once,
from the seed and the caption, so that a cache is the same wherever it is made.
"""

from preprocess.dataset.clips import Clip, ClipRule
from preprocess.dataset.draws import Draws
from preprocess.dataset.sizes import budget_frames, token_sizes
from shared.format.buckets import BASE_BUCKETS, BASE_SIZE, Bucket, nearest_base, scaled_size


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
    size, longest = rule.video_size, rule.frames
    if rule.fixed_size is not None:
        height, width = (side // rule.multiple * rule.multiple for side in rule.fixed_size)
    else:
        if rule.adapt and rule.token_budget:
            both = {"image_size": rule.image_size, "video_size": rule.video_size}
            sizes = token_sizes("image", **both, source=(0, 0))
            size = sizes[draws.uniform(len(sizes), "size")]
        if rule.token_budget:
            longest = budget_frames(
                size,
                frames=longest,
                token_size=rule.token_size,
                temporal_stride=rule.temporal_stride,
            )
        if not rule.buckets:
            base = (BASE_SIZE, BASE_SIZE)
        elif shape is not None:
            base = nearest_base(*shape)
        else:
            base = BASE_BUCKETS[draws.uniform(len(BASE_BUCKETS), "caption bucket")]
        height, width = scaled_size(base, size, rule.multiple)
    count = min(longest, frames or longest)
    count = (count - 1) // rule.temporal_stride * rule.temporal_stride + 1
    return Clip(bucket=Bucket(height, width, count), frame_indices=(), asked=count)
