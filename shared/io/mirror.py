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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from shared.errors import UserError
from shared.io.durable import TEMPORARY_SUFFIX, fault_point
from shared.io.hashing import cache_folder, sha256_of
from shared.io.names import quoted
from shared.io.object_store import filesystem, local_path, patiently, shard_cache
from shared.io.pull import pull_folder
from shared.io.shard_cache import DEFAULT_SHARD_CACHE_GB, ShardCache
from shared.io.store import Store

# What of a cache lies in the store; nothing else below the URL is looked at.
_FOLDER = r"(?:captions/[A-Za-z0-9_][A-Za-z0-9._-]*/|conditions/)?"
_COUNTED = re.compile(_FOLDER + r"[a-z][a-z0-9-]*-w\d{3}-\d{5,}\.(?:tar|json|rows\.safetensors)")
_DERIVED = re.compile(_FOLDER + r"(?:manifest\.json|index\.zarr/[A-Za-z0-9_./-]+)")
_WRITTEN_ONLY = re.compile(_FOLDER + r"rejected(?:-w\d{3})?\.jsonl")

ROWS_SUFFIX = ".rows.safetensors"
"""Beside a tar in the store: its rows of the index, so that an index needs no tar."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


def open_store(
    location: str | Path,
    *,
    writer: int | None = None,
    shard_cache_gb: float = DEFAULT_SHARD_CACHE_GB,
) -> Store:
    """Where a folder or a URL leads; `Store.pulled` comes next.

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
        return self.url + str(self.folder).removeprefix(str(self.root))

    @cached_property
    def _store(self) -> tuple[Any, str]:
        return filesystem(self.url)

    @property
    def _fs(self) -> Any:
        return self._store[0]

    @property
    def _prefix(self) -> str:
        return self._store[1].rstrip("/")

    # From the store.

    def pull(self) -> None:
        pull_folder(
            self.url,
            self.root,
            is_wanted=self._wanted,
            has_content=lambda name, size: not name.endswith(".tar"),
            unchanged=self._own,
        )
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
                f"shards: {self.shown(tar)} stands in no sidecar and in no manifest. Rebuild the "
                f"manifest: wanprep index --shards {quoted(self.shown(tar.parent))}"
            )
        if not _SHA256.fullmatch(self._sha256[tar]):  # it becomes a file's name
            raise UserError(
                f"shards: what is said of {self.shown(tar)} is no SHA-256. Restore its sidecar."
            )
        return self._sha256[tar]

    def _wanted(self, name: str) -> bool:
        """Readers need no sidecars: the manifest says as much."""
        needed = self.writes or name.endswith(".tar") or _COUNTED.fullmatch(name) is None
        return needed and _is_mirrored(name)

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
        end = offset + length
        return self._read(tar, lambda path: self._fs.cat_file(path, start=offset, end=end))

    def _fetch_shard(self, tar: Path, sha256: str, target: Path) -> None:
        self._read(tar, lambda path: self._fs.get_file(path, os.fspath(target)))
        found = sha256_of(target)
        if found != sha256:
            raise UserError(
                f"shards: {self.url}/{self._name(tar)} is damaged: its SHA-256 is {found[:12]}…, "
                f"expected {sha256[:12]}…. Restore the object, or delete it with its .json and run "
                "`wanprep encode` again."
            )

    def _read(self, tar: Path, operation: Callable[[str], Any]) -> Any:
        try:
            return self._ask(self._name(tar), operation)
        except OSError as error:
            raise UserError(f"shards: {error.strerror}") from error

    def _ask(self, name: str, operation: Callable[[str], Any]) -> Any:
        """What the store answers about an object, or whatever begins with its name."""
        return patiently(f"{self.url}/{name}", lambda: operation(self._path(name)))

    # To the store, before the same is done here.

    def rename(self, written: Path, final: Path) -> None:
        name = self._name(final)
        if written.is_dir():
            if final.name.endswith(".zarr"):
                self._put_folder(written, name)
        elif self._kept(name):
            self._put(written, name)
            tar = final.with_suffix(".tar")
            if final.suffix == ".json" and tar.exists() and _is_whole(tar):
                self.cache.keep(tar, str(json.loads(written.read_bytes())["sha256"]))
        super().rename(written, final)

    def remove(self, path: Path) -> None:
        if self._kept(self._name(path)):
            fault_point("remove", path)
            self._delete(self._name(path))
            rows = path.with_suffix(ROWS_SUFFIX)  # go with their shard
            rows.unlink(missing_ok=True)
            if _COUNTED.fullmatch(self._name(rows)):
                self._delete(self._name(rows))
        super().remove(path)

    def _put(self, written: Path, name: str) -> None:
        fault_point("upload", self.root / name)
        self._ask(name, lambda path: self._fs.put_file(os.fspath(written), path))
        if _COUNTED.fullmatch(name):
            self._own.add(name)

    def _put_folder(self, written: Path, name: str) -> None:
        """The file that describes it last; then what the folder of that name had more."""
        files = [path for path in sorted(written.rglob("*")) if path.is_file()]
        files.sort(key=lambda path: path.parent == written)
        names = [f"{name}/{path.relative_to(written).as_posix()}" for path in files]
        for path, its_name in zip(files, names, strict=True):
            self._put(path, its_name)
        self._fs.invalidate_cache()
        for path in self._ask(name, self._fs.find):
            if (there := path.removeprefix(f"{self._prefix}/")) not in names:
                self._delete(there)

    def _delete(self, name: str) -> None:
        def delete(path: str) -> None:
            with suppress(FileNotFoundError):
                self._fs.rm_file(path)

        self._ask(name, delete)
        self._own.discard(name)

    def _kept(self, name: str) -> bool:
        """Whether what is written here under this name goes to the store."""
        return _is_mirrored(name) or _WRITTEN_ONLY.fullmatch(name) is not None

    def _name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{name}"


def _is_whole(tar: Path) -> bool:
    """Whether a shard's bytes lie in the folder; no tar is empty."""
    return tar.stat().st_size > 0


def _is_mirrored(name: str) -> bool:
    fits = _COUNTED.fullmatch(name) or _DERIVED.fullmatch(name)
    return fits is not None and ".." not in name and not name.endswith(TEMPORARY_SUFFIX)
