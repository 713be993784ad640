"""Locks of processes on folders that they write to. The system drops one when its process ends.

On NFS (Linux clients), Lustre mounted with `flock`, GPFS and CephFS they hold between machines.
Lustre's `localflock` holds within one machine; a file system without locks says so.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def without_locks(folder: Path) -> str:
    """What to say where `file_lock` gives None."""
    return (
        f"the file system of {folder} has no locks, so nothing refuses a second run that writes "
        "there at the same time; don't start one."
    )


@contextmanager
def file_lock(
    path: Path, *, shared: bool = False, patience: float | None = None, keep: bool = True
) -> Iterator[int | None]:
    """`path`, made if need be, held by this process alone, or by all who want it `shared`.

    Gives the open file, or None where the file system has no locks: then nobody holds anything.
    Without `keep` the file goes with the lock. Raises BlockingIOError where another has it for
    `patience` seconds (None: waits for its turn), OSError where the file can't be made.
    """
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    if patience is not None:
        how |= fcntl.LOCK_NB
    deadline = time.monotonic() + (patience or 0)
    while (found := _locked(path, how)) is None:
        if time.monotonic() >= deadline and patience is not None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
        time.sleep(0.05)
    descriptor, held = found
    try:
        yield descriptor if held else None
    finally:
        if not keep:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, how: int) -> tuple[int, bool] | None:
    """The open file and whether locks exist; None: another has it, or has just removed it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, how)
        if os.path.samestat(os.fstat(descriptor), path.stat()):
            return descriptor, True
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP
        return descriptor, False
    os.close(descriptor)
    return None
