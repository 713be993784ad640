"""Files that appear whole or not at all: write beside, fsync, rename, fsync the folder.

Everything that changes a cache goes through here, so that a test can make any single write, fsync,
rename, upload or removal the last one (`FAULT`).
"""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".tmp"

Commit = Callable[[Path, Path], None]
"""`commit(written, final)`."""

# kill@17: SIGKILL to this process at its 17th point, where a write is left half done;
# enospc@17: from that point on the disk is full; log@FILE: one line in FILE for every point.
FAULT = "WANDISTILL_FAULT"


class _Faults:
    """Counts the points of this process and fails at the one that the environment names."""

    def __init__(self, wanted: str) -> None:
        self._action, _, self._argument = wanted.partition("@")
        self._count = 0

    def due(self, what: str, path: Path) -> bool:
        """Count one point; whether it is the one that fails."""
        self._count += 1
        if self._action == "log":
            with Path(self._argument).open("a") as log:
                log.write(f"{what} {path}\n")
            return False
        number = int(self._argument)
        return self._count == number or (self._action == "enospc" and self._count > number)

    def fail(self, what: str, path: Path) -> None:
        """Kill this process, or raise OSError where a full disk would."""
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what in ("remove", "fsync"):  # a full disk refuses neither
            return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@cache
def _faults() -> _Faults | None:
    """Made at the first point, so that a forked process may have a fault of its own."""
    wanted = os.environ.get(FAULT)
    return _Faults(wanted) if wanted else None


def fault_point(what: str, path: Path) -> None:
    """Announce that `path` is about to change. Raises OSError where a test wants a full disk."""
    faults = _faults()
    if faults is not None and faults.due(what, path):
        faults.fail(what, path)


class DurableFile:
    """A new file, written from start to end. Raises OSError when the disk is full."""

    def __init__(self, path: Path) -> None:
        self._path = path
        fault_point("create", path)
        self._stream = path.open("wb")

    def write(self, data: bytes | memoryview) -> int:
        faults = _faults()
        if faults is not None and faults.due("write", self._path):
            self._stream.write(data[: len(data) // 2])
            self._stream.flush()
            faults.fail("write", self._path)
        return self._stream.write(data)

    def close(self) -> None:
        """Hand the last bytes to the system; `commit` makes them durable."""
        self._stream.close()

    def discard(self) -> None:
        """Close a file that nobody wants any more."""
        with suppress(OSError):  # closing flushes, which a full disk refuses
            self._stream.close()


def temporary(path: Path) -> Path:
    """The name under which `path` is written before `commit` (same folder, so rename works)."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


@contextmanager
def building_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill in the block, under `final`'s temporary name; none if that fails."""
    building = temporary(final)
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        yield building
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def fsync_folder(folder: Path) -> None:
    """Make renames and removals inside `folder` survive a power cut."""
    fsync_file(folder)


def fsync_file(path: Path) -> None:
    """Flush the bytes of a closed file (or the names in a folder) to disk."""
    fault_point("fsync", path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, final: Path) -> None:
    """Atomic where `final` is a file or nothing; `fsync_folder` makes it durable."""
    fault_point("rename", final)
    path.replace(final)


def link(file: Path, new: Path) -> None:
    """A second name for a file of gigabytes; a copy where the file system has no such thing."""
    try:
        os.link(file, new)
    except OSError:
        shutil.copyfile(file, new)
        fsync_file(new)


def remove(path: Path) -> None:
    """Delete a file if it is there."""
    fault_point("remove", path)
    path.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Delete a folder and what is in it, if it is there; what cannot be deleted stays."""
    for parent, folders, files in os.walk(folder, topdown=False):
        with suppress(OSError):
            for name in files:
                remove(Path(parent, name))
            for name in folders:
                Path(parent, name).rmdir()
    with suppress(OSError):
        folder.rmdir()


def commit(written: Path, final: Path) -> None:
    """Give a fully written temporary file its name; after this returns it survives a crash."""
    fsync_file(written)
    rename(written, final)
    fsync_folder(final.parent)


def write_bytes(path: Path, *parts: bytes | memoryview, commit: Commit = commit) -> None:
    """Write `path` so that a reader sees the old content or the new one, never a part, and nothing
    is left beside it where that fails.

    `commit`: of the store that the file is part of (`shared.io.store`).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = temporary(path)
    stream = DurableFile(beside)
    try:
        for part in parts:
            stream.write(part)
        stream.close()
        commit(beside, path)
    except BaseException:
        stream.discard()
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, commit: Commit = commit) -> None:
    """`write_bytes` of readable JSON (two spaces, keys in the order given, newline at the end)."""
    data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    write_bytes(path, data, commit=commit)
