"""A cache on an object store, worked on through a folder here.

The folder (the mirror) holds what is small, as it lies in the store: sidecars, tombstones, manifest
and index. A tar is an empty file in it; its bytes are fetched whole when they are asked for, and
kept by content (`shared.io.shard_cache`). What is committed in the folder or removed from it is put
to the store or removed there first, one whole object after the other: so a store goes through the
states that a folder goes through, and what holds for a killed run there holds here.

The store is what counts: `Mirror.pull` makes the folder like it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from shared.errors import UserError
from shared.io.durable import TEMPORARY_SUFFIX, fault_point, temporary, write_bytes
from shared.io.hashing import cache_folder, sha256_of
from shared.io.names import quoted
from shared.io.object_store import (
    explained,
    filesystem,
    last_listing,
    local_path,
    patiently,
    shard_cache,
    signature_of,
)
from shared.io.shard_cache import DEFAULT_SHARD_CACHE_GB, ShardCache, flock
from shared.io.store import Store, errors_named

# What of a cache lies in the store; nothing else below the URL is looked at.
_FOLDER = r"(?:captions/[A-Za-z0-9_][A-Za-z0-9._-]*/|conditions/)?"
_COUNTED = re.compile(_FOLDER + r"[a-z][a-z0-9-]*-w\d{3}-\d{5,}\.(?:tar|json|rows\.safetensors)")
_DERIVED = re.compile(_FOLDER + r"(?:manifest\.json|index\.zarr/[A-Za-z0-9_./-]+)")
_WRITTEN_ONLY = re.compile(_FOLDER + r"rejected(?:-w\d{3})?\.jsonl")

ROWS_SUFFIX = ".rows.safetensors"
"""Beside a tar in the store: its rows of the index, so that an index needs no tar."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_STATE = ".state.json"
"""What the last pull has seen."""
_THREADS = 16


def open_store(
    location: str | Path,
    *,
    writer: int | None = None,
    shard_cache_gb: float = DEFAULT_SHARD_CACHE_GB,
) -> Store:
    """Where a folder or a URL leads; `Store.pull` comes next.

    `writer`: number of the one writer that works through the folder here, which it has for itself;
    None: a reader, which shares one with others. `shard_cache_gb`: the room that whole shards of a
    store may take on this machine. Raises UserError for less than none.
    """
    if not shard_cache_gb >= 0:
        raise UserError(f"--shard-cache-gb: found {shard_cache_gb:g}, expected 0 or more.")
    if (local := local_path(location)) is not None:
        return Store(local)
    url = str(location).rstrip("/")
    role = "read" if writer is None else f"w{writer:03d}"
    name = hashlib.sha256(url.encode()).hexdigest()[:16]
    root = (cache_folder() / "mirrors" / name / role).absolute()
    cache = ShardCache(int(shard_cache_gb * 10**9))
    return Mirror(root, url=url, root=root, writes=writer is not None, cache=cache)


@contextmanager
def opened(
    location: str | Path,
    *,
    writer: int | None = None,
    shard_cache_gb: float = DEFAULT_SHARD_CACHE_GB,
) -> Iterator[Store]:
    """`open_store`, pulled; UserErrors of the block name it as the user did."""
    store = open_store(location, writer=writer, shard_cache_gb=shard_cache_gb)
    with errors_named(store):
        store.pull()
        yield store


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"shards: {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Mirror(Store):
    """One cache in a store, or one below it."""

    url: str
    root: Path
    """The folder that stands for the URL."""
    writes: bool
    cache: ShardCache
    _own: set[str] = field(default_factory=set, compare=False)
    """Put by this process, so what is in the store is what is here."""
    _sha256: dict[Path, str] = field(default_factory=dict, compare=False)
    _sizes: dict[Path, int] = field(default_factory=dict, compare=False)
    """Bytes of the shards that a reader will read."""
    _in_pieces: set[Path] = field(default_factory=set, compare=False)
    """Those of them whose members are read one by one."""

    is_remote: ClassVar[bool] = True

    def __str__(self) -> str:
        return self.shown(self.folder)

    def shown(self, text: object) -> str:
        return str(text).replace(str(self.root), self.url)

    @cached_property
    def _store(self) -> tuple[Any, str]:
        return filesystem(self.url)

    @property
    def _fs(self) -> Any:
        return self._store[0]

    @property
    def _place(self) -> str:
        return self._store[1].rstrip("/")

    # From the store.

    def pull(self) -> None:
        """Make the folder like the store. Raises UserError where the store can't be read."""
        self.root.mkdir(parents=True, exist_ok=True)
        with flock(self.root / ".pull"), explained(self.url):
            listed = self._listing()
            known = last_listing(self.root / _STATE)
            missing = []
            for name, signature in listed.items():
                here = self.root / name
                if name.endswith(".tar"):
                    here.parent.mkdir(parents=True, exist_ok=True)
                    here.touch()
                elif not (here.exists() and (known.get(name) == signature or name in self._own)):
                    missing.append(name)
            with ThreadPoolExecutor(_THREADS) as pool:
                gone = {name for name in pool.map(self._fetch_small, missing) if name}
            for path in [*self.root.rglob("*")]:
                name = path.relative_to(self.root).as_posix()
                if name not in listed and self._mirrored(name) and path.is_file():
                    path.unlink(missing_ok=True)
            state = {name: value for name, value in listed.items() if name not in gone}
            write_bytes(self.root / _STATE, json.dumps(state).encode())
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
                f"wanprep index --shards {quoted(self.shown(tar.parent))}"
            )
        if not _SHA256.fullmatch(self._sha256[tar]):  # it becomes a file's name
            raise UserError(f"shards: what is said of {tar} is no SHA-256. Restore its sidecar.")
        return self._sha256[tar]

    def _listing(self) -> dict[str, str]:
        """Name → what tells whether it has changed, of everything that is mirrored."""
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._place, detail=True)
        except FileNotFoundError:
            if not self._fs.exists(self._place.split("/")[0]):
                raise
            found = {}
        prefix = self._place + "/"
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
        final = self.root / name
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

    # Its shards.

    def will_read(self, shards: Mapping[str, int]) -> None:
        """As many as fit in the shard cache are fetched whole; reading the others whole as well
        would be fetching them again for nearly every sample.
        """
        if self.writes:
            return
        total = sum(self._sizes.values())
        for tar, size in ((self.folder / name, size) for name, size in shards.items()):
            total += size - self._sizes.get(tar, 0)
            self._sizes[tar] = size
            if total > self.cache.limit:
                self._in_pieces.add(tar)

    def described(self) -> list[str]:
        total = sum(self._sizes.values())
        line = f"store    {total / 1e9:.1f} GB of shards, fetched whole into {shard_cache()}"
        if beyond := max(0, total - self.cache.limit) / 1e9:
            line += f"; the rest, {beyond:.1f} GB, is read sample by sample (--shard-cache-gb)"
        return [line]

    def shard_file(self, tar: Path) -> Path:
        """Fetched, and checked. Raises UserError, also where it is not what its sidecar says."""
        if _is_whole(tar):
            return tar
        sha256 = self.sha256(tar)
        return self.cache.file(sha256, lambda target: self._fetch_shard(tar, sha256, target))

    def open_shard(self, tar: Path, flags: int = os.O_RDONLY) -> int:
        """It stays readable when another process needs the room."""
        while True:
            file = self.shard_file(tar)
            with suppress(FileNotFoundError):
                return os.open(file, flags)

    def fetched(self, tar: Path, offset: int, length: int, *, small: bool) -> bytes | None:
        if not (small or tar in self._in_pieces):
            return None
        if _is_whole(tar) or self.cache.path(self.sha256(tar)).exists():
            return None
        name = self._name(tar)
        with _readable():
            data: bytes = patiently(
                f"{self.url}/{name}",
                lambda: self._fs.cat_file(self._path(name), start=offset, end=offset + length),
            )
        return data

    def _fetch_shard(self, tar: Path, sha256: str, target: Path) -> None:
        name = self._name(tar)
        with _readable():
            patiently(
                f"{self.url}/{name}", lambda: self._fs.get_file(self._path(name), os.fspath(target))
            )
        found = sha256_of(target)
        if found != sha256:
            raise UserError(
                f"shards: {self.url}/{name} is damaged: its SHA-256 is {found[:12]}…, expected "
                f"{sha256[:12]}…. Restore the object, or delete it with its .json and run "
                "`wanprep encode` again."
            )

    # To the store, before the same is done here.

    def rename(self, written: Path, final: Path) -> None:
        self._put(written, final)
        super().rename(written, final)

    def remove(self, path: Path) -> None:
        self._remove_object(path)
        super().remove(path)

    def _put(self, written: Path, final: Path) -> None:
        name = self._name(final)
        if written.is_dir():
            if final.name.endswith(".zarr"):
                self._put_folder(written, name)
            return
        if not (self._mirrored(name) or _WRITTEN_ONLY.fullmatch(name)):
            return
        self._put_file(written, name)
        tar = final.with_suffix(".tar")
        if final.suffix == ".json" and tar.exists() and _is_whole(tar):
            self.cache.keep(tar, str(json.loads(written.read_bytes())["sha256"]))

    def _put_file(self, written: Path, name: str) -> None:
        fault_point("upload", self.root / name)
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

    def _remove_object(self, path: Path) -> None:
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
        return path.relative_to(self.root).as_posix()

    def _path(self, name: str) -> str:
        return f"{self._place}/{name}"


def _is_whole(tar: Path) -> bool:
    """Whether a shard's bytes lie in the folder; no tar is empty."""
    return tar.stat().st_size > 0
