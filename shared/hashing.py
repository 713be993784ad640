"""Content hashes of large files, remembered by (path, size, mtime) so that each is read once."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any


def cache_folder() -> Path:
    """Where derived, deletable data lives: $WANDISTILL_CACHE, else ~/.cache/wandistill."""
    configured = os.environ.get("WANDISTILL_CACHE")
    return Path(configured) if configured else Path.home() / ".cache" / "wandistill"


class FileHasher:
    """SHA-256 of files, memoised in one append-only JSON-lines file.

    A lost or torn line costs one re-read of that file and nothing else.
    """

    def __init__(self, memo: Path | None = None) -> None:
        self._memo = memo or cache_folder() / "sha256.jsonl"
        self._known: dict[str, str] = {}
        if self._memo.exists():
            for line in self._memo.read_text(errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    self._known[record["file"]] = record["sha256"]
                except (ValueError, KeyError, TypeError):
                    continue

    def sha256(self, path: Path) -> str:
        """Hex digest of the file's bytes. Raises OSError when it can't be read."""
        path = path.resolve()
        status = path.stat()
        name = f"{path}|{status.st_size}|{status.st_mtime_ns}"
        digest = self._known.get(name)
        if digest is None:
            running = hashlib.sha256()
            with path.open("rb") as stream:
                while block := stream.read(1 << 22):
                    running.update(block)
            digest = running.hexdigest()
            self._known[name] = digest
            with suppress(OSError):  # a memo that cannot be written costs time, not the digest
                self._memo.parent.mkdir(parents=True, exist_ok=True)
                with self._memo.open("a") as memo:
                    memo.write(json.dumps({"file": name, "sha256": digest}) + "\n")
        return digest

    def combined(self, files: Iterable[Path]) -> str:
        """One digest over several files' contents, independent of their folder and their order."""
        parts = sorted((file.name, self.sha256(file)) for file in files)
        return digest_of(parts)


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
