"""Media in object stores: listed through a folder here, read one by one where they are decoded.

The folder has the names of what lies below the URL. Captions and metadata are in it with their
content; media are empty files, which stand for a `RemoteFile` each.
"""

import hashlib
import json
import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from preprocess.frames.media_info import MediaError
from shared.errors import UserError
from shared.io.durable import write_bytes
from shared.io.hashing import cache_folder
from shared.io.mirror import flock, follow, followed, last_listing
from shared.io.object_store import explained, filesystem, is_local, is_url, signature_of, why

_BLOCK_BYTES = 1 << 23
_AT_ONCE = 16  # small files that are asked for together
_MOST_TEXT_BYTES = 4 << 20
_LISTS = (".json", ".jsonl", ".csv")
_TARS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A media file in an object store."""

    url: str
    signature: str | None = None
    """What the store tells of its content, where it was listed; None: it is asked for."""

    def __str__(self) -> str:
        return self.url

    @property
    def suffix(self) -> str:
        return PurePosixPath(_path_of(self.url)).suffix

    def exists(self) -> bool:
        try:
            self.stamp()
        except OSError:
            return False
        return True

    def stamp(self) -> str:
        if self.signature is not None:
            return f"{self.url}|{self.signature}"
        try:
            files, path = filesystem(self.url)
            return f"{self.url}|{signature_of(files.info(path))}"
        except Exception as error:  # each store has exceptions of its own
            raise OSError(f"{self.url}: {why(error)}") from error

    def content(self) -> Iterator[bytes]:
        try:
            files, path = filesystem(self.url)
            with files.open(path, "rb", block_size=_BLOCK_BYTES) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    yield block
        except GeneratorExit:
            raise
        except Exception as error:
            raise MediaError(f"{self.url}: {why(error)}") from error


class MediaFolder:
    """What lies below a URL, as a folder."""

    def __init__(self, url: str, *, caption_suffix: str) -> None:
        self.url = url.rstrip("/")
        self._caption_suffix = caption_suffix
        name = hashlib.sha256(f"{self.url} {caption_suffix}".encode()).hexdigest()[:16]
        self.folder = (cache_folder() / "media" / name).absolute()
        self._state = self.folder.with_suffix(".json")
        self._listed: dict[str, str] = {}

    def pull(self) -> None:
        """Look what is there. Raises UserError where the store can't be read."""
        with flock(self.folder.with_suffix(".lock")), explained(self.url):
            files, root = filesystem(self.url)
            files.invalidate_cache()
            prefix = root.rstrip("/") + "/"
            found = {
                path.removeprefix(prefix): info
                for path, info in files.find(root, detail=True).items()
                if path.startswith(prefix)
            }
            self._listed = {
                name: signature_of(info) for name, info in found.items() if _is_name(name)
            }
            known = last_listing(self._state)
            texts = [
                name
                for name, signature in self._listed.items()
                if self._is_text(name, found[name].get("size") or 0)
                and not (known.get(name) == signature and (self.folder / name).exists())
            ]
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in known.keys() - self._listed.keys():
                (self.folder / name).unlink(missing_ok=True)
            for name in self._listed:
                self._place(name)
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                contents = pool.map(lambda name: files.cat_file(prefix + name), texts)
                for name, content in zip(texts, contents, strict=True):
                    (self.folder / name).write_bytes(content)
            write_bytes(self._state, json.dumps(self._listed).encode())

    def _place(self, name: str) -> None:
        here = self.folder / name
        try:
            here.parent.mkdir(parents=True, exist_ok=True)
            here.touch()
        except OSError as error:
            raise UserError(
                f"{self.url}/{name}: no folder here takes this name ({error.strerror}). Rename it."
            ) from error

    def _is_text(self, name: str, size: int) -> bool:
        if "/" not in name and name.endswith(_LISTS):
            return True
        return name.endswith(self._caption_suffix) and size <= _MOST_TEXT_BYTES

    def file(self, name: str) -> RemoteFile:
        """The medium of this name, seen from the URL."""
        scheme, _, path = self.url.partition("://")
        signature = self._listed.get(name)
        return RemoteFile(
            url=f"{scheme}://{posixpath.normpath(f'{path}/{name}')}", signature=signature
        )


def _path_of(url: str) -> str:
    """Of the web's addresses the path; a store has no others, and `?` and `#` are letters there."""
    is_web = url.lower().startswith(("http://", "https://"))
    return urlsplit(url).path if is_web else url


def _is_name(name: str) -> bool:
    """Whether it may be a file here; tars of media are not read in stores."""
    plain = all(part not in ("", ".", "..") for part in name.split("/"))
    return plain and "\0" not in name and not name.lower().endswith(_TARS)


class _MetadataFile:
    """A single file of a store, here."""

    def __init__(self, url: str) -> None:
        self.url = url
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        path = cache_folder() / "media" / name / PurePosixPath(_path_of(url)).name
        self.folder = path.absolute()

    def pull(self) -> None:
        with explained(self.url):
            files, path = filesystem(self.url)
            write_bytes(self.folder, files.cat_file(path))


def media_folder(location: str | Path, *, caption_suffix: str = ".txt") -> Path:
    """What `--train-data-dir` takes: a folder as it is, a URL as the folder that lists it."""
    if isinstance(location, Path) or not is_url(location):
        return Path(location)
    if local := is_local(location):
        return local
    return follow(MediaFolder(location, caption_suffix=caption_suffix))


def metadata_file(location: str | Path) -> Path:
    """What `--train-data-meta` takes: a file as it is, a URL as a copy of it."""
    if isinstance(location, Path) or not is_url(location):
        return Path(location)
    return is_local(location) or follow(_MetadataFile(location))


def remote_named(data_dir: Path, name: str) -> RemoteFile | None:
    """The medium that a dataset calls `name`, if it is one of a store; else None."""
    if is_url(name):
        return RemoteFile(url=name)
    folder = followed(data_dir)
    if not isinstance(folder, MediaFolder) or name.startswith("/") or in_home(data_dir, name):
        return None
    below = data_dir.relative_to(folder.folder).as_posix()
    return folder.file(posixpath.normpath(posixpath.join(below, name)))


def in_home(data_dir: Path, name: str) -> bool:
    """Whether a name in a dataset is relative to the home folder: `~/a.mp4`, unless a folder of
    that name lies in `data_dir`."""
    return name.startswith("~/") and not (data_dir / "~").exists()


def name_below(url: str, data_dir: Path) -> str:
    """A URL as a dataset in `data_dir` names the file: relative where it lies inside."""
    folder = followed(data_dir)
    if folder is None:
        return url
    below = data_dir.relative_to(folder.folder).as_posix()
    root = folder.url if below == "." else f"{folder.url}/{below}"
    return url.removeprefix(f"{root}/")


def stored(path: Path) -> "Path | RemoteFile":
    """A listed file as the medium that it stands for."""
    folder = followed(path)
    if not isinstance(folder, MediaFolder):
        return path
    return folder.file(os.path.relpath(path, folder.folder))
