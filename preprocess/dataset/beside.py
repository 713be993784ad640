"""Datasets without a list: captions beside the media, in a folder or in WebDataset tars."""

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from preprocess.dataset.entry import (
    EXTENSIONS,
    BadEntryError,
    Dataset,
    Entry,
    Reading,
    captions_of,
    checked,
    filled,
    kind_of,
    source_of,
)
from preprocess.dataset.left_out import (
    FURTHER,
    HIDDEN,
    OTHER,
    POSTER,
    SPECIAL,
    STRAY_CAPTION,
    hidden_part,
    not_of,
)
from preprocess.dataset.metadata import CAPTION_FIELDS, NAMES
from preprocess.frames.media_info import MediaError, MediaKind
from preprocess.media.remote import DataDir, here
from preprocess.media.sources import TarMember
from preprocess.media.tars import (
    TarContent,
    TarSample,
    base_folder,
    member_name,
    read_tar,
    tars_among,
)
from shared.cli.console import count
from shared.errors import UserError, json_kind
from shared.io.names import quoted

_KINDS = {None: ("video", "image"), "video": ("video",), "image": ("image",)}


def from_folder(data_dir: DataDir, caption_suffix: str, kind: MediaKind | None) -> Dataset:
    """Media of a folder with captions beside them, or samples of the tars in it.

    Raises UserError where it has neither.
    """
    folder = here(data_dir)
    reading = Reading()
    files = _visible_files(folder, reading)
    kinds = {path: EXTENSIONS.get(path.suffix.lower()) for path in files}
    media = [path for path, one in kinds.items() if one in _KINDS[kind]]
    # Tars of media are read from disks only.
    if tars := tars_among(files) if isinstance(data_dir, Path) else ():
        if media:
            raise UserError(
                f"dataset: {folder} holds media ({media[0].relative_to(folder)}) and tars "
                f"({tars[0].relative_to(folder)}), expected one of both. For the tars: "
                f"--train-data-dir {quoted(folder / '*.tar')}; for the media move the tars "
                "elsewhere."
            )
        for path in sorted(set(files) - set(tars)):
            reading.found += 1
            reading.leave(path.relative_to(folder).as_posix(), OTHER)
        return from_tars(folder, tars, caption_suffix, kind, reading)
    if not media:
        left_out = len(reading.left_out)
        hidden = f", but for {count(left_out, 'hidden file')}" if left_out else ""
        raise UserError(
            f"dataset: {folder} has no {' or '.join(NAMES)} and no media "
            f"({' '.join(name for name, one in EXTENSIONS.items() if one in _KINDS[kind])})"
            f"{hidden}. Set --train-data-dir (or DATASET_NAME) to a folder that has."
        )
    captions = {
        path: path.with_name(path.name.removesuffix(caption_suffix))
        for path, one in kinds.items()
        if path.name.endswith(caption_suffix) and one is None
    }
    captioned = set(captions.values())
    named = {path.with_suffix("") for path in files if path not in captions}
    stems = {path.with_suffix("") for path, one in kinds.items() if one is not None}
    videos = {path.with_suffix("") for path, one in kinds.items() if one == "video"}
    # A caption counts with the file that it is of.
    reading.found += len(files) - sum(stem in named for stem in captions.values())
    for path in files:
        source, stem = path.relative_to(folder).as_posix(), path.with_suffix("")
        if path in captions:
            if captions[path] not in named:
                reading.leave(source, STRAY_CAPTION)
        elif kinds[path] is None:
            # A caption says that somebody wanted this file: it must not be left out in silence.
            if stem in captioned and stem not in stems:
                reading.reject(source, f"unknown extension {path.suffix!r}")
            else:
                reading.leave(source, OTHER)
        elif kind is not None and kinds[path] != kind:
            reading.leave(source, not_of(kind))
        elif kind is None and kinds[path] == "image" and stem in videos:
            reading.leave(source, POSTER)
        else:
            try:
                caption = _caption_beside(path, caption_suffix)
                medium = path if isinstance(data_dir, Path) else data_dir.file(source)
                reading.use([checked(medium, source, caption, kind or kind_of(path))])
            except BadEntryError as error:
                reading.reject(source, error)
    return reading.dataset(str(data_dir), "file")


def _visible_files(folder: Path, reading: Reading) -> list[Path]:
    """Files below `folder`, sorted; links to folders are followed once.

    What is hidden, and folders that can't be read, are counted in `reading`.
    """
    files: list[Path] = []
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        reading.found += 1
        source = Path(error.filename).relative_to(folder).as_posix()
        reading.reject(source, f"the folder cannot be read ({error.strerror})")

    tops = [folder]
    for top in tops:  # hidden folders last: a link from outside shows what is in them
        is_shown = top == folder
        onerror = unreadable if is_shown else None
        for parent, folders, names in os.walk(top, followlinks=True, onerror=onerror):
            real = os.path.realpath(parent)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            if is_shown:
                tops += [Path(parent, name) for name in folders if hidden_part(name)]
                folders[:] = [name for name in folders if not hidden_part(name)]
            for name in sorted(names):
                path = Path(parent, name)
                if hides := hidden_part(path.relative_to(folder).as_posix()):
                    reading.found += 1
                    reading.leave(hides, HIDDEN)
                else:
                    files.append(path)
    return sorted(files)


def from_tars(
    named: Path,
    tars: Sequence[Path],
    caption_suffix: str,
    kind: MediaKind | None,
    reading: Reading | None = None,
) -> Dataset:
    """Samples of WebDataset tars: `named` as a folder or a pattern.

    `reading`: what of the folder is known already.
    """
    base = here(base_folder(named))
    reading = reading or Reading()
    for tar in tars:
        content = read_tar(tar, caption_suffix=caption_suffix, hidden_part=hidden_part)
        source = source_of(tar, tar, base)
        _read_samples(content, source, caption_suffix, kind, reading)
        reading.found += len(content.special) + len(content.hidden)
        for name in content.special:
            reading.leave(f"{source}/{name}", SPECIAL)
        for name in content.hidden:
            reading.leave(f"{source}/{name}", HIDDEN)
        if content.problem is not None:
            reading.found += 1
            reading.reject(source, content.problem)
    if not reading.entries and not reading.rejected:
        raise UserError(
            f"dataset: the tars of {named} hold no media with captions. Expected WebDataset "
            f"samples: KEY.mp4 (or .jpg, .png …) with KEY{caption_suffix} or KEY.json beside it."
        )
    return reading.dataset(str(named), "file")


def _read_samples(
    content: TarContent, tar: str, caption_suffix: str, only: MediaKind | None, reading: Reading
) -> None:
    """The samples of a tar, an entry for each of their captions.

    Of a sample's members the media file and the caption count; the others (cls, npy, …) are never
    read, nor those with more dots in their names, as `KEY.cond.json` and `KEY.mask.png` of
    `KEY.jpg`: for WebDataset they are members of KEY.
    """
    text = caption_suffix.removeprefix(".").lower()
    media_of = {
        sample.key: [name for name in sample.members if f".{name}" in EXTENSIONS]
        for sample in content.samples
    }
    captioned = {
        sample.key
        for sample in content.samples
        if text in sample.members or "json" in sample.members
    }
    with_media = {key for key, media in media_of.items() if media}
    for sample in content.samples:
        key, media = sample.key, media_of[sample.key]
        if not media:
            is_of_another = _is_of_another(key, with_media)
            if is_of_another and text not in sample.members:
                continue
            reading.found += 1
            if is_of_another:
                reading.leave(f"{tar}/{key}", STRAY_CAPTION)
            elif key in captioned:
                members = ", ".join(sample.members)
                reading.reject(
                    f"{tar}/{key}",
                    f"no media file (.mp4, .jpg, …) among its members: {members}. Links don't "
                    "count, and names of media and caption are equal up to the last dot",
                )
            else:
                reading.leave(f"{tar}/{key}", OTHER)
            continue
        reading.found += len(media)
        kinds = {name: EXTENSIONS[f".{name}"] for name in media}
        if key not in captioned and _is_of_another(key, with_media & captioned):
            left = dict.fromkeys(media, FURTHER)
        elif only is not None:
            left = {name: not_of(only) for name in media if kinds[name] != only}
        elif "video" in kinds.values():
            left = {name: POSTER for name in media if kinds[name] == "image"}
        else:
            left = {}
        for name, reason in left.items():
            reading.leave(f"{tar}/{member_name(sample.members[name])}", reason)
        wanted = [name for name in media if name not in left]
        if len(wanted) > 1:
            for name in wanted:
                source = f"{tar}/{member_name(sample.members[name])}"
                reading.reject(source, f"several media ({', '.join(wanted)}), expected one")
        elif wanted:
            try:
                reading.use(_tar_entries(sample, sample.members[wanted[0]], tar, text, only))
            except (BadEntryError, MediaError, OSError) as error:
                reading.reject(f"{tar}/{key}", error)


def _is_of_another(key: str, keys: Collection[str]) -> bool:
    """Whether a name, cut at one of its dots, is one of these."""
    start = key.rfind("/") + 1
    dots = (place for place, letter in enumerate(key) if letter == "." and place > start)
    return any(key[:dot] in keys for dot in dots)


def _tar_entries(
    sample: TarSample, media_file: TarMember, tar: str, text: str, only: MediaKind | None
) -> list[Entry]:
    if sample.twice is not None:
        raise BadEntryError(f"{sample.twice} occurs twice in the tar")
    source = f"{tar}/{member_name(media_file)}"
    return [
        checked(media_file, source, caption, only or kind_of(media_file))
        for caption in _tar_captions(sample, text)
    ]


def _tar_captions(sample: TarSample, extension: str) -> list[str]:
    """`KEY.txt`, or where there is none what `KEY.json` says under a caption's names."""
    found = extension if extension in sample.members else "json"
    if found not in sample.members:
        raise BadEntryError(f"no caption: no {extension} and no json beside the media file")
    try:
        content = sample.text(found).decode("utf-8-sig")
        if found != "json":
            return [content]
        item = json.loads(content)
    except (ValueError, RecursionError) as error:
        form = "JSON" if found == "json" else "UTF-8 text"
        raise BadEntryError(f"the caption in {found} is not {form} ({error})") from error
    if not isinstance(item, dict):
        raise BadEntryError(f"json holds {json_kind(item)}, expected an object")
    return captions_of(item, filled(item, CAPTION_FIELDS))


def _caption_beside(path: Path, suffix: str) -> str:
    text = path.with_suffix(suffix)
    try:
        return text.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadEntryError(f"no caption: cannot read {text.name} beside it") from error
    except ValueError as error:
        raise BadEntryError(f"the caption {text.name} is not UTF-8 text") from error
