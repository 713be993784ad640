"""What a cache holds, in numbers: from `index.zarr` and the sidecars, whatever its size.

Only durations and a few captions stand in `KEY.json` alone; those are read for a draw of samples.
"""

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import (
    INDEX,
    MANIFEST,
    MEDIA_TYPES,
    CacheIndex,
    MemberReader,
    Sidecar,
    committed_shards,
    committed_tombstones,
    open_cache,
)
from shared.format.columns import caption_digest
from shared.format.overlays import overlays_in, positions
from shared.format.schema import MEMBERS, seconds_of
from shared.format.tar import BLOCK, room
from shared.io.store import Store
from shared.pages.axis import nice_step

MOST_READ = 2000
"""Samples whose `KEY.json` is read for the durations."""
SHORT_TOKENS = 4
"""A caption of so few tokens, its end included, says next to nothing."""
_RECORD = 20 * BLOCK  # a tar's end is filled up to a multiple of it


@dataclass(frozen=True, kw_only=True)
class BucketRow:
    """Samples of one shape."""

    bucket: Bucket
    samples: int
    epoch: int
    """Samples that an epoch shows: repeats counted."""
    tokens: float
    """Mean number of text tokens."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Captions:
    """What the captions are like; all samples are counted."""

    distinct: int
    empty: int
    short: int
    """Of at most `SHORT_TOKENS` tokens, the empty ones included."""
    at_token_limit: int
    """As long as the text encoder reads, so perhaps truncated there."""
    longest: int
    """Tokens."""
    most_common: str | None
    """The caption that most samples have; None where all differ."""
    most_common_samples: int


@dataclass(frozen=True, kw_only=True)
class OverlayRow:
    """Captions or conditions beside the cache."""

    name: str
    samples: int
    lacking: int
    """Samples of the cache that it has nothing for."""
    orphans: int
    """Samples that the cache has no more."""
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Overview:
    """A cache in numbers."""

    index: CacheIndex
    samples: int
    epoch: int
    types: dict[str, int]
    shards: int
    buckets: tuple[BucketRow, ...]
    tokens: npt.NDArray[np.int32]
    """(N) text tokens of every sample."""
    seconds: npt.NDArray[np.float64]
    """Durations of the videos that were read."""
    seconds_of: int
    """Videos in the cache; more than were read where there are many."""
    bytes: dict[str, int]
    """Component → bytes; their sum is what the tars, sidecars and the index take."""
    dead: int
    """Samples that were removed or replaced."""
    dead_bytes: int
    """What `wanprep compact` would free."""
    tombstones: int
    """Keys in lists of removed samples."""
    captions: Captions
    overlays: tuple[OverlayRow, ...]


def overview(store: Store, *, seed: int) -> Overview:
    """Look a cache over. Raises UserError where it has no index, or a damaged one."""
    index = open_cache(store)
    sidecars = committed_shards(store.folder)
    dead, dead_bytes = _dead(index, sidecars)
    seconds, videos = _seconds(index, seed)
    repeats = index.repeats.astype(np.int64)
    return Overview(
        index=index,
        samples=len(index),
        epoch=int(repeats.sum()),
        types={name: int((index.types == number).sum()) for number, name in enumerate(MEDIA_TYPES)},
        shards=len(sidecars),
        buckets=_buckets(index, repeats),
        tokens=index.tokens,
        seconds=seconds,
        seconds_of=videos,
        bytes=_bytes(index, sidecars, dead_bytes),
        dead=dead,
        dead_bytes=dead_bytes,
        tombstones=sum(len(removed.keys) for removed in committed_tombstones(store.folder)),
        captions=_captions(index),
        overlays=tuple(_overlay(index, overlay) for overlay in overlays_in(store)),
    )


def _buckets(index: CacheIndex, repeats: npt.NDArray[np.int64]) -> tuple[BucketRow, ...]:
    size = len(index.buckets)
    samples = np.bincount(index.bucket_ids, minlength=size)

    def summed(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.bincount(index.bucket_ids, weights=values, minlength=size)

    epoch, tokens, bytes_ = summed(repeats), summed(index.tokens), summed(index.lengths.sum(axis=1))
    return tuple(
        BucketRow(
            bucket=bucket,
            samples=int(samples[n]),
            epoch=int(epoch[n]),
            tokens=float(tokens[n] / max(samples[n], 1)),
            bytes=int(bytes_[n]),
        )
        for n, bucket in enumerate(index.buckets)
    )


def _dead(index: CacheIndex, sidecars: Sequence[Sidecar]) -> tuple[int, int]:
    """Dead samples, and the bytes that shards with any would lose by being written again."""
    size = len(index.shards)
    alive = np.bincount(index.shard_ids, minlength=size)
    # (N) bytes of each sample in its tar: headers, and members filled up to blocks.
    padded = np.where(index.lengths > 0, room(index.lengths), 0).sum(axis=1)
    live = np.bincount(index.shard_ids, weights=padded, minlength=size)
    numbers = {name: n for n, name in enumerate(index.shards)}
    dead = freed = 0
    for sidecar in sidecars:
        number = numbers.get(sidecar.shard)
        if number is not None and alive[number] < sidecar.count:
            dead += sidecar.count - int(alive[number])
            again = -(-(int(live[number]) + 2 * BLOCK) // _RECORD) * _RECORD
            freed += sidecar.bytes - (again if alive[number] else 0)
    return dead, freed


def _bytes(index: CacheIndex, sidecars: Sequence[Sidecar], dead_bytes: int) -> dict[str, int]:
    members = index.lengths.sum(axis=0)
    found = {
        member.partition(".")[0]: int(total)
        for member, total in zip(MEMBERS, members, strict=True)
        if total
    }
    folder = index.folder
    tars = sum(sidecar.bytes for sidecar in sidecars if sidecar.kind == "samples")
    found["tar headers"] = tars - int(members.sum()) - dead_bytes
    if dead_bytes:
        found["dead"] = dead_bytes
    found["prompts"] = sum(sidecar.bytes for sidecar in sidecars if sidecar.kind == "prompts")
    derived = [folder / MANIFEST, *(folder / INDEX).rglob("*"), *folder.glob("*-w*.json")]
    found["index, sidecars"] = sum(path.stat().st_size for path in derived if path.is_file())
    return found


def _seconds(index: CacheIndex, seed: int) -> tuple[npt.NDArray[np.float64], int]:
    videos = np.flatnonzero(index.types == MEDIA_TYPES.index("video"))
    chosen = videos
    if len(videos) > MOST_READ:
        chosen = np.random.default_rng(seed).choice(videos, MOST_READ, replace=False)
    with closing(MemberReader(index)) as reader:
        found = [seconds_of(reader.info(int(row))) for row in index.as_on_disk(chosen)]
    return np.asarray([one for one in found if one is not None], dtype=np.float64), len(videos)


def _captions(index: CacheIndex) -> Captions:
    empty = np.frombuffer(caption_digest(""), dtype=np.uint8)
    _, first, times = np.unique(
        np.ascontiguousarray(index.captions), axis=0, return_index=True, return_counts=True
    )
    most = int(times.argmax()) if len(times) else 0
    common, common_samples = None, int(times[most]) if len(times) else 0
    if common_samples > 1:
        with closing(MemberReader(index)) as reader:
            common = reader.info(int(first[most]))["caption"]
    limit = int(index.fingerprint.get("text", {}).get("max_length", 0))
    return Captions(
        distinct=len(times),
        empty=int((index.captions == empty).all(axis=1).sum()),
        short=int((index.tokens <= SHORT_TOKENS).sum()),
        at_token_limit=int((index.tokens >= limit).sum()) if limit else 0,
        longest=int(index.tokens.max(initial=0)),
        most_common=common,
        most_common_samples=common_samples,
    )


def _overlay(index: CacheIndex, overlay: Store) -> OverlayRow:
    name = overlay.folder.relative_to(index.folder).as_posix()
    bytes_ = sum(sidecar.bytes for sidecar in committed_shards(overlay.folder))
    try:
        there = open_cache(overlay)
    except UserError:  # verify says what is wrong
        return OverlayRow(name=name, samples=0, lacking=len(index), orphans=0, bytes=bytes_)
    return OverlayRow(
        name=name,
        samples=len(there),
        lacking=int((positions(index.keys, there.keys) < 0).sum()),
        orphans=int((positions(there.keys, index.keys) < 0).sum()),
        bytes=bytes_,
    )


def drawn_across_buckets(index: CacheIndex, count: int, *, seed: int) -> list[int]:
    """Up to `count` rows, one of each bucket in turn, drawn by the seed."""
    random = np.random.default_rng(seed)
    waiting = [
        map(int, random.permutation(np.flatnonzero(index.bucket_ids == number))[::-1])
        for number in range(len(index.buckets))
    ]
    in_turns = chain.from_iterable(zip_longest(*waiting))
    chosen = islice((row for row in in_turns if row is not None), count)
    return sorted(chosen, key=lambda row: (int(index.bucket_ids[row]), index.key(row)))


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Numbers of values between edges."""

    edges: tuple[float, ...]
    """One more than `counts`."""
    counts: tuple[int, ...]


def histogram(values: Sequence[float] | npt.NDArray[Any], *, bins: int = 12) -> Histogram:
    """At most about `bins` bins of round width from 0, or from near the lowest value."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Histogram(edges=(0.0, 1.0), counts=(0,))
    whole = bool((array == np.floor(array)).all())
    low, high = float(array.min()), float(array.max())
    low = 0.0 if low < high / 2 else low
    step = nice_step(high - low or max(high, 1) / 2, bins)
    step = max(1.0, step) if whole else step
    first = math.floor(low / step)
    last = math.floor(high / step) + 1
    edges = np.arange(first, last + 1) * step
    counts, _ = np.histogram(array, bins=edges)
    return Histogram(edges=tuple(map(float, edges)), counts=tuple(map(int, counts)))
