"""The samples of a run: those of one or more caches that `--where` chose, under one numbering."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import lcm

import numpy as np
import numpy.typing as npt

from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import CacheIndex
from shared.format.overlays import positions
from shared.format.schema import JSON_MEMBER, MEDIA_TYPES, TEXT_MEMBER
from train.data.filters import Condition, nothing_selected, select


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a run takes from one cache."""

    index: CacheIndex
    weight: Fraction
    """How often an epoch shows a sample, times its own repeats."""
    rows: npt.NDArray[np.int64]
    """(n) of the index, ascending."""


@dataclass(frozen=True)
class Dataset:
    """Samples 0 … N−1: the rows of the first part, then those of the next. No tar is opened."""

    parts: tuple[Part, ...]

    @cached_property
    def _starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *(len(part.rows) for part in self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Of all parts: equal shapes are one, wherever they come from."""
        return tuple(dict.fromkeys(b for part in self.parts for b in part.index.buckets))

    @cached_property
    def bucket_ids(self) -> npt.NDArray[np.int32]:
        """(N) positions in `buckets`."""
        number = {bucket: n for n, bucket in enumerate(self.buckets)}
        found = []
        for part in self.parts:
            ours = np.array([number[bucket] for bucket in part.index.buckets], dtype=np.int32)
            found.append(ours[part.index.bucket_ids[part.rows]])
        return np.concatenate(found)

    def filled_buckets(self) -> list[Bucket]:
        """Those that have samples."""
        return [self.buckets[number] for number in np.unique(self.bucket_ids)]

    @cached_property
    def types(self) -> npt.NDArray[np.uint8]:
        """(N) positions in `MEDIA_TYPES`."""
        return np.concatenate([part.index.types[part.rows] for part in self.parts])

    def shown(self, video_repeat: int | None) -> tuple[npt.NDArray[np.int64], int]:
        """(N) how often each sample is shown in so many epochs: `BatchPlan`'s repeats, epochs.

        `video_repeat` stands in for what the shards say of videos.
        """
        epochs = lcm(*(part.weight.denominator for part in self.parts))
        repeats = []
        for part in self.parts:
            own = part.index.repeats[part.rows].astype(np.int64)
            if video_repeat is not None:
                own[part.index.types[part.rows] == MEDIA_TYPES.index("video")] = video_repeat
            repeats.append(own * int(part.weight * epochs))
        return np.concatenate(repeats), epochs

    def place(self, sample: int) -> tuple[int, int]:
        """Number of a sample's part and its row there."""
        number = int(np.searchsorted(self._starts, sample, side="right")) - 1
        part = self.parts[number]
        return number, int(part.rows[sample - self._starts[number]])

    def key(self, sample: int) -> str:
        number, row = self.place(sample)
        return self.parts[number].index.key(row)

    def where(self, sample: int, member: str = JSON_MEMBER) -> str:
        """Key and shard file of a sample, for messages."""
        number, row = self.place(sample)
        return self.parts[number].index.where(row, member)

    @property
    def first(self) -> CacheIndex:
        """The cache whose prompt bank serves the run."""
        return self.parts[0].index

    @property
    def folders(self) -> str:
        """For messages."""
        return ", ".join(str(part.index.store) for part in self.parts)

    def identity(self) -> str:
        """Changes when what is in the caches does, or a weight."""
        return " ".join(
            part.index.digest + ("" if part.weight == 1 else f"@{part.weight}")
            for part in self.parts
        )

    def captions_identity(self) -> str | None:
        """The same of captions in place of the caches' own."""
        digests = [
            part.index.overlays[TEXT_MEMBER].index.digest
            for part in self.parts
            if TEXT_MEMBER in part.index.overlays
        ]
        return " ".join(digests) or None

    def describe(self) -> list[str]:
        """Where the samples come from, one line a cache; none where there is one cache, whole."""
        whole = sum(len(part.index) for part in self.parts)
        lines = []
        if len(self.parts) > 1 or len(self) < whole:
            for part in self.parts:
                weight = "" if part.weight == 1 else f", each {part.weight} times an epoch"
                lines.append(
                    f"shards   {len(part.rows)} of {len(part.index)} samples of "
                    f"{part.index.store}{weight}"
                )
        for number, part in enumerate(self.parts):
            if both := sum(_shared(part, other) for other in self.parts[:number]):
                lines.append(
                    f"shards   {both} samples of {part.index.store} are in a folder before it, "
                    "too; they are shown for both"
                )
        return lines


def dataset_of(
    caches: Sequence[tuple[CacheIndex, Fraction]], conditions: Sequence[Condition] = ()
) -> Dataset:
    """Samples of caches, each with its weight. UserError where `conditions` leave none."""
    chosen = list(map(np.flatnonzero, select([index for index, _ in caches], conditions)))
    if not any(map(len, chosen)):
        if not conditions:
            raise UserError("shards: no samples")
        raise nothing_selected([index for index, _ in caches], conditions)
    return Dataset(
        tuple(
            Part(index=index, weight=weight, rows=rows)
            for (index, weight), rows in zip(caches, chosen, strict=True)
        )
    )


def _shared(one: Part, other: Part) -> int:
    """How many samples are taken from both."""
    there = positions(one.index.keys[one.rows], other.index.keys[other.rows])
    return int((there >= 0).sum())
