"""From entries to work: content digests, clips, keys; the same clip of the same content once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar

from preprocess.clips import Clip, ClipRule, choose_clip
from preprocess.dataset import Entry, Rejected
from preprocess.media import MediaError, Probe, probe
from shared.hashing import FileHasher
from shared.schema import SampleInfo, sample_key

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Work:
    """One clip to encode, with every caption that the dataset gives it."""

    entry: Entry
    """The first entry that brought the clip."""
    probe: Probe
    clip: Clip
    samples: tuple[tuple[str, str], ...]
    """(key, caption), in order of appearance; the position is the caption ordinal in the key."""

    @property
    def type(self) -> Literal["video", "image"]:
        return self.entry.type

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
            fps=self.probe.fps,
            source_width=self.probe.width,
            source_height=self.probe.height,
        )


@dataclass(frozen=True, kw_only=True)
class _Looked:
    """What opening one entry's file told."""

    entry: Entry
    sha256: str
    probe: Probe
    clip: Clip


def plan_work(
    entries: Sequence[Entry],
    rule: ClipRule,
    hasher: FileHasher,
    *,
    threads: int,
    on_progress: Callable[[], None],
) -> tuple[list[Work], list[Rejected]]:
    """Look into every file and decide what is to be encoded, in the dataset's order."""

    def look(entry: Entry) -> _Looked:
        seen = probe(entry.path, entry.type)
        sha256 = hasher.sha256(entry.path)
        clip = choose_clip(seen, entry.type, sha256, rule)
        return _Looked(entry=entry, sha256=sha256, probe=seen, clip=clip)

    clips: dict[tuple[str, Clip], list[_Looked]] = {}
    rejected: list[Rejected] = []
    for entry, future in in_background(look, entries, threads=threads, ahead=4 * threads):
        try:
            looked = future.result()
            clips.setdefault((looked.sha256, looked.clip), []).append(looked)
        except (MediaError, OSError) as error:
            rejected.append(Rejected(source=entry.source, reason=str(error)))
        on_progress()
    return [_work(found) for found in clips.values()], rejected


def _work(found: list[_Looked]) -> Work:
    first = found[0]
    captions = dict.fromkeys(looked.entry.caption for looked in found)  # duplicates once, in order
    transform = first.clip.transform()
    return Work(
        entry=first.entry,
        probe=first.probe,
        clip=first.clip,
        samples=tuple(
            (sample_key(first.sha256, transform, ordinal), caption)
            for ordinal, caption in enumerate(captions)
        ),
    )


def in_background(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[tuple[Item, "Future[Result]"]]:
    """Run `function` on the items in threads, at most `ahead` of the consumer; results in order.

    A failure is raised by its future's `result()`. Closing the iterator cancels what has not begun.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        remaining = iter(items)
        queue = [(item, pool.submit(function, item)) for item in islice(remaining, ahead)]
        while queue:
            yield queue.pop(0)
            queue += [(item, pool.submit(function, item)) for item in islice(remaining, 1)]
    finally:
        pool.shutdown(cancel_futures=True)
