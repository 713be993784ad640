"""Locks of processes on folders that they write to. The system drops one when its process ends.

On NFS (Linux clients), Lustre mounted with `flock`, GPFS and CephFS they hold between machines.
Lustre's `localflock` holds within one machine; a file system without locks says so.
"""

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
    path: Path, *, shared: bool = False, patience: float | None = None
) -> Iterator[int | None]:
    """`path`, made if need be, held by this process alone, or by all who want it `shared`.

    Gives the open file, or None where the file system has no locks: then nobody holds anything.
    Raises BlockingIOError where another has it for `patience` seconds (None: waits for its turn),
    OSError where the file can't be made.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + (patience or 0)
    try:
        while True:
            try:
                fcntl.flock(descriptor, how if patience is None else how | fcntl.LOCK_NB)
                held: int | None = descriptor
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)
            except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP
                held = None
                break
        yield held
    finally:
        os.close(descriptor)
