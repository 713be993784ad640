"""Which media and captions there are: `metadata.json`, or a folder with captions beside the media.

Nothing is decoded here. An entry that cannot be used is rejected with a reason; the rest goes on.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.errors import UserError

METADATA = "metadata.json"
EXTENSIONS: dict[str, Literal["video", "image"]] = {
    **dict.fromkeys((".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg"), "video"),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp", ".bmp"), "image"),
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One medium with one caption, as listed; nothing about the file is known yet."""

    path: Path
    source: str
    """As given; relative to the data folder where the file lies inside it."""
    caption: str
    """Without surrounding whitespace, never empty."""
    type: Literal["video", "image"]


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """Something of the dataset that was left out."""

    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a metadata file or a folder offers, in its order."""

    origin: Path
    """The metadata file or the folder that was read."""
    entries: tuple[Entry, ...]
    rejected: tuple[Rejected, ...]


class _BadEntryError(Exception):
    """Reason why one entry is left out."""


def load_dataset(data_dir: Path, metadata: Path | None) -> Dataset:
    """Read the dataset. `metadata=None`: `data_dir/metadata.json` if there, else the media files.

    Raises UserError where there is no dataset at all; single bad entries are returned rejected.
    """
    if metadata is None:
        if not data_dir.is_dir():
            raise UserError(
                f"dataset: no folder {data_dir}. Set --train-data-dir (or DATASET_NAME) to a "
                "folder of videos and images with a metadata.json, or with same-named .txt "
                "captions beside them."
            )
        if not (data_dir / METADATA).exists():
            return _from_folder(data_dir)
        metadata = data_dir / METADATA
    return _from_metadata(data_dir, metadata)


def _from_metadata(data_dir: Path, metadata: Path) -> Dataset:
    items = _read_list(metadata)
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    for number, item in enumerate(items):
        try:
            entries.append(_entry(item, data_dir))
        except _BadEntryError as error:
            named = item.get("file_path") if isinstance(item, dict) else None
            source = named if isinstance(named, str) and named else f"{metadata.name}[{number}]"
            rejected.append(Rejected(source=source, reason=str(error)))
    nothing_found = not any(_exists(entry.path) for entry in entries)
    if items and nothing_found and not data_dir.is_dir():
        raise UserError(
            f"dataset: no folder {data_dir}, and no file that {metadata} lists is there. Set "
            "--train-data-dir (or DATASET_NAME) to the folder that its file_path are relative to."
        )
    return Dataset(origin=metadata, entries=tuple(entries), rejected=tuple(rejected))


def _read_list(metadata: Path) -> list[Any]:
    form = 'a JSON list of {"file_path", "text", "type"}'
    try:
        value = json.loads(metadata.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"dataset: cannot read {metadata} ({error.strerror}). Set --train-data-meta (or "
            f"DATASET_META_NAME) to {form}, or leave it out to use the .txt captions."
        ) from error
    except (ValueError, RecursionError) as error:  # bad JSON, or not UTF-8
        raise UserError(
            f"dataset: {metadata} is not valid JSON ({error}). Expected {form}."
        ) from error
    if not isinstance(value, list):
        raise UserError(f"dataset: {metadata} holds a {type(value).__name__}. Expected {form}.")
    return value


def _entry(item: Any, data_dir: Path) -> Entry:
    """One element of the metadata list. `width` and `height` are ignored: the file decides."""
    if not isinstance(item, dict):
        raise _BadEntryError(f"the entry is a {type(item).__name__}, expected an object")
    name, caption = item.get("file_path"), item.get("text")
    if not isinstance(name, str) or not name:
        raise _BadEntryError(f"file_path is {name!r}, expected the path of a file")
    if not isinstance(caption, str):
        raise _BadEntryError(f"text is {caption!r}, expected the caption")
    given = Path(name).expanduser() if name.startswith("~/") else Path(name)
    path = given if given.is_absolute() else data_dir / given
    kind = item.get("type") or EXTENSIONS.get(path.suffix.lower())
    return _checked(path, _source(path, given, data_dir), caption, kind)


def _from_folder(folder: Path) -> Dataset:
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    files = sorted(_files(folder))
    media = [path for path in files if path.suffix.lower() in EXTENSIONS]
    if not media:
        raise UserError(
            f"dataset: {folder} has no {METADATA} and no media ({' '.join(EXTENSIONS)}). "
            "Set --train-data-dir (or DATASET_NAME) to a folder that has."
        )
    captions = {path for path in files if path.suffix == ".txt"}
    stems = {path.with_suffix("") for path in media}
    for path in files:
        # A caption says that somebody wanted this file: it must not be left out in silence.
        captioned = path.suffix != ".txt" and path.with_suffix(".txt") in captions
        if captioned and path.with_suffix("") not in stems:
            source = path.relative_to(folder).as_posix()
            rejected.append(Rejected(source=source, reason=f"unknown extension {path.suffix!r}"))
    for path in media:
        source = path.relative_to(folder).as_posix()
        try:
            caption = _caption_beside(path)
            entries.append(_checked(path, source, caption, EXTENSIONS[path.suffix.lower()]))
        except _BadEntryError as error:
            rejected.append(Rejected(source=source, reason=str(error)))
    return Dataset(origin=folder, entries=tuple(entries), rejected=tuple(rejected))


def _files(folder: Path) -> Iterator[Path]:
    """Files below `folder` by name, hidden ones left out, links to folders followed once."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file system takes
        return False


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _BadEntryError(f"no caption: cannot read {text.name} beside it") from error
    except ValueError as error:
        raise _BadEntryError(f"the caption {text.name} is not UTF-8 text") from error


def _checked(path: Path, source: str, caption: str, kind: Any) -> Entry:
    if not caption.strip():
        raise _BadEntryError("the caption is empty")
    if _encodable(caption) != caption:
        raise _BadEntryError("the caption holds lone surrogates, which are no characters")
    if kind is None:
        raise _BadEntryError(
            f"unknown extension {path.suffix!r}; give the entry a type, video or image"
        )
    if kind not in ("video", "image"):
        raise _BadEntryError(f"type is {kind!r}, expected 'video' or 'image'")
    return Entry(path=path, source=_encodable(source), caption=caption.strip(), type=kind)


def _encodable(text: str) -> str:
    """`text` with escapes where UTF-8 cannot say it (file names that are bytes of another code)."""
    return text.encode("utf-8", "backslashreplace").decode()


def _source(path: Path, given: Path, data_dir: Path) -> str:
    """How the file is named in the cache: no absolute path where a relative one will do."""
    try:
        return path.resolve().relative_to(data_dir.resolve()).as_posix()
    except (ValueError, OSError, RuntimeError):  # outside the folder, or a loop of links
        return given.as_posix()
