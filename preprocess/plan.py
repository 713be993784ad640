"""From entries to work: content digests, clips, keys; the same clip of the same content once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from preprocess.clips import Clip, ClipRule, choose_clip
from preprocess.dataset import Entry, Rejected
from preprocess.decode import look
from preprocess.media import MediaError, Probe
from preprocess.workers import WorkerPool
from shared.hashing import FileHasher
from shared.schema import SampleInfo, sample_key


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
    pool: WorkerPool,
    *,
    on_progress: Callable[[], None],
) -> tuple[list[Work], list[Rejected]]:
    """Look into every file and decide what is to be encoded, in the dataset's order."""
    found: dict[int, _Looked | Rejected] = {}
    names = [_name(hasher, entry) for entry in entries]

    def tasks() -> Iterator[tuple[int, tuple[Path, str, str | None]]]:
        for number, entry in enumerate(entries):
            known = None if (name := names[number]) is None else hasher.known(name)
            yield number, (entry.path, entry.type, known)

    looked = pool.completed(
        look, tasks(), source=lambda number: entries[number].path, ahead=4 * pool.workers
    )
    for number, future in looked:
        entry = entries[number]
        try:
            seen, sha256 = future.result()
            if (name := names[number]) is not None:
                hasher.remember(name, sha256)
            clip = choose_clip(seen, entry.type, sha256, rule)
            found[number] = _Looked(entry=entry, sha256=sha256, probe=seen, clip=clip)
        except (MediaError, OSError) as error:
            found[number] = Rejected(source=entry.source, reason=str(error))
        on_progress()

    clips: dict[tuple[str, Clip], list[_Looked]] = {}
    rejected: list[Rejected] = []
    for number in range(len(entries)):  # in the dataset's order, not the workers'
        one = found[number]
        if isinstance(one, Rejected):
            rejected.append(one)
        else:
            clips.setdefault((one.sha256, one.clip), []).append(one)
    return [_work(same) for same in clips.values()], rejected


def _name(hasher: FileHasher, entry: Entry) -> str | None:
    """What the hasher remembers the file by; None where it cannot be asked for."""
    with suppress(OSError, RuntimeError):  # missing, a name too long, a loop of links
        return hasher.name(entry.path)
    return None


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
