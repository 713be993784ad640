"""Files that appear whole or not at all: write beside, fsync, rename, fsync the folder."""

import json
import os
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"


def temporary(path: Path) -> Path:
    """The name under which `path` is written before `commit` (same folder, so rename works)."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush the bytes of a closed file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def commit(written: Path, final: Path) -> None:
    """Give a fully written temporary file its name; after this returns it survives a crash."""
    fsync_file(written)
    written.replace(final)
    fsync_folder(final.parent)


def write_bytes(path: Path, *parts: bytes | memoryview) -> None:
    """Write `path` so that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = temporary(path)
    with beside.open("wb") as stream:
        stream.writelines(parts)
    commit(beside, path)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of readable JSON (two spaces, keys in the order given, newline at the end)."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
