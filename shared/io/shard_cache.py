"""Shards of object stores, fetched whole: by content, for all stores and processes of a machine."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shared.io.durable import TEMPORARY_SUFFIX, temporary
from shared.io.locks import file_lock
from shared.io.object_store import shard_cache

DEFAULT_SHARD_CACHE_GB = 100
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class ShardCache:
    """The folder of fetched shards, and how much of it may be used."""

    limit: int
    """Bytes. The newest shard is kept in any case."""

    def path(self, sha256: str) -> Path:
        """Where the shard of this content is, once it is there."""
        return shard_cache() / f"{sha256}.tar"

    def keep(self, tar: Path, sha256: str) -> None:
        """Move a tar here that is in a store now; an empty file takes its place."""
        kept = self.path(sha256)
        kept.parent.mkdir(parents=True, exist_ok=True)
        tar.replace(kept)
        tar.touch()
        self._evict(kept)

    def file(self, sha256: str, fetch: Callable[[Path], None]) -> Path:
        """The shard of this content; `fetch` writes it where it is not there. Raises as that does.

        Another process may need the room at any time after.
        """
        kept = self.path(sha256)
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(kept.with_name(f".lock-{sha256[:2]}")):  # one fetches, the others wait
                if not kept.exists():
                    self._fill(kept, fetch)
        now = time.time_ns()  # finer than the kernel's own idea of now
        with suppress(FileNotFoundError):
            os.utime(kept, ns=(now, now))  # the least recently used goes first
        return kept

    def _fill(self, kept: Path, fetch: Callable[[Path], None]) -> None:
        beside = temporary(kept)
        try:
            fetch(beside)
            beside.replace(kept)
        finally:
            beside.unlink(missing_ok=True)
        self._evict(kept)

    def _evict(self, newest: Path) -> None:
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
            if total <= self.limit:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size
