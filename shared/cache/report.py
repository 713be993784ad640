"""What a cache holds, in lines for a terminal."""

import numpy as np

from shared.cli.console import count
from shared.format.cache import CacheIndex
from shared.format.latent_rgb import R2_FLOOR, LatentRgb
from shared.format.schema import MEDIA_TYPES


def contents(index: CacheIndex) -> str:
    """What a cache holds, bucket by bucket."""
    lines = [f"{index.store}: {count(len(index), 'sample')} in {count(len(index.shards), 'shard')}"]
    samples = np.bincount(index.bucket_ids, minlength=len(index.buckets))
    text = index.bucket_ids[index.types == MEDIA_TYPES.index("text")]
    alone = np.bincount(text, minlength=len(index.buckets))
    for bucket, number, captions in zip(index.buckets, samples, alone, strict=True):
        length = "image" if bucket.frames == 1 else f"{bucket.frames} frames"
        which = f" ({captions} of them captions alone)" if captions else ""
        lines.append(f"  {bucket.width}x{bucket.height}, {length}: {number}{which}")
    return "\n".join(lines)


def preview(rgb: LatentRgb) -> str:
    """How good the latent → RGB map is."""
    fitted = f"latent → RGB map fitted to {count(rgb.samples, 'sample')}"
    if rgb.r2 is None:
        return f"{fitted}, none held out: R² unknown"
    line = f"{fitted}, R² {rgb.r2:.2f} on {rgb.held_out} held out"
    return line if rgb.r2 >= R2_FLOOR else f"{line}; WARNING: below {R2_FLOOR}, previews mislead"
