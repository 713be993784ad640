"""Which media and captions there are: a metadata file, a folder with captions beside the media, or
WebDataset tars.

Nothing is decoded here. An entry that cannot be used is rejected with a reason; the rest goes on.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from preprocess.dataset.beside import from_folder, from_tars
from preprocess.dataset.entry import (
    BadEntryError,
    Dataset,
    Entry,
    Reading,
    captions_of,
    checked,
    filled,
    kind_of,
    source_of,
    text_of,
)
from preprocess.dataset.metadata import (
    CAPTION_FIELDS,
    CAPTION_ONLY_FIELDS,
    PATH_FIELDS,
    Record,
    as_number,
    find_metadata,
    read_metadata,
)
from preprocess.frames.media_info import MediaKind
from preprocess.media.remote import DataDir, MediaList, Remote, here
from preprocess.media.sources import MediaFile
from preprocess.media.tars import (
    base_folder,
    given_path,
    is_tars,
    media_named,
    named_tars,
)
from shared.errors import UserError, json_kind
from shared.format.captions import is_blank
from shared.format.strict_json import is_count
from shared.io.names import as_text, is_folder, without_secrets
from shared.io.store import errors_named


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
            return from_tars(folder, named_tars(folder), caption_suffix, kind)
        if not is_folder(folder):
            raise UserError(
                f"dataset: no folder {folder}. Set --train-data-dir (or DATASET_NAME) to a "
                "folder of videos and images with a metadata.json (or .jsonl, .csv), or with "
                "same-named .txt captions beside them, or of WebDataset tars."
            )
        metadata = find_metadata(folder)
        if metadata is None:
            return from_folder(data_dir, caption_suffix, kind)
    return _from_metadata(base_folder(data_dir), metadata, kind)


def _from_metadata(data_dir: DataDir, metadata: MediaList, kind: MediaKind | None) -> Dataset:
    records = read_metadata(here(metadata))
    reading = Reading(found=len(records))
    captions_only = kind is None and _captions_only(records)
    for record in records:
        try:
            if record.problem is not None:
                raise BadEntryError(record.problem)
            if _is_text(record.value) or (captions_only and isinstance(record.value, dict)):
                reading.use(_text_entries(record.value, kind))
            else:
                reading.use(_entries(record.value, data_dir, kind))
        except BadEntryError as error:
            named = _named_path(record.value)
            source = record.where if named is None else _source_named(named, data_dir)
            reading.reject(source, error)
    nothing_found = not any(entry.path is None or _exists(entry.path) for entry in reading.entries)
    if records and nothing_found and not here(data_dir).is_dir():
        raise UserError(
            f"dataset: no folder {data_dir}, and no file that {metadata} lists is there. Set "
            "--train-data-dir (or DATASET_NAME) to the folder that its paths are relative to."
        )
    origin = str(metadata) if isinstance(data_dir, Path) else data_dir.shown(metadata)
    return reading.dataset(origin, "record")


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
        raise BadEntryError(f"a text-only caption among {only}s")
    if paths := filled(item, PATH_FIELDS):
        raise BadEntryError(f"type is 'text' and {' and '.join(paths)} is given, expected one")
    captions = captions_of(item, _filled_captions(item))
    height, width, frames = (_whole_number(item, name) for name in ("height", "width", "frames"))
    if (height is None) != (width is None):
        raise BadEntryError("of width and height only one is given, expected both or none")
    shape = None if height is None or width is None else (height, width)
    more = {"shape": shape, "frames": frames, "tags": _tags(item)}
    return [checked(None, "", caption, "text", **more) for caption in captions]


def _whole_number(item: dict[str, Any], name: str) -> int | None:
    value = as_number(item.get(name))
    if is_blank(value):
        return None
    if not is_count(value, least=1):
        raise BadEntryError(f"{name} is {json.dumps(value)}, expected a whole number from 1")
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
        raise BadEntryError(f"the entry is {json_kind(item)}, expected an object")
    paths = filled(item, PATH_FIELDS)
    if len(paths) > 1:
        raise BadEntryError(f"{' and '.join(paths)} are both given, expected one of them")
    captions = _filled_captions(item)
    if not paths and not any(field in item for field in PATH_FIELDS):
        raise BadEntryError(
            f"no {' or '.join(PATH_FIELDS)}, expected the path of a file; a caption that stands "
            'for itself says so: "type": "text"'
        )
    path_field, name = text_of(item, paths, PATH_FIELDS, "the path of a file")
    if without_secrets(name) != name:
        raise BadEntryError(
            "its URL holds a password or signature, which would be written into the shards. Name "
            "it without, e.g. s3://bucket/a.mp4, with credentials as fsspec takes them, or "
            "download it first"
        )
    name = _name_here(name, data_dir)
    path = media_named(data_dir, name)
    implied = {"video_path": "video", "image_path": "image"}.get(path_field)
    given = item.get("type")
    if given and given not in ("video", "image"):
        raise BadEntryError(f"type is {given!r}, expected 'video', 'image' or 'text'")
    kind = given or implied or only or kind_of(path)
    source = source_of(path, given_path(data_dir, name), data_dir)
    tags = _tags(item)
    return [
        checked(path, source, caption, kind, tags=tags) for caption in captions_of(item, captions)
    ]


def _name_here(name: str, data_dir: DataDir) -> str:
    """A path of a list as it is here, where lists of Windows have backslashes between folders.

    A file with backslashes in its name is meant, if there is one.
    """
    of_windows = PureWindowsPath(name)
    if not ("\\" in name or of_windows.is_absolute()) or _exists(media_named(data_dir, name)):
        return name
    if of_windows.is_absolute() or not _exists(media_named(data_dir, of_windows.as_posix())):
        raise BadEntryError(
            f"the path {name} has backslashes or a drive, as on Windows, and there is no such file "
            "here. Write it with /, relative to --train-data-dir"
        )
    return of_windows.as_posix()


def _filled_captions(item: dict[str, Any]) -> dict[str, Any]:
    captions = filled(item, CAPTION_FIELDS)
    if len(captions) > 1 and len({json.dumps(value) for value in captions.values()}) > 1:
        raise BadEntryError(f"{' and '.join(captions)} differ, expected one of them")
    return captions


def _tags(item: dict[str, Any]) -> tuple[str, ...]:
    """A list of texts, or one text with commas between them (of a CSV); none twice."""
    value = item.get("tags")
    if is_blank(value):
        return ()
    tags = value.split(",") if isinstance(value, str) else value
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        found = json.dumps(value)
        raise BadEntryError(f"tags is {found:.80}, expected a list of texts, or 'one,other'")
    stripped = (as_text(tag.strip()) for tag in tags)
    return tuple(dict.fromkeys(tag for tag in stripped if tag))


def _exists(path: MediaFile) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def _source_named(name: str, data_dir: DataDir) -> str:
    """What the cache calls the file that a list calls `name`, usable or not: `./a.mp4` is `a.mp4`,
    whose samples must not pass for unlisted ones."""
    with suppress(ValueError, OSError, RuntimeError):  # no name that a file could have
        if "\\" in name and not _exists(media_named(data_dir, name)):
            name = name.replace("\\", "/")
        path = media_named(data_dir, name)
        return as_text(source_of(path, given_path(data_dir, name), data_dir))
    return as_text(name)
