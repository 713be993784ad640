"""Content hashes of large files, remembered by what `stamp_of` sees so that each is read once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.io.memo import note, recall

_BLOCK_BYTES = 1 << 22


def cache_folder() -> Path:
    """Where derived, deletable data lives: $WANDISTILL_CACHE, else ~/.cache/wandistill."""
    configured = os.environ.get("WANDISTILL_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "wandistill"


def sha256_of(path: Path, on_progress: Callable[[], None] = lambda: None) -> str:
    """Hex digest of a file's bytes; calls `on_progress` after every few megabytes."""
    running = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            running.update(block)
            on_progress()
    return running.hexdigest()


def stamp_of(path: Path) -> str:
    """Another string once a file's content is another, as far as a look without reading tells.

    `cp -p`, `mv` and `touch -r` may give a file of equal size another's time of modification, but
    not its inode and the time when that was changed. Raises OSError.
    """
    path = path.resolve()
    found = path.stat()
    return f"{path}|{found.st_size}|{found.st_mtime_ns}|{found.st_ctime_ns}|{found.st_ino}"


class FileHasher:
    """SHA-256 of files, memoised in one append-only JSON-lines file.

    A lost or torn line costs one re-read of that file and nothing else.
    """

    def __init__(self, memo: Path | None = None) -> None:
        self._memo = memo or cache_folder() / "sha256.jsonl"
        self._known: dict[str, str] = {}
        for record in recall(self._memo):
            with suppress(KeyError, TypeError):
                self._known[record["file"]] = record["sha256"]

    def sha256(self, path: Path) -> str:
        """Hex digest of the file's bytes. Raises OSError when it can't be read."""
        name = self.name(path)
        digest = self.known(name)
        if digest is None:
            digest = sha256_of(path)
            self.remember(name, digest)
        return digest

    def name(self, path: Path) -> str:
        """What a file is remembered by: taken before it is read. Raises OSError."""
        return stamp_of(path)

    def known(self, name: str) -> str | None:
        """The digest of the file with this name, if it was read before."""
        return self._known.get(name)

    def remember(self, name: str, digest: str) -> None:
        """Note the digest of the file that had this name when its reading began."""
        if self._known.get(name) == digest:
            return
        self._known[name] = digest
        note(self._memo, [{"file": name, "sha256": digest}])

    def combined(self, files: Iterable[Path]) -> str:
        """One digest over several files' contents, independent of their folder and their order."""
        parts = sorted((file.name, self.sha256(file)) for file in files)
        return digest_of(parts)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A path may hold bytes that are no UTF-8.
    return hashlib.sha256(canonical.encode(errors="backslashreplace")).hexdigest()
