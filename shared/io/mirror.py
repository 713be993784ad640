"""A cache on an object store, worked on through a folder here.

The folder (the mirror) holds what is small, as it lies in the store: sidecars, tombstones, manifest
and index. A tar is an empty file in it; its bytes are fetched whole when they are asked for, and
kept in a store of shards by content that all mirrors of this machine share, up to a limit. What
`shared.io.durable` renames or removes in the folder is put to the store or removed there first, one
whole object after the other: so a store goes through the states that a folder goes through, and
what holds for a killed run there holds here.

The store is what counts: `Mirror.pull` makes the folder like it.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from shared.errors import UserError
from shared.io.durable import (
    TEMPORARY_SUFFIX,
    fault_point,
    replicate,
    temporary,
    write_bytes,
)
from shared.io.hashing import cache_folder, sha256_of
from shared.io.object_store import (
    explained,
    filesystem,
    is_local,
    is_url,
    patiently,
    shard_cache,
    signature_of,
)

# What of a cache lies in the store; nothing else below the URL is looked at.
_FOLDER = r"(?:captions/[A-Za-z0-9_][A-Za-z0-9._-]*/|conditions/)?"
_COUNTED = re.compile(_FOLDER + r"[a-z][a-z0-9-]*-w\d{3}-\d{5,}\.(?:tar|json|rows\.safetensors)")
_DERIVED = re.compile(_FOLDER + r"(?:manifest\.json|index\.zarr/[A-Za-z0-9_./-]+)")
_WRITTEN_ONLY = re.compile(_FOLDER + r"rejected(?:-w\d{3})?\.jsonl")

ROWS_SUFFIX = ".rows.safetensors"
"""Beside a tar in the store: its rows of the index, so that an index needs no tar."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_THREADS = 16

_ABANDONED_SECONDS = 24 * 3600

DEFAULT_SHARD_CACHE_GB = 100
_limit_bytes = DEFAULT_SHARD_CACHE_GB * 10**9


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"shards: {error.strerror}") from error


class Mirror:
    """The folder here of one cache in a store."""

    def __init__(self, url: str, *, writer: int | None) -> None:
        """`writer`: number of the one writer that works through this folder; None: a reader.

        A writer has the folder for itself; readers share one.
        """
        self.url = url.rstrip("/")
        self.writes = writer is not None
        role = "read" if writer is None else f"w{writer:03d}"
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.folder = (cache_folder() / "mirrors" / name / role).absolute()
        self.before_sidecar: Callable[[Path, Path], None] = lambda written, final: None
        """Called before a sidecar goes to the store, with its temporary file and its place."""
        self._state = self.folder / ".state.json"
        self._own: set[str] = set()
        """Put by this process, so what is in the store is what is here."""
        self._sha256: dict[Path, str] = {}
        self._in_pieces: set[Path] = set()
        self.bytes = 0
        """Of the shards that are read through it; 0 in a writer."""

    @cached_property
    def _store(self) -> tuple[Any, str]:
        return filesystem(self.url)

    @property
    def _fs(self) -> Any:
        return self._store[0]

    @property
    def _root(self) -> str:
        return self._store[1].rstrip("/")

    # From the store.

    def pull(self) -> None:
        """Make the folder like the store. Raises UserError where the store can't be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with flock(self.folder / ".pull"), explained(self.url):
            listed = self._listing()
            known = last_listing(self._state)
            missing = []
            for name, signature in listed.items():
                here = self.folder / name
                if name.endswith(".tar"):
                    here.parent.mkdir(parents=True, exist_ok=True)
                    here.touch()
                elif not (here.exists() and (known.get(name) == signature or name in self._own)):
                    missing.append(name)
            with ThreadPoolExecutor(_THREADS) as pool:
                gone = {name for name in pool.map(self._fetch_small, missing) if name}
            for path in [*self.folder.rglob("*")]:
                name = path.relative_to(self.folder).as_posix()
                if name not in listed and self._mirrored(name) and path.is_file():
                    path.unlink(missing_ok=True)
            state = {name: value for name, value in listed.items() if name not in gone}
            write_bytes(self._state, json.dumps(state).encode())
            self._sha256.clear()

    def sha256(self, tar: Path) -> str:
        """A shard's digest, by its sidecar or by the manifest. UserError where neither has it."""
        if tar not in self._sha256:
            with suppress(OSError, ValueError, KeyError, TypeError):
                sidecar = json.loads(tar.with_suffix(".json").read_bytes())
                self._sha256[tar] = str(sidecar["sha256"])
        if tar not in self._sha256:
            with suppress(OSError, ValueError, KeyError, TypeError):
                manifest = json.loads((tar.parent / "manifest.json").read_bytes())
                for entry in (*manifest["shards"], *manifest["prompts"]):
                    self._sha256.setdefault(tar.with_name(entry["name"]), str(entry["sha256"]))
        if tar not in self._sha256:
            raise UserError(
                f"shards: {tar} stands in no sidecar and in no manifest. Rebuild the manifest: "
                f"wanprep index --shards {shlex.quote(shown(str(tar.parent)))}"
            )
        if not _SHA256.fullmatch(self._sha256[tar]):  # it becomes a file's name
            raise UserError(f"shards: what is said of {tar} is no SHA-256. Restore its sidecar.")
        return self._sha256[tar]

    def _listing(self) -> dict[str, str]:
        """Name → what tells whether it has changed, of everything that is mirrored."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            if not self._fs.exists(self._root.split("/")[0]):
                raise
            found = {}
        prefix = self._root + "/"
        names = {path.removeprefix(prefix): info for path, info in found.items()}
        return {
            name: signature_of(info)
            for name, info in names.items()
            if self._mirrored(name) and self._wanted(name)
        }

    def _mirrored(self, name: str) -> bool:
        fits = _COUNTED.fullmatch(name) or _DERIVED.fullmatch(name)
        return fits is not None and ".." not in name and not name.endswith(TEMPORARY_SUFFIX)

    def _wanted(self, name: str) -> bool:
        """Readers need no sidecars: the manifest says as much."""
        return self.writes or name.endswith(".tar") or _COUNTED.fullmatch(name) is None

    def _fetch_small(self, name: str) -> str | None:
        """Its name where it is gone: another writer replaced or removed it meanwhile."""
        final = self.folder / name
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            data = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            final.unlink(missing_ok=True)
            return name
        beside = temporary(final)
        beside.write_bytes(data)
        beside.replace(final)
        return None

    def read(self, folder: Path, shards: Mapping[str, int]) -> None:
        """A cache in it is about to be read, name → bytes of its shards.

        As many as fit in the shard cache are fetched whole; reading the others whole as well would
        be fetching them again for nearly every sample.
        """
        if self.writes:
            return
        for name, size in shards.items():
            self.bytes += size
            if self.bytes > _limit_bytes:
                self._in_pieces.add(folder / name)

    def in_pieces(self, tar: Path) -> bool:
        """Whether members of this shard are read one by one."""
        return tar in self._in_pieces

    def fetch_shard(self, name: str, target: Path) -> None:
        """The whole tar `name` as the file `target`. Raises UserError where it can't be had."""
        with _readable():
            patiently(
                f"{self.url}/{name}", lambda: self._fs.get_file(self._path(name), os.fspath(target))
            )

    def read_range(self, path: Path, offset: int, length: int) -> bytes:
        """Some bytes of a tar, straight from the store. Raises UserError where it can't."""
        name = self._name(path)
        with _readable():
            data: bytes = patiently(
                f"{self.url}/{name}",
                lambda: self._fs.cat_file(self._path(name), start=offset, end=offset + length),
            )
        return data

    # To the store: what `shared.io.durable` calls before it does the same here.

    def put(self, written: Path, final: Path) -> None:
        """Put the file or the folder `written` to where `final` will be. Raises OSError."""
        name = self._name(final)
        if written.is_dir():
            if final.name.endswith(".zarr"):
                self._put_folder(written, name)
            return
        if not (self._mirrored(name) or _WRITTEN_ONLY.fullmatch(name)):
            return
        tar = final.with_suffix(".tar")
        commits = final.suffix == ".json" and tar.exists() and _whole(tar)
        if commits:
            self.before_sidecar(written, final)
        self._put_file(written, name)
        if commits:
            _keep(tar, str(json.loads(written.read_bytes())["sha256"]))

    def _put_file(self, written: Path, name: str) -> None:
        fault_point("upload", self.folder / name)
        patiently(
            f"{self.url}/{name}", lambda: self._fs.put_file(os.fspath(written), self._path(name))
        )
        if _COUNTED.fullmatch(name):
            self._own.add(name)

    def _put_folder(self, written: Path, name: str) -> None:
        """The file that describes it last; then what the folder of that name had more."""
        files = [path for path in sorted(written.rglob("*")) if path.is_file()]
        files.sort(key=lambda path: path.parent == written)
        for path in files:
            self._put_file(path, f"{name}/{path.relative_to(written).as_posix()}")
        self._fs.invalidate_cache()
        there = {path.relative_to(written).as_posix() for path in files}
        before = patiently(self.url, lambda: self._fs.find(self._path(name)))
        for path in before:
            if path.removeprefix(self._path(name) + "/") not in there:
                patiently(self.url, lambda path=path: self._remove(path))  # type: ignore[misc]

    def removed(self, path: Path) -> None:
        """Remove an object, if it is there. Raises OSError."""
        name = self._name(path)
        if self._mirrored(name) or _WRITTEN_ONLY.fullmatch(name):
            fault_point("remove", path)
            for gone in [name, *self._rows_of(path)]:
                patiently(f"{self.url}/{gone}", lambda gone=gone: self._remove(self._path(gone)))  # type: ignore[misc]
                self._own.discard(gone)

    def _rows_of(self, path: Path) -> list[str]:
        """The name of a shard's rows, which go with it."""
        rows = path.with_suffix(ROWS_SUFFIX)
        rows.unlink(missing_ok=True)
        return [self._name(rows)] if _COUNTED.fullmatch(self._name(rows)) else []

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def last_listing(state: Path) -> dict[str, str]:
    """Name → `signature_of`, as the last pull has left it in its state file; {} if that is gone."""
    with suppress(OSError, ValueError):
        found = json.loads(state.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


# Mirrors of this process.


class Followed(Protocol):
    """Something in a store that is made like it before a command runs."""

    url: str
    folder: Path
    """Here; or a file."""

    def pull(self) -> None:
        """Raises UserError where the store can't be read."""


_mirrors: dict[Path, Mirror] = {}
_followed: dict[Path, Followed] = {}
"""The mirrors, and what stage one reads."""


def mirror_of(path: Path) -> Mirror | None:
    """The mirror that a file or folder lies in."""
    if not _mirrors:
        return None
    return next((_mirrors[up] for up in (path, *path.parents) if up in _mirrors), None)


def shards_to_read(location: str | Path) -> Path:
    """What `wantrain --shards` takes: a folder as it is, a URL as its mirror's folder."""
    return local_folder(location, writer=None)


def local_folder(location: str | Path, *, writer: int | None) -> Path:
    """A folder as it is; for a URL its mirror's, which `pull_mirrors` fills."""
    if isinstance(location, Path) or not is_url(location):
        return Path(location)
    if local := is_local(location):
        return local
    mirror = Mirror(location, writer=writer)
    if mirror.folder not in _mirrors:
        _mirrors[mirror.folder] = mirror
        replicate(mirror.folder, mirror)
    return follow(mirror)


def follow(thing: Followed) -> Path:
    """Have `pull_mirrors` pull it, and its URL shown in its place; where it is here."""
    return _followed.setdefault(thing.folder, thing).folder


def followed(path: Path) -> Followed | None:
    """What was followed into the folder that a path lies in."""
    if not _followed:
        return None
    return next((_followed[up] for up in (path, *path.parents) if up in _followed), None)


def pull_mirrors() -> None:
    """Make everything that this process follows like it is in the store."""
    for thing in [*_followed.values()]:
        thing.pull()


def reading(folder: Path, shards: Mapping[str, int]) -> None:
    """`Mirror.read`, where the cache in `folder` lies in a store."""
    if mirror := mirror_of(folder):
        mirror.read(folder, shards)


def described(folder: Path) -> list[str]:
    """A line on where the shards of a store go; none for a folder."""
    mirror = mirror_of(folder)
    if mirror is None:
        return []
    gigabytes = f"{mirror.bytes / 1e9:.1f} GB of shards"
    beyond = max(0, mirror.bytes - _limit_bytes) / 1e9
    line = f"store    {gigabytes}, fetched whole into {shard_cache()}"
    if beyond:
        line += f"; the rest, {beyond:.1f} GB, is read sample by sample (--shard-cache-gb)"
    return [line]


def pull(folder: Path) -> bool:
    """Make the mirror that `folder` lies in like its store; False where it lies in none."""
    mirror = mirror_of(folder)
    if mirror is None:
        return False
    mirror.pull()
    return True


def shown(text: str) -> str:
    """`text` for people: URLs in place of mirrors' folders."""
    for folder, thing in _followed.items():
        text = text.replace(str(folder), thing.url)
    return text


# Whole shards, by content.


def limit_shard_cache(gigabytes: float) -> None:
    """How much room fetched shards may take on this machine. UserError for less than none."""
    global _limit_bytes
    if not gigabytes >= 0:
        raise UserError(f"--shard-cache-gb: found {gigabytes:g}, expected 0 or more.")
    _limit_bytes = int(gigabytes * 10**9)


def _keep(tar: Path, sha256: str) -> None:
    """Move a tar that is in the store now to the fetched ones; an empty file takes its place."""
    kept = _kept(sha256)
    kept.parent.mkdir(parents=True, exist_ok=True)
    tar.replace(kept)
    tar.touch()
    _evict(kept)


def _kept(sha256: str) -> Path:
    return shard_cache() / f"{sha256}.tar"


def is_remote(tar: Path, *, small: bool) -> bool:
    """Whether bytes of a shard are best read straight from a store: `small` ones, or of a shard
    that will not be fetched.
    """
    mirror = mirror_of(tar)
    if mirror is None or not (small or mirror.in_pieces(tar)):
        return False
    return not _whole(tar) and not _kept(mirror.sha256(tar)).exists()


def _whole(tar: Path) -> bool:
    """No tar is empty."""
    return tar.stat().st_size > 0


def shard_file(tar: Path) -> Path:
    """The file that holds a shard's bytes, fetched and checked where it lies in a store.

    Raises UserError where it can't be fetched or is not what its sidecar says.
    """
    mirror = mirror_of(tar)
    if mirror is None or _whole(tar):
        return tar
    sha256 = mirror.sha256(tar)
    kept = _kept(sha256)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with flock(kept.with_name(f".lock-{sha256[:2]}")):  # one process fetches, the others wait
            if not kept.exists():
                _fetch(mirror, tar, sha256, kept)
    now = time.time_ns()  # finer than the kernel's own idea of now
    with suppress(FileNotFoundError):
        os.utime(kept, ns=(now, now))  # the least recently used goes first
    return kept


def read_range(tar: Path, offset: int, length: int) -> bytes:
    """Some bytes of a shard that `is_remote`. Raises UserError."""
    mirror = mirror_of(tar)
    assert mirror is not None, tar
    return mirror.read_range(tar, offset, length)


def open_shard(tar: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a shard's bytes; they stay readable when another process needs the room."""
    while True:
        try:
            return os.open(shard_file(tar), flags)
        except FileNotFoundError:
            if mirror_of(tar) is None:
                raise


def _fetch(mirror: Mirror, tar: Path, sha256: str, kept: Path) -> None:
    name = tar.relative_to(mirror.folder).as_posix()
    beside = temporary(kept)
    try:
        mirror.fetch_shard(name, beside)
        found = sha256_of(beside)
        if found != sha256:
            raise UserError(
                f"shards: {mirror.url}/{name} is damaged: its SHA-256 is {found[:12]}…, expected "
                f"{sha256[:12]}…. Restore the object, or delete it with its .json and run "
                "`wanprep encode` again."
            )
        beside.replace(kept)
    finally:
        beside.unlink(missing_ok=True)
    _evict(kept)


def _evict(newest: Path) -> None:
    """Delete the shards that were not read for longest, until the rest is within the limit."""
    for left in shard_cache().glob(f"*{TEMPORARY_SUFFIX}"):  # of a process that was killed
        with suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS:
                left.unlink()
    found = []
    for path in shard_cache().glob("*.tar"):
        with suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= _limit_bytes:
            break
        if path != newest:
            path.unlink(missing_ok=True)
            total -= size


@contextmanager
def flock(path: Path) -> Iterator[None]:
    """A lock file, held by one process or thread at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def forget_mirrors() -> None:
    """Close every mirror of this process; for a process that runs several commands."""
    for folder in [*_mirrors]:
        del _mirrors[folder]
        replicate(folder, None)
    _followed.clear()
