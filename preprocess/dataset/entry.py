"""Entries of a dataset: one media file with one caption each, from whatever form of list.

Nothing is decoded here. What cannot be used is rejected with a reason; the rest goes on.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocess.dataset.clip_overrides import Sampling
from preprocess.dataset.left_out import LeftOut, Tally
from preprocess.dataset.metadata import CAPTION_FIELDS, PATH_FIELDS
from preprocess.frames.media_info import ANIMATIONS, Kind, MediaKind
from preprocess.media.remote import DataDir, RemoteFile, here
from preprocess.media.sources import MediaFile, TarMember
from preprocess.media.tars import member_name
from shared.cache.rejected import Rejected
from shared.format.captions import is_blank
from shared.io.names import as_text, without_secrets

EXTENSIONS: dict[str, MediaKind] = {
    **dict.fromkeys((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg"), "video"),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".apng"), "image"),
    **dict.fromkeys((".tif", ".tiff", ".avif"), "image"),
}
"""What a file is by its name; those of `media_info.ANIMATIONS` are videos if they move."""

AS_ASKED = Sampling()
"""As the command line says."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One media file with one caption, as listed; nothing about the file is known yet."""

    path: MediaFile | None
    """None: there is only the caption."""
    source: str
    """As given; relative to the data folder if the file lies inside it. "" for text-only ones."""
    caption: str
    """Without surrounding whitespace, never empty."""
    type: Kind
    sampling: Sampling = AS_ASKED
    """What its dataset says about sizes and frames."""
    repeats: int = 1
    """How often an epoch shows it."""
    shape: tuple[int, int] | None = None
    """Of a text-only caption: (height, width) of a video that would fit; their ratio counts."""
    frames: int | None = None
    """Most frames that such a video would have."""
    tags: tuple[str, ...] = ()
    """Words for `wantrain --where tag=…`."""


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a metadata file or a folder offers, in its order."""

    origin: str
    """The metadata file or the folder that was read, as the user named it."""
    entries: tuple[Entry, ...]
    rejected: tuple[Rejected, ...]
    left_out: tuple[LeftOut, ...]
    tallies: tuple[Tally, ...]
    """What these come to, for each place that was read."""


class BadEntryError(Exception):
    """Reason why one entry is rejected."""


@dataclass
class Reading:
    """What a reader has found so far."""

    found: int = 0
    """Counted from what lies there, not from what becomes of it."""
    used: int = 0
    entries: list[Entry] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def use(self, entries: Sequence[Entry]) -> None:
        """One thing with an entry for each of its captions."""
        self.used += 1
        self.entries += entries

    def reject(self, source: str, reason: object) -> None:
        source = without_secrets(as_text(source))
        self.rejected.append(Rejected(source=source, reason=without_secrets(str(reason))))

    def leave(self, source: str, reason: str) -> None:
        self.left_out.append(LeftOut(source=as_text(source), reason=reason))

    def dataset(self, origin: str, noun: str) -> Dataset:
        tally = Tally(
            origin=origin,
            noun=noun,
            found=self.found,
            used=self.used,
            rejected=len(self.rejected),
        )
        return Dataset(
            origin=origin,
            entries=tuple(self.entries),
            rejected=tuple(self.rejected),
            left_out=tuple(self.left_out),
            tallies=(tally,),
        )


def kind_of(path: MediaFile) -> Kind | None:
    """By its name. Whether one of those that may move does is seen where it is opened."""
    suffix = path.suffix.lower()
    return "auto" if suffix in ANIMATIONS else EXTENSIONS.get(suffix)


def checked(path: MediaFile | None, source: str, caption: str, kind: Any, **more: Any) -> Entry:
    if is_blank(caption):
        raise BadEntryError("the caption is empty")
    if as_text(caption) != caption:
        raise BadEntryError("the caption holds lone surrogates, which are no characters")
    if kind is None:
        suffix = "" if path is None else path.suffix
        raise BadEntryError(f"unknown extension {suffix!r}; give the entry a type, video or image")
    return Entry(
        path=path,
        source=as_text(source),
        caption=caption.strip(),
        type=kind,
        **more,
    )


def captions_of(item: dict[str, Any], filled: dict[str, Any]) -> list[str]:
    """The caption, or several: a list, under whichever of the names."""
    value = next(iter(filled.values()), None)
    if not isinstance(value, list):
        return [text_of(item, filled, CAPTION_FIELDS, "the caption")[1]]
    if not value or not all(isinstance(caption, str) for caption in value):
        field = next(iter(filled))
        raise BadEntryError(f"{field} is {json.dumps(value)}, expected a caption or a list of them")
    return value


def filled(item: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Those of `fields` that hold something: tables leave blanks, JSON may say null."""
    return {field: item[field] for field in fields if not is_blank(item.get(field))}


def text_of(
    item: dict[str, Any], filled: dict[str, Any], fields: tuple[str, ...], what: str
) -> tuple[str, str]:
    """(field, its text) of the first filled field. A blank caption is left to `checked`."""
    for name in (*filled, *(name for name in fields if name in item)):
        value = item[name]
        if not isinstance(value, str) or (fields is PATH_FIELDS and is_blank(value)):
            found = json.dumps(value)
            raise BadEntryError(f"{name} is {found}, expected {what}")
        return name, value
    raise BadEntryError(f"no {' or '.join(fields)}, expected {what}")


def source_of(path: MediaFile, given: Path, data_dir: DataDir) -> str:
    """How the file is named in the cache: no absolute path where a relative one will do."""
    if isinstance(path, TarMember):
        tar = next(parent for parent in given.parents if parent.name == path.tar.name)
        return f"{source_of(path.tar, tar, data_dir)}/{member_name(path)}"
    if isinstance(path, RemoteFile):
        return path.url if isinstance(data_dir, Path) else data_dir.name_of(path.url)
    if not isinstance(path, Path):
        return str(path)
    try:
        return path.resolve().relative_to(here(data_dir).resolve()).as_posix()
    except (ValueError, OSError, RuntimeError):  # outside the folder, or a loop of links
        return given.as_posix()
