"""Samples of the first frame rule that hold other pictures than their source shows.

For `wanprep verify`, which names them, and `wanprep encode`, which replaces them.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from rich.console import Console

from preprocess.dataset.recorded_clips import clip_of, same_content
from preprocess.frames.first_rule import wrong_sample
from preprocess.frames.media_info import Kind, MediaError, MediaKind
from preprocess.media.probing import Probed, probed
from preprocess.media.sources import MediaFile
from preprocess.media.worker_pool import WorkerPool
from shared.cli.console import bar
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader, Sidecar
from shared.format.fingerprint import has_first_frame_rule
from shared.format.schema import MEDIA_TYPES
from shared.io.hashing import FileHasher

# Fields of `KEY.json` by which a sample is judged; its caption may be long.
_JUDGED_BY = (
    *("type", "source", "frame_rule", "frame_indices", "fps"),
    *("source_width", "source_height"),
)


@dataclass(frozen=True, kw_only=True)
class OldSample:
    """A sample that was made under the first frame rule."""

    key: str
    source: str
    shard: str
    wrong: str | None = None
    """Why it does not hold what its source shows; None where it does."""
    unseen: str | None = None
    """Why its source could not be read."""


def rows_of_first_rule(index: CacheIndex, sidecars: list[Sidecar]) -> list[int]:
    """Rows of live samples with a media file in shards of the first frame rule."""
    old = {sidecar.shard for sidecar in sidecars if has_first_frame_rule(sidecar.fingerprint)}
    numbers = [number for number, shard in enumerate(index.shards) if shard in old]
    has_source = index.types != MEDIA_TYPES.index("text")
    return [int(row) for row in np.flatnonzero(np.isin(index.shard_ids, numbers) & has_source)]


def judged(
    index: CacheIndex,
    rows: list[int],
    media_of: Callable[[str], MediaFile | None],
    pool: WorkerPool,
    on_progress: Callable[[], None],
) -> Iterator[OldSample]:
    """Each of these samples, judged by its source as it is now; in no fixed order.

    `media_of` gives the media file of a source's name, None if it is to be ignored. Each file is
    opened once, and not at all if its probe is remembered.
    """
    by_source: dict[tuple[str, MediaKind], list[int]] = {}
    infos: dict[int, dict[str, Any]] = {}
    with closing(MemberReader(index)) as reader:
        for row in rows:
            info = reader.info(row)
            infos[row] = {name: info[name] for name in _JUDGED_BY if name in info}
            by_source.setdefault((str(info["source"]), info["type"]), []).append(row)

    unreachable: list[tuple[list[int], Exception]] = []
    media: list[tuple[list[int], MediaFile, Kind]] = []
    for (source, kind), its_rows in by_source.items():
        try:
            media_file = media_of(source)
        except (MediaError, UserError, OSError) as error:
            unreachable.append((its_rows, error))
            continue
        if media_file is not None:
            media.append((its_rows, media_file, kind))
        else:
            for _ in its_rows:
                on_progress()
    for its_rows, result in chain(unreachable, probed(media, FileHasher(), pool)):
        for row in its_rows:
            on_progress()
            yield _judged(index, row, infos[row], result)


def _judged(
    index: CacheIndex, row: int, info: dict[str, Any], result: Probed | Exception
) -> OldSample:
    shard = index.shards[int(index.shard_ids[row])]
    sample = OldSample(key=index.key(row), source=str(info["source"]), shard=shard)
    if isinstance(result, Exception):
        return replace(sample, unseen=str(result))
    probe, sha256 = result
    if not same_content({sample.key}, clip_of(index, row, info), sha256):
        return replace(sample, unseen=f"{sample.source}: its content is not what was encoded")
    return replace(sample, wrong=wrong_sample(info, probe, index.fingerprint.get("media", {})))


def superseded(
    index: CacheIndex,
    sidecars: list[Sidecar],
    media: Mapping[str, MediaFile],
    live: Collection[str],
    pool: WorkerPool,
    console: Console,
) -> dict[str, str]:
    """Key → source of samples whose place others take now: wrong ones, and no more `live`.

    `media`: what the dataset has, by source; of others nothing is said.
    """
    rows = [row for row in rows_of_first_rule(index, sidecars) if index.key(row) not in live]
    with bar(console, "checking old samples", len(rows)) as advance:
        found = judged(index, rows, media.get, pool, advance)
        return {sample.key: sample.source for sample in found if sample.wrong is not None}
