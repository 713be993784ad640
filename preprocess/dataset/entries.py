"""Which media and captions there are: a metadata file, a folder with captions beside the media, or
WebDataset tars.

Nothing is decoded here. An entry that cannot be used is rejected with a reason; the rest goes on.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.dataset.clip_overrides import Sampling
from preprocess.dataset.metadata import (
    CAPTION_FIELDS,
    CAPTION_ONLY_FIELDS,
    NAMES,
    PATH_FIELDS,
    Record,
    as_number,
    find_metadata,
    is_blank,
    read_metadata,
)
from preprocess.frames.media_info import ANIMATIONS, Kind, MediaError, MediaKind
from preprocess.media.remote import DataDir, MediaList, Remote, RemoteFile, here
from preprocess.media.sources import MediaFile, TarMember
from preprocess.media.tars import (
    TarSample,
    base_folder,
    given_path,
    is_tars,
    media_named,
    member_name,
    named_tars,
    read_tar,
    tars_among,
)
from shared.errors import UserError, json_kind
from shared.format.strict_json import is_count
from shared.io.names import as_text, is_folder, quoted
from shared.io.store import errors_named

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
class Rejected:
    """Something of the dataset that was left out."""

    source: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What a metadata file or a folder offers, in its order."""

    origin: str
    """The metadata file or the folder that was read, as the user named it."""
    entries: tuple[Entry, ...]
    rejected: tuple[Rejected, ...]


class _BadEntryError(Exception):
    """Reason why one entry is left out."""


def load_dataset(
    data_dir: DataDir,
    metadata: MediaList | None,
    *,
    caption_suffix: str = ".txt",
    kind: MediaKind | None = None,
) -> Dataset:
    """Read the dataset. `metadata=None`: the folder's metadata file if it has one, else its media.

    `data_dir` may also be a folder of WebDataset tars, a tar, or a pattern of tars.
    `caption_suffix` is what the names of captions beside media end in. With a `kind`, a folder's
    media of the other are passed over, and the files of a list are read as that kind.

    Raises UserError where there is no dataset at all; single bad entries are returned rejected.
    """
    with errors_named(*(place for place in (data_dir, metadata) if isinstance(place, Remote))):
        return _loaded(data_dir, metadata, caption_suffix, kind)


def _loaded(
    data_dir: DataDir, metadata: MediaList | None, caption_suffix: str, kind: MediaKind | None
) -> Dataset:
    folder = here(data_dir)
    if metadata is None:
        if is_tars(folder):
            return _from_tars(folder, named_tars(folder), caption_suffix, kind)
        if not is_folder(folder):
            raise UserError(
                f"dataset: no folder {folder}. Set --train-data-dir (or DATASET_NAME) to a "
                "folder of videos and images with a metadata.json (or .jsonl, .csv), or with "
                "same-named .txt captions beside them, or of WebDataset tars."
            )
        metadata = find_metadata(folder)
        if metadata is None:
            return _from_folder(data_dir, caption_suffix, kind)
    return _from_metadata(base_folder(data_dir), metadata, kind)


def _from_metadata(data_dir: DataDir, metadata: MediaList, kind: MediaKind | None) -> Dataset:
    records = read_metadata(here(metadata))
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    captions_only = kind is None and _captions_only(records)
    for record in records:
        try:
            if record.problem is not None:
                raise _BadEntryError(record.problem)
            if _is_text(record.value) or (captions_only and isinstance(record.value, dict)):
                entries += _text_entries(record.value, kind)
            else:
                entries += _entries(record.value, data_dir, kind)
        except _BadEntryError as error:
            named = _named_path(record.value)
            source = record.where if named is None else _source_named(named, data_dir)
            rejected.append(Rejected(source=source, reason=str(error)))
    nothing_found = not any(entry.path is None or _exists(entry.path) for entry in entries)
    if records and nothing_found and not here(data_dir).is_dir():
        raise UserError(
            f"dataset: no folder {data_dir}, and no file that {metadata} lists is there. Set "
            "--train-data-dir (or DATASET_NAME) to the folder that its paths are relative to."
        )
    origin = str(metadata) if isinstance(data_dir, Path) else data_dir.shown(metadata)
    return Dataset(origin=origin, entries=tuple(entries), rejected=tuple(rejected))


def _is_text(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") == "text"


def _captions_only(records: Sequence[Record]) -> bool:
    """Whether a list is one of captions: no entry has, or seems to have, a path or another type.

    Where some have one, an entry without is a mistake; so is a path under a name that isn't known.
    """
    values = [record.value for record in records if isinstance(record.value, dict)]
    return all(
        value.keys() <= set(CAPTION_ONLY_FIELDS) and value.get("type", "text") in (None, "", "text")
        for value in values
    )


def _text_entries(item: dict[str, Any], only: MediaKind | None) -> list[Entry]:
    """Text-only captions, an entry for each."""
    if only is not None:
        raise _BadEntryError(f"a text-only caption among {only}s")
    if paths := _filled(item, PATH_FIELDS):
        raise _BadEntryError(f"type is 'text' and {' and '.join(paths)} is given, expected one")
    captions = _captions(item, _filled_captions(item))
    height, width, frames = (_whole_number(item, name) for name in ("height", "width", "frames"))
    if (height is None) != (width is None):
        raise _BadEntryError("of width and height only one is given, expected both or none")
    shape = None if height is None or width is None else (height, width)
    more = {"shape": shape, "frames": frames, "tags": _tags(item)}
    return [_checked(None, "", caption, "text", **more) for caption in captions]


def _whole_number(item: dict[str, Any], name: str) -> int | None:
    value = as_number(item.get(name))
    if is_blank(value):
        return None
    if not is_count(value, least=1):
        raise _BadEntryError(f"{name} is {json.dumps(value)}, expected a whole number from 1")
    return int(value)


def _named_path(item: Any) -> str | None:
    """The first path that an entry gives, for messages about it."""
    given = [item.get(field) for field in PATH_FIELDS] if isinstance(item, dict) else []
    return next((path for path in given if isinstance(path, str) and path), None)


def _entries(item: Any, data_dir: DataDir, only: MediaKind | None) -> list[Entry]:
    """One record, an entry for each of its captions.

    `width`, `height` and whatever else it holds are ignored: the file decides.
    """
    if not isinstance(item, dict):
        raise _BadEntryError(f"the entry is {json_kind(item)}, expected an object")
    paths = _filled(item, PATH_FIELDS)
    if len(paths) > 1:
        raise _BadEntryError(f"{' and '.join(paths)} are both given, expected one of them")
    captions = _filled_captions(item)
    if not paths and not any(field in item for field in PATH_FIELDS):
        raise _BadEntryError(
            f"no {' or '.join(PATH_FIELDS)}, expected the path of a file; a caption that stands "
            'for itself says so: "type": "text"'
        )
    path_field, name = _text(item, paths, PATH_FIELDS, "the path of a file")
    path = media_named(data_dir, name)
    implied = {"video_path": "video", "image_path": "image"}.get(path_field)
    given = item.get("type")
    if given and given not in ("video", "image"):
        raise _BadEntryError(f"type is {given!r}, expected 'video', 'image' or 'text'")
    kind = given or implied or only or _kind(path)
    source = _source(path, given_path(data_dir, name), data_dir)
    tags = _tags(item)
    return [
        _checked(path, source, caption, kind, tags=tags) for caption in _captions(item, captions)
    ]


def _tags(item: dict[str, Any]) -> tuple[str, ...]:
    """A list of texts, or one text with commas between them (of a CSV); none twice."""
    value = item.get("tags")
    if is_blank(value):
        return ()
    tags = value.split(",") if isinstance(value, str) else value
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        found = json.dumps(value)
        raise _BadEntryError(f"tags is {found:.80}, expected a list of texts, or 'one,other'")
    stripped = (as_text(tag.strip()) for tag in tags)
    return tuple(dict.fromkeys(tag for tag in stripped if tag))


def _captions(item: dict[str, Any], filled: dict[str, Any]) -> list[str]:
    """The caption, or several: a list, under whichever of the names."""
    value = next(iter(filled.values()), None)
    if not isinstance(value, list):
        return [_text(item, filled, CAPTION_FIELDS, "the caption")[1]]
    if not value or not all(isinstance(caption, str) for caption in value):
        field = next(iter(filled))
        raise _BadEntryError(
            f"{field} is {json.dumps(value)}, expected a caption or a list of them"
        )
    return value


def _filled(item: dict[str, Any], fields: tuple[str, ...]) -> dict[str, Any]:
    """Those of `fields` that hold something: tables leave blanks, JSON may say null."""
    return {field: item[field] for field in fields if not is_blank(item.get(field))}


def _filled_captions(item: dict[str, Any]) -> dict[str, Any]:
    captions = _filled(item, CAPTION_FIELDS)
    if len(captions) > 1 and len({json.dumps(value) for value in captions.values()}) > 1:
        raise _BadEntryError(f"{' and '.join(captions)} differ, expected one of them")
    return captions


def _text(
    item: dict[str, Any], filled: dict[str, Any], fields: tuple[str, ...], what: str
) -> tuple[str, str]:
    """(field, its text) of the first filled field. A blank caption is left to `_checked`."""
    for field in (*filled, *(field for field in fields if field in item)):
        value = item[field]
        if not isinstance(value, str) or (fields is PATH_FIELDS and is_blank(value)):
            found = json.dumps(value)
            raise _BadEntryError(f"{field} is {found}, expected {what}")
        return field, value
    raise _BadEntryError(f"no {' or '.join(fields)}, expected {what}")


def _from_folder(data_dir: DataDir, caption_suffix: str, kind: MediaKind | None) -> Dataset:
    folder = here(data_dir)
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    files = sorted(_files(folder))
    media = [path for path in files if EXTENSIONS.get(path.suffix.lower()) in _KINDS[kind]]
    if tars := tars_among(files):
        if media:
            raise UserError(
                f"dataset: {folder} holds media ({media[0].relative_to(folder)}) and tars "
                f"({tars[0].relative_to(folder)}), expected one of both. For the tars: "
                f"--train-data-dir {quoted(folder / '*.tar')}; for the media move the tars "
                "elsewhere."
            )
        return _from_tars(folder, tars, caption_suffix, kind)
    if not media:
        raise UserError(
            f"dataset: {folder} has no {' or '.join(NAMES)} and no media "
            f"({' '.join(name for name, one in EXTENSIONS.items() if one in _KINDS[kind])}). "
            "Set --train-data-dir (or DATASET_NAME) to a folder that has."
        )
    captions = {path for path in files if path.suffix == caption_suffix}
    stems = {path.with_suffix("") for path in files if path.suffix.lower() in EXTENSIONS}
    for path in files:
        # A caption says that somebody wanted this file: it must not be left out in silence.
        is_caption = path.suffix == caption_suffix
        captioned = not is_caption and path.with_suffix(caption_suffix) in captions
        if captioned and path.with_suffix("") not in stems:
            source = path.relative_to(folder).as_posix()
            rejected.append(Rejected(source=source, reason=f"unknown extension {path.suffix!r}"))
    for path in media:
        source = path.relative_to(folder).as_posix()
        try:
            caption = _caption_beside(path, caption_suffix)
            medium = path if isinstance(data_dir, Path) else data_dir.file(source)
            entries.append(_checked(medium, source, caption, kind or _kind(path)))
        except _BadEntryError as error:
            rejected.append(Rejected(source=source, reason=str(error)))
    return Dataset(origin=str(data_dir), entries=tuple(entries), rejected=tuple(rejected))


def _from_tars(
    named: Path, tars: list[Path], caption_suffix: str, kind: MediaKind | None
) -> Dataset:
    """Samples of WebDataset tars: `named` as a folder or a pattern."""
    base = here(base_folder(named))
    entries: list[Entry] = []
    rejected: list[Rejected] = []
    for tar in tars:
        samples, problem = read_tar(tar)
        source = _source(tar, tar, base)
        for sample in samples:
            try:
                entries += _tar_entries(sample, source, caption_suffix, kind)
            except (_BadEntryError, MediaError, OSError) as error:
                name = as_text(f"{source}/{sample.key}")
                rejected.append(Rejected(source=name, reason=str(error)))
        if problem is not None:
            rejected.append(Rejected(source=as_text(source), reason=problem))
    if not entries and not rejected:
        raise UserError(
            f"dataset: the tars of {named} hold no media with captions. Expected WebDataset "
            f"samples: KEY.mp4 (or .jpg, .png …) with KEY{caption_suffix} or KEY.json beside it."
        )
    return Dataset(origin=str(named), entries=tuple(entries), rejected=tuple(rejected))


def _tar_entries(
    sample: TarSample, tar: str, caption_suffix: str, only: MediaKind | None
) -> list[Entry]:
    """One sample of a tar, an entry for each of its captions; none of one without any sign of them.

    Of its members the media file and the caption count, the others (cls, npy, …) are never read.
    """
    kinds = {name: EXTENSIONS.get(f".{name}") for name in sample.members}
    media = [name for name, kind in kinds.items() if kind in _KINDS[only]]
    text = caption_suffix.removeprefix(".").lower()
    if not media:
        captioned = text in sample.members or "json" in sample.members
        if only is not None or not captioned:  # of the other kind, or a file that is no sample
            return []
        members = ", ".join(sample.members)
        raise _BadEntryError(
            f"no media file (.mp4, .jpg, …) among its members: {members}. WebDataset splits names "
            "at the first dot, and links don't count"
        )
    if sample.twice is not None:
        raise _BadEntryError(f"{sample.twice} occurs twice in the tar")
    if len(media) > 1:
        raise _BadEntryError(
            f"several media ({', '.join(media)}), expected one. If these are videos with stills, "
            "choose by --dataset-config: video_directory or image_directory"
        )
    media_file = sample.members[media[0]]
    captions = _tar_captions(sample, text)
    source = f"{tar}/{member_name(media_file)}"
    return [
        _checked(media_file, source, caption, only or _kind(media_file)) for caption in captions
    ]


def _tar_captions(sample: TarSample, extension: str) -> list[str]:
    """`KEY.txt`, or where there is none what `KEY.json` says under a caption's names."""
    found = extension if extension in sample.members else "json"
    if found not in sample.members:
        raise _BadEntryError(f"no caption: no {extension} and no json beside the media file")
    try:
        content = sample.text(found).decode("utf-8-sig")
        if found != "json":
            return [content]
        item = json.loads(content)
    except (ValueError, RecursionError) as error:
        form = "JSON" if found == "json" else "UTF-8 text"
        raise _BadEntryError(f"the caption in {found} is not {form} ({error})") from error
    if not isinstance(item, dict):
        raise _BadEntryError(f"json holds {json_kind(item)}, expected an object")
    return _captions(item, _filled(item, CAPTION_FIELDS))


_KINDS = {None: ("video", "image"), "video": ("video",), "image": ("image",)}


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


def _kind(path: MediaFile) -> Kind | None:
    """By its name. Whether one of those that may move does is seen where it is opened."""
    suffix = path.suffix.lower()
    return "auto" if suffix in ANIMATIONS else EXTENSIONS.get(suffix)


def _exists(path: MediaFile) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file system takes
        return False


def _caption_beside(path: Path, suffix: str) -> str:
    text = path.with_suffix(suffix)
    try:
        return text.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise _BadEntryError(f"no caption: cannot read {text.name} beside it") from error
    except ValueError as error:
        raise _BadEntryError(f"the caption {text.name} is not UTF-8 text") from error


def _checked(path: MediaFile | None, source: str, caption: str, kind: Any, **more: Any) -> Entry:
    if not caption.strip():
        raise _BadEntryError("the caption is empty")
    if as_text(caption) != caption:
        raise _BadEntryError("the caption holds lone surrogates, which are no characters")
    if kind is None:
        suffix = "" if path is None else path.suffix
        raise _BadEntryError(f"unknown extension {suffix!r}; give the entry a type, video or image")
    return Entry(
        path=path,
        source=as_text(source),
        caption=caption.strip(),
        type=kind,
        **more,
    )


def _source_named(name: str, data_dir: DataDir) -> str:
    """What the cache calls the file that a list calls `name`, usable or not: `./a.mp4` is `a.mp4`,
    whose samples must not pass for unlisted ones."""
    with suppress(ValueError, OSError, RuntimeError):  # no name that a file could have
        path = media_named(data_dir, name)
        return as_text(_source(path, given_path(data_dir, name), data_dir))
    return as_text(name)


def _source(path: MediaFile, given: Path, data_dir: DataDir) -> str:
    """How the file is named in the cache: no absolute path where a relative one will do."""
    if isinstance(path, TarMember):
        tar = next(parent for parent in given.parents if parent.name == path.tar.name)
        return f"{_source(path.tar, tar, data_dir)}/{member_name(path)}"
    if isinstance(path, RemoteFile):
        return path.url if isinstance(data_dir, Path) else data_dir.name_of(path.url)
    if not isinstance(path, Path):
        return str(path)
    try:
        return path.resolve().relative_to(here(data_dir).resolve()).as_posix()
    except (ValueError, OSError, RuntimeError):  # outside the folder, or a loop of links
        return given.as_posix()
