"""Which size a sample may have, and how many frames fit a budget of tokens. Pure, no draws.

The seed document's `random_hw_adapt`, `training_with_video_token_length` and `random_ratio_crop`,
with the numbers of VideoX-Fun's trainers where the document gives a range only.
"""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # options are made of this module's values, and a help page needs no numpy
    from preprocess.frames.media_info import MediaKind

Clips = Literal["first", "random", "uniform", "chunk"]
"""Where in a video its clips are taken."""

# The smallest size whose base bucket still gives a few latents a side; the largest that Wan knows
# is 960 (720P), and four times that is a typing error.
SMALLEST_SIZE, LARGEST_SIZE = 32, 4096

# random_hw_adapt divides a size by one of these; how many of them depends on the size, so that
# none comes out below 512.
_RATIOS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
_RATIOS_FROM = ((1536, 6), (1024, 4), (768, 3))

TOKEN_STEP = 128
"""Pixels between the sizes that a token budget is tried at."""
MOST_UPSCALED = 1.25
"""How much larger than the mean side of a video its size may be drawn."""

# random_ratio_crop: ((height, width) at 512, how often), from 1:2.4 to 2.4:1.
RATIO_CROPS: tuple[tuple[tuple[int, int], int], ...] = (
    ((320, 768), 1), ((352, 704), 2),
    ((384, 672), 4), ((416, 608), 4), ((448, 576), 4), ((480, 544), 4),
    ((480, 512), 8), ((512, 512), 8), ((512, 480), 8),
    ((544, 480), 4), ((576, 448), 4), ((608, 416), 4), ((672, 384), 4),
    ((704, 352), 2), ((768, 320), 1),
)  # fmt: skip


def adapted_sizes(kind: "MediaKind", *, image_size: int, video_size: int) -> tuple[int, ...]:
    """Sizes under random_hw_adapt without a token budget, that of its kind of media first.

    Videos: `video_size` down to min(video_size, 512). Images: `image_size` down to the same.
    """
    own = image_size if kind == "image" else video_size
    number = next((count for least, count in _RATIOS_FROM if own >= least), 1)
    sizes = [int(own / ratio) for ratio in _RATIOS[:number]]
    if kind == "image" and video_size < image_size:
        sizes.append(video_size)
    return tuple(dict.fromkeys(sizes))


def adapted_weights(sizes: int) -> tuple[int, ...]:
    """How often each is drawn: the first in three quarters of draws, the others alike."""
    return (1,) if sizes == 1 else (3 * (sizes - 1), *[1] * (sizes - 1))


def token_sizes(
    kind: "MediaKind",
    *,
    image_size: int,
    video_size: int,
    source: tuple[int, int],
) -> tuple[int, ...]:
    """Sizes under random_hw_adapt with a token budget: `video_size` to `image_size`, both included.

    Of a video (height, width) `source` not those above 1.25 times its mean side; if all are, the
    smallest.
    """
    if image_size <= video_size:
        return (image_size if kind == "image" else video_size,)
    sizes = (*range(video_size, image_size, TOKEN_STEP), image_size)
    if kind == "image":
        return sizes
    limit = MOST_UPSCALED * sum(source) / 2
    return tuple(size for size in sizes if size < limit) or sizes[:1]


def budget_frames(size: int, *, frames: int, token_size: int, temporal_stride: int = 4) -> int:
    """Most frames at `size` whose tokens are not more than those of `frames` at `token_size`.

    4n+1, at least 1, never more than `frames`: 49 at 512 are 21 at 768 and 9 at 1024.
    """
    within = min(frames, frames * token_size**2 // size**2)
    return max(0, within - 1) // temporal_stride * temporal_stride + 1
