"""The folders of a run are its own while it lives, not only while it starts."""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from shared.cli.checks import check_writable
from shared.errors import UserError
from shared.io.locks import file_lock, without_locks

LOCK = ".lock"
# A run that was killed and started again at once: the system drops the lock of the dead one.
_PATIENCE = 2.0


def hold_folder(held: ExitStack, option: str, folder: Path, say: Callable[[str], None]) -> None:
    """Keep `folder`, made if need be, for this process until `held` ends.

    UserError where another run has it, or nothing can be written there.
    """
    check_writable(option, folder)
    path = folder / LOCK
    try:
        descriptor = held.enter_context(file_lock(path, patience=_PATIENCE, keep=False))
    except BlockingIOError as error:
        raise UserError(
            f"{option}: another run is writing to {folder} ({_holder(path)}). Wait for "
            f"it to end, or give this run a folder of its own ({option})."
        ) from error
    if descriptor is None:
        say(f"note     {without_locks(folder)}")
        return
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} of {socket.gethostname()}, {started}\n".encode())


def _holder(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "which ended just now"
