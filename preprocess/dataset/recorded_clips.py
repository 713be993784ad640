"""The clip that a committed sample was made of, as its `KEY.json` records it."""

from collections.abc import Mapping
from typing import Any

from preprocess.dataset.clips import Clip
from shared.format.cache import CacheIndex
from shared.format.schema import sample_key

# A key is a digest of content and of a caption's ordinal, which has to be tried. Today's are below
# `preprocess.encode.work.MOST_CAPTIONS`; the first caches had no limit.
ORDINALS_TRIED = 1000


def clip_of(index: CacheIndex, row: int, info: Mapping[str, Any]) -> Clip:
    """The clip that a sample was made of, by its `KEY.json`."""
    return Clip(
        bucket=index.buckets[int(index.bucket_ids[row])],
        frame_indices=tuple(info["frame_indices"]),
        frame_rule=int(info.get("frame_rule", 1)),
    )


def same_content(keys: set[str], clip: Clip, sha256: str) -> bool:
    """Whether all `keys` are of this clip of the file with this digest."""
    transform = clip.transform()
    for ordinal in range(ORDINALS_TRIED):
        keys = keys - {sample_key(sha256, transform, ordinal)}
        if not keys:
            return True
    return False
