"""Media in object stores: listed through a folder here, read one by one where they are decoded.

The folder has the names of what lies below the URL. Captions and metadata are in it with their
content; media are empty files, which stand for a `RemoteFile` each.
"""

import hashlib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from preprocess.frames.media_info import MediaError
from shared.io.durable import write_bytes
from shared.io.hashing import cache_folder
from shared.io.object_store import (
    explained,
    filesystem,
    is_url,
    local_path,
    signature_of,
    why,
)
from shared.io.pull import pull_folder
from shared.io.store import Place

_BLOCK_BYTES = 1 << 23
_AT_ONCE = 16  # small files that are asked for together
_MOST_TEXT_BYTES = 4 << 20
_LISTS = (".json", ".jsonl", ".csv")


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


class Remote(Place):
    """Something in a store that is looked at through a folder or file here."""

    url: str

    def __str__(self) -> str:
        return self.url


class RemoteFolder(Remote):
    """What lies below a URL, as a folder."""

    def __init__(self, url: str, *, caption_suffix: str) -> None:
        self.url = url.rstrip("/")
        self._caption_suffix = caption_suffix
        name = hashlib.sha256(f"{self.url} {caption_suffix}".encode()).hexdigest()[:16]
        self.folder = (cache_folder() / "media" / name).absolute()
        self._listed: dict[str, str] = {}

    def pull(self) -> None:
        """Look what is there. Raises UserError where the store can't be read."""
        self._listed = pull_folder(
            self.url, self.folder, is_wanted=_is_name, has_content=self._is_text
        )

    def _is_text(self, name: str, size: int) -> bool:
        if "/" not in name and name.endswith(_LISTS):
            return True
        return name.endswith(self._caption_suffix) and size <= _MOST_TEXT_BYTES

    def file(self, name: str) -> RemoteFile:
        """The medium of this name, seen from the URL."""
        name = posixpath.normpath(name)
        scheme, _, path = self.url.partition("://")
        signature = self._listed.get(name)
        return RemoteFile(
            url=f"{scheme}://{posixpath.normpath(f'{path}/{name}')}", signature=signature
        )

    def name_of(self, url: str) -> str:
        """A URL as a dataset here names the file: relative where it lies inside."""
        return url.removeprefix(f"{self.url}/")


def _path_of(url: str) -> str:
    """Of the web's addresses the path; a store has no others, and `?` and `#` are letters there."""
    is_web = url.lower().startswith(("http://", "https://"))
    return urlsplit(url).path if is_web else url


def _is_name(name: str) -> bool:
    """Whether it may be a file here."""
    plain = all(part not in ("", ".", "..") for part in name.split("/"))
    return plain and "\0" not in name


class RemoteList(Remote):
    """A single file of a store, a list of media, here."""

    def __init__(self, url: str) -> None:
        self.url = url
        name = hashlib.sha256(url.encode()).hexdigest()[:16]
        path = cache_folder() / "media" / name / PurePosixPath(_path_of(url)).name
        self.folder = path.absolute()

    def pull(self) -> None:
        """Fetch it. Raises UserError where it can't be read."""
        with explained(self.url):
            files, path = filesystem(self.url)
            write_bytes(self.folder, files.cat_file(path))


DataDir = Path | RemoteFolder
"""What names in a dataset are relative to; a path may also be a tar, or a pattern of tars."""
MediaList = Path | RemoteList


def open_folder(location: str | Path, *, caption_suffix: str = ".txt") -> DataDir:
    """What `--train-data-dir` names, as it is now. UserError where a store can't be read."""
    if (local := local_path(location)) is not None:
        return local
    folder = RemoteFolder(str(location), caption_suffix=caption_suffix)
    folder.pull()
    return folder


def open_list(location: str | Path) -> MediaList:
    """What `--train-data-meta` names, as it is now. UserError where a store can't be read."""
    if (local := local_path(location)) is not None:
        return local
    file = RemoteList(str(location))
    file.pull()
    return file


def here(place: Path | Remote) -> Path:
    """A folder or file as it lies on this machine."""
    return place if isinstance(place, Path) else place.folder


def remote_named(data_dir: DataDir, name: str) -> RemoteFile | None:
    """The medium that a dataset calls `name`, if it is one of a store; else None."""
    if is_url(name):
        return RemoteFile(url=name)
    if isinstance(data_dir, Path) or name.startswith("/") or in_home(data_dir.folder, name):
        return None
    return data_dir.file(name)


def in_home(data_dir: Path, name: str) -> bool:
    """Whether a name in a dataset is relative to the home folder: `~/a.mp4`, unless a folder of
    that name lies in `data_dir`."""
    return name.startswith("~/") and not (data_dir / "~").exists()
