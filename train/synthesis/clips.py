"""Which clips are made of which samples, under which keys, and which are sampled together."""

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import CacheIndex, MemberReader
from shared.format.fingerprint import Fingerprint
from shared.format.schema import MEDIA_TYPES, TEXT_MEMBER, MediaType, SampleInfo, sample_key
from shared.models.spec import ModelSpec
from train.data.dataset import Dataset


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One clip that is to be made."""

    key: str
    """Of the new sample."""
    row: int
    """Of its source in the dataset."""
    source: str
    """Key of that."""
    ordinal: int
    """Its number among the clips of its source."""

    @property
    def noise(self) -> tuple[str, int]:
        """What its noise hangs on, beside the seed."""
        return self.source, self.ordinal


@dataclass(frozen=True)
class Group:
    """Clips of one bucket that go through the model together.

    Always the same ones, whatever is there already: a pass of more or fewer samples rounds
    otherwise.
    """

    clips: tuple[Clip, ...]
    bucket: Bucket


@dataclass(frozen=True)
class Source:
    """The samples that clips are made of: one cache, perhaps with other captions or conditions."""

    data: Dataset
    spec: ModelSpec

    @property
    def index(self) -> CacheIndex:
        return self.data.first

    @cached_property
    def texts_alone(self) -> int:
        """How many of the samples are captions only."""
        return int(np.count_nonzero(self.data.types == MEDIA_TYPES.index("text")))

    def rows(self, count: int | None) -> list[int]:
        """The first `count` samples that a clip can be made of, by key.

        UserError where there are none: an i2v model needs a condition.
        """
        usable = np.ones(len(self.data), dtype=np.bool_)
        if self.spec.given_frames:
            usable = self.data.types != MEDIA_TYPES.index("text")
        if not usable.any():
            raise UserError(
                f"shards: all {len(self.data)} samples of {self.data.folders} are text-only, and "
                f"{self.spec.folder} is an i2v model, which needs a first frame. Use a t2v model, "
                "or encode media."
            )
        rows: list[int] = np.flatnonzero(usable).tolist()  # a cache's rows are sorted by key
        return rows[:count]

    def info(self, row: int) -> dict[str, Any]:
        """`KEY.json` of a sample, with the caption that its text is of."""
        at, overlay = self.data.place(row)[1], self.index.overlays.get(TEXT_MEMBER)
        with closing(MemberReader(self.index)) as own:
            found = own.info(at)
        if overlay is not None and (there := int(overlay.rows[at])) >= 0:
            with closing(MemberReader(overlay.index)) as theirs:
                found = {**found, "caption": theirs.info(there)["caption"]}
        return found

    def captions(self, rows: Sequence[int]) -> list[str]:
        """Hex digests of the captions, from the index alone (first 16 bytes of the SHA-256)."""
        overlay = self.index.overlays.get(TEXT_MEMBER)
        digests = []
        for row in rows:
            at, index = self.data.place(row)[1], self.index
            if overlay is not None and overlay.rows[at] >= 0:
                at, index = int(overlay.rows[at]), overlay.index
            digests.append(bytes(index.captions[at]).hex())
        return digests


def plan_clips(
    source: Source, fingerprint: Fingerprint, *, count: int | None, each: int, size: int
) -> list[Group]:
    """All clips of a run, in groups of up to `size`.

    The first clip of every sample comes before the second of any, so that a run that is stopped
    has made something of all captions.
    """
    rows = source.rows(count)
    digests = source.captions(rows)
    synthesis = fingerprint["synthesis"]
    data, groups = source.data, []
    waiting: dict[int, list[Clip]] = {}
    for ordinal in range(each):
        for row, caption in zip(rows, digests, strict=True):
            original = data.key(row)
            key = sample_key(original, {"caption": caption, "synthesis": synthesis}, ordinal)
            clip = Clip(key=key, row=row, source=original, ordinal=ordinal)
            bucket = int(data.bucket_ids[row])
            waiting.setdefault(bucket, []).append(clip)
            if len(waiting[bucket]) == size:
                groups.append(Group(tuple(waiting.pop(bucket)), data.buckets[bucket]))
    return groups + [Group(tuple(clips), data.buckets[n]) for n, clips in waiting.items()]


def described(groups: Sequence[Group]) -> str:
    """How many clips of which shape."""
    sizes = Counter[Bucket]()
    for group in groups:
        sizes[group.bucket] += len(group.clips)
    return ", ".join(f"{number} of {bucket}" for bucket, number in sorted(sizes.items()))


def info_of(clip: Clip, original: dict[str, Any]) -> SampleInfo:
    """`KEY.json` of a clip, from that of its source."""
    frames = int(original["frames"])
    kind: MediaType = original["type"]
    indices = list(original["frame_indices"])
    if kind == "text":
        kind, indices = ("video" if frames > 1 else "image"), list(range(frames))
    tags = original.get("tags", [])
    return SampleInfo(
        caption=original["caption"],
        type=kind,
        source=f"{original['source']}#{clip.source}/{clip.ordinal}",
        width=original["width"],
        height=original["height"],
        frames=frames,
        frame_indices=indices,
        fps=original.get("fps"),
        source_width=original.get("source_width"),
        source_height=original.get("source_height"),
        repeats=original.get("repeats", 1),
        tags=list(map(str, tags)) if isinstance(tags, list) else [],
    )
