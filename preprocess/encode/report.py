"""What `wanprep` tells people: progress on stderr, the summary on stdout."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from preprocess.dataset.entries import Rejected
from preprocess.encode.work import Work
from shared.format.cache import CacheIndex
from shared.format.latent_rgb import R2_FLOOR
from shared.format.schema import MEDIA_TYPES
from shared.io.names import on_one_line

if TYPE_CHECKING:
    from preprocess.encode.passes import Times
    from preprocess.overlays.recaption import Recaptioned

_NAMED = 3  # of a long list, so many are named


def count(number: int, noun: str) -> str:
    """1 sample, 2 samples."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Bar:
    """One progress bar; calling it advances by one."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def __call__(self) -> None:
        self._progress.advance(self._task)


@contextmanager
def bar(console: Console, title: str, total: int) -> Iterator[Bar]:
    """A progress bar while the block runs; none where there is nothing to do."""
    progress = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=total == 0,
    )
    with progress:
        yield Bar(progress, progress.add_task(title, total=total))


@contextmanager
def byte_bar(console: Console, title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes while the block runs; what it yields takes how many came."""
    progress = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=total == 0,
    )
    with progress:
        task = progress.add_task(title, total=total)
        yield lambda number: progress.advance(task, number)


def short_clips(work: Sequence[Work]) -> str | None:
    """The line about clips that are shorter than asked; None if there are none."""
    short = [item for item in work if item.clip.bucket.frames < item.clip.asked]
    if not short:
        return None
    taken: dict[str, set[int]] = {}  # of one video there may be several clips
    for item in short:
        taken.setdefault(item.entry.source, set()).add(item.clip.bucket.frames)
    named = _named([f"{name} ({', '.join(map(str, sorted(n)))})" for name, n in taken.items()])
    asked = sorted({item.clip.asked for item in short})
    fewer = f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
    return (
        f"short    {count(len(taken), 'video')} with fewer than {fewer} frames at this stride, "
        f"taken at the largest 4n+1 there is: {named}"
    )


def repeats(work: Work) -> int:
    """How many frames of a clip are the frame before once more."""
    indices = work.clip.frame_indices
    return sum(one == other for one, other in pairwise(indices))


def repeated_frames(work: Sequence[Work]) -> str | None:
    """The line about videos slower than --fps, if only in places; None if there are none."""
    slow = {item.entry.source: item for item in work if repeats(item)}
    if not slow:
        return None
    named = _named(
        [f"{name} ({repeats(item)} of {item.clip.bucket.frames})" for name, item in slow.items()]
    )
    return (
        f"slow     {count(len(slow), 'video')} slower than --fps, at least in places: frames are "
        f"repeated, as a player shows them longer: {named}"
    )


def noted(work: Sequence[Work]) -> str | None:
    """The line about what is odd of videos that are taken all the same; None if nothing is."""
    odd = {item.entry.source: item.probe.notes for item in work if item.probe and item.probe.notes}
    if not odd:
        return None
    kinds = dict.fromkeys(note for notes in odd.values() for note in notes)
    return f"noted    {count(len(odd), 'video')} {'; '.join(kinds)}: {_named(list(odd))}"


def contents(folder: Path, index: CacheIndex) -> str:
    """What a cache holds, bucket by bucket."""
    lines = [f"{folder}: {count(len(index), 'sample')} in {count(len(index.shards), 'shard')}"]
    samples = np.bincount(index.bucket_ids, minlength=len(index.buckets))
    text = index.bucket_ids[index.types == MEDIA_TYPES.index("text")]
    alone = np.bincount(text, minlength=len(index.buckets))
    for bucket, number, captions in zip(index.buckets, samples, alone, strict=True):
        length = "image" if bucket.frames == 1 else f"{bucket.frames} frames"
        which = f" ({captions} of them captions alone)" if captions else ""
        lines.append(f"  {bucket.width}x{bucket.height}, {length}: {number}{which}")
    return "\n".join(lines)


def preview(index: CacheIndex) -> str | None:
    """The line about the latent → RGB map; None where its quality could not be measured."""
    rgb = index.latent_rgb
    if rgb is None or rgb.r2 is None:
        return None
    line = (
        f"preview  latent → RGB map fitted to {count(rgb.samples, 'sample')}, "
        f"R² {rgb.r2:.2f} on {rgb.held_out} held out"
    )
    if rgb.r2 < R2_FLOOR:
        line += f"; below {R2_FLOOR}, so previews without a VAE mislead"
    return line


def where_time_went(times: "Times") -> str | None:
    """The line about the media pass; None where this process had no clip to encode."""
    if not times.clips:
        return None
    rest = times.media - times.vae - times.decoding - times.writing
    return (
        f"time     media {times.media:.2f} s: in the encoders {times.vae:.2f}, waiting for "
        f"decoders {times.decoding:.2f}, for the disk {times.writing:.2f}, else {rest:.2f}; "
        f"a clip {times.vae / times.clips:.2f} s to encode, beside it "
        f"{times.decoders / times.clips:.2f} s to decode"
    )


def unmatched_captions(done: "Recaptioned") -> list[str]:
    """What became of samples without a new caption, and of captions without a sample."""
    lines = []
    if done.samples_without:
        lines.append(
            f"{count(done.samples_without, 'sample')} of {done.samples} without a caption of that "
            f"name keep their own: {_named(done.without)}"
        )
    if done.unused:
        lines.append(
            f"{count(len(done.unused), 'file')} with captions that fit no sample in the shards: "
            f"{_named(done.unused)}"
        )
    if done.rejected:
        lines.append(f"{len(done.rejected)} rejected of the list:")
        lines += _reasons(done.rejected)
    return lines


def _named(names: Sequence[str]) -> str:
    more = [f"{len(names) - _NAMED} more"] if len(names) > _NAMED else []
    return ", ".join([*map(on_one_line, names[:_NAMED]), *more])


def _reasons(rejected: Sequence[Rejected]) -> list[str]:
    return [
        "  " + on_one_line(f"{item.source}: " + item.reason.replace("\n", " "))
        for item in rejected[:_NAMED]
    ]


def rejections(rejected: Sequence[Rejected], listed_in: Path) -> str:
    """The first few rejected samples with their reasons, and where all of them are listed."""
    lines = _reasons(rejected)
    if len(rejected) > _NAMED:
        lines.append(f"  ... {len(rejected) - _NAMED} more")
    return "\n".join([f"{len(rejected)} rejected, listed in {listed_in}:", *lines])
