"""From entries to work: content digests, clips, keys; the same clip of the same content once."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from preprocess.dataset.clips import Clip, ClipRule
from preprocess.dataset.entry import Entry
from preprocess.frames.media_info import Kind, MediaError, Probe, Shortcut
from preprocess.media.probing import Probed, probed
from preprocess.media.sources import MediaFile
from preprocess.media.worker_pool import WorkerPool
from shared.cache.rejected import Rejected
from shared.format.cache import CacheIndex
from shared.format.columns import caption_digest, hex_keys
from shared.format.schema import MediaType, SampleInfo, sample_key
from shared.io.hashing import FileHasher

MOST_CAPTIONS = 64
"""Captions of one clip: all lower ordinals are searched for one that is committed."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One clip to encode, with every caption that the dataset gives it."""

    entry: Entry
    """The first entry that brought the clip."""
    probe: Probe | None
    """None: text-only. Without what is needed only to choose the clip."""
    clip: Clip
    shortcut: Shortcut | None
    """Where decoding of the clip may begin, in a long video."""
    samples: tuple[tuple[str, str], ...]
    """(key, caption), in order of appearance."""
    repeats: int
    """How often an epoch shows it: the most that any of its datasets asks for."""
    tags: tuple[str, ...]
    """Of all its entries."""
    home: str
    """Key of its first caption ordinal, whichever captions there are: decides whose work it is."""

    @property
    def type(self) -> MediaType:
        return "text" if self.probe is None else self.probe.type

    @property
    def pixels(self) -> int:
        """Of all its frames."""
        return self.clip.bucket.height * self.clip.bucket.width * self.clip.bucket.frames

    @property
    def to_decode(self) -> tuple[Any, ...]:
        """Arguments of `preprocess.media.decode.fitted_frames`."""
        clip = self.clip
        return self.entry.path, self.type, clip.frame_indices, clip.bucket, self.shortcut

    def info(self, caption: str) -> SampleInfo:
        """The sample's `KEY.json`."""
        return SampleInfo(
            caption=caption,
            type=self.type,
            source=self.entry.source,
            width=self.clip.bucket.width,
            height=self.clip.bucket.height,
            frames=self.clip.bucket.frames,
            frame_indices=list(self.clip.frame_indices),
            frame_rule=self.clip.frame_rule,
            fps=None if self.probe is None else self.probe.fps,
            source_width=None if self.probe is None else self.probe.width,
            source_height=None if self.probe is None else self.probe.height,
            repeats=self.repeats,
            tags=list(self.tags),
        )


class Committed(NamedTuple):
    """What a sample of the cache may be changed in without another key."""

    caption: bytes
    """`caption_digest`."""
    repeats: int


Captions = Mapping[str, Committed]
"""By key."""


def committed_of(index: CacheIndex | None) -> Captions:
    """What is in the shards; None: nothing."""
    if index is None:
        return {}
    return committed_samples(index.keys, index.captions, index.repeats)


def committed_samples(
    keys: npt.NDArray[np.uint8], captions: npt.NDArray[np.uint8], repeats: npt.NDArray[np.int32]
) -> Captions:
    """What is in the shards, from columns of the index."""
    digests, width = captions.tobytes(), captions.shape[1]
    return {
        key: Committed(digests[row * width : (row + 1) * width], count)
        for row, (key, count) in enumerate(zip(hex_keys(keys), repeats.tolist(), strict=True))
    }


def missing_of(work: Work, committed: Captions) -> list[tuple[str, str]]:
    """The (key, caption) of a clip that the shards lack, or have with other words or repeats."""
    return [
        (key, caption)
        for key, caption in work.samples
        if committed.get(key) != Committed(caption_digest(caption), work.repeats)
    ]


def split(works: Sequence[Work], committed: Captions) -> tuple[list[Work], list[Work], list[Work]]:
    """Text-only samples; clips whose latents are in the shards under some caption; others."""
    text_only: list[Work] = []
    known: list[Work] = []
    new: list[Work] = []
    for work in works:
        there = any(key in committed for key, _ in work.samples)
        (text_only if work.type == "text" else known if there else new).append(work)
    return text_only, known, new


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """One clip that an entry asks for, before clips of the same content are merged."""

    entry: Entry
    sha256: str
    probe: Probe | None
    clip: Clip
    shortcut: Shortcut | None = None


def plan_work(
    entries: Sequence[Entry],
    rule: ClipRule,
    hasher: FileHasher,
    pool: WorkerPool,
    *,
    committed: Captions,
    on_progress: Callable[[], None],
    video_repeat: int = 1,
) -> tuple[list[Work], list[Rejected]]:
    """Probe every file and decide what is to be encoded, in the dataset's order.

    A caption that is `committed` for its clip keeps its key, whatever stands before it today.
    Videos are shown `video_repeat` times as often as their dataset says.
    """
    files: dict[tuple[MediaFile, Kind], list[int]] = {}  # each opened once, however many captions
    found: dict[int, list[_Chosen] | Rejected] = {}
    for number, entry in enumerate(entries):
        if entry.path is None:
            found[number] = _of_caption(entry, rule)
            on_progress()
        else:
            files.setdefault((entry.path, entry.type), []).append(number)
    media = ((numbers, path, kind) for (path, kind), numbers in files.items())
    for numbers, result in probed(media, hasher, pool):
        for number in numbers:
            found[number] = _of_media(entries[number], result, rule)
            on_progress()

    clips: dict[tuple[str, Clip], list[_Chosen]] = {}
    rejected: dict[Rejected, None] = {}  # a file once, however many captions
    for number in range(len(entries)):  # in the dataset's order, not the workers'
        one = found[number]
        if isinstance(one, Rejected):
            rejected[one] = None
        else:
            for clip in one:
                clips.setdefault((clip.sha256, clip.clip), []).append(clip)
    there = {sample.caption for sample in committed.values()}
    works: list[Work] = []
    for same in clips.values():
        try:
            works.append(_work(same, committed, there, video_repeat))
        except MediaError as error:
            rejected[Rejected(source=same[0].entry.source, reason=str(error))] = None
    return works, list(rejected)


def _of_media(
    entry: Entry, result: Probed | MediaError | OSError, rule: ClipRule
) -> list[_Chosen] | Rejected:
    try:
        if isinstance(result, Exception):
            raise result
        probe, sha256 = result
        return [
            _Chosen(
                entry=entry,
                sha256=sha256,
                probe=replace(probe, times=None, key_frames=None),  # a byte a frame or more
                clip=clip,
                shortcut=probe.shortcut(clip.frame_indices),
            )
            for clip in entry.sampling.clips(probe, sha256, rule)
        ]
    except (MediaError, OSError) as error:
        return Rejected(source=entry.source, reason=str(error))


def _of_caption(entry: Entry, rule: ClipRule) -> list[_Chosen]:
    sha256 = hashlib.sha256(entry.caption.encode()).hexdigest()
    clips = entry.sampling.caption_clips(sha256, rule, shape=entry.shape, frames=entry.frames)
    return [_Chosen(entry=entry, sha256=sha256, probe=None, clip=clip) for clip in clips]


def _work(found: list[_Chosen], committed: Captions, there: set[bytes], video_repeat: int) -> Work:
    first = found[0]
    captions = dict.fromkeys(one.entry.caption for one in found)  # duplicates once, in order
    if len(captions) > MOST_CAPTIONS:
        raise MediaError(f"{len(captions)} captions for one clip, expected at most {MOST_CAPTIONS}")
    transform = first.clip.transform()

    def key(ordinal: int) -> str:
        return sample_key(first.sha256, transform, ordinal)

    # A caption that is committed keeps its key: were it counted anew when an earlier one goes, it
    # would lie in the cache twice. The others take the ordinals that are left, lowest first.
    kept: dict[str, int] = {}
    for position, caption in enumerate(captions):
        if (digest := caption_digest(caption)) in there:
            ordinals = (position, *range(MOST_CAPTIONS))
            its = (n for n in ordinals if (at := committed.get(key(n))) and at.caption == digest)
            if (ordinal := next(its, None)) is not None:
                kept[caption] = ordinal
    free = (n for n in range(MOST_CAPTIONS) if n not in kept.values())
    keys = {caption: key(kept[caption] if caption in kept else next(free)) for caption in captions}
    return Work(
        entry=first.entry,
        probe=first.probe,
        clip=first.clip,
        shortcut=first.shortcut,
        samples=tuple((keys[caption], caption) for caption in captions),
        repeats=max(one.entry.repeats for one in found)
        * (video_repeat if first.probe is not None and first.probe.type == "video" else 1),
        tags=tuple(dict.fromkeys(tag for one in found for tag in one.entry.tags)),
        home=key(0),
    )
