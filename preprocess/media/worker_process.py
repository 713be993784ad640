"""A worker process: runs the functions that it is sent, until the connection ends.

It imports what those functions need and nothing heavier (no torch). It may be killed at any moment;
it leaves nothing behind. The other end is `preprocess.media.worker_pool`.
"""

import ctypes
import importlib
import mmap
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# What a worker says, as the first item of a message.
READY, ALIVE, RESULT, ARRAY, FAILED = "ready", "alive", "result", "array", "failed"

_PR_SET_PDEATHSIG = 1
_OUT_OF_MEMORY_FIRST = "800"  # of 1000: the kernel then kills a worker before it kills the encoder

_parent: Connection | None = None


def main(descriptor: int, parent: int, preload: Sequence[str]) -> None:
    """Serve the process `parent` over the socket `descriptor`; `preload` is imported first."""
    global _parent
    # A terminal's Ctrl-C and a cluster's SIGTERM reach the whole group; the parent decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _end_with(parent)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OUT_OF_MEMORY_FIRST)
    for module in preload:
        with suppress(ImportError):  # the function that needs it says so better
            importlib.import_module(module)
    _parent = Connection(descriptor)
    with suppress(EOFError, OSError):  # the parent is gone, or has no more to do
        _parent.send((READY,))
        while True:
            function, arguments = _parent.recv()
            _serve(_parent, function, arguments)


def alive() -> None:
    """Tell the parent that a long function gets on: its time-out starts anew."""
    if _parent is not None:
        _parent.send((ALIVE,))


def _serve(parent: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    try:
        result = function(*arguments)
    except Exception as error:
        try:
            parent.send((FAILED, error))
        except (TypeError, AttributeError):  # an error that cannot travel
            parent.send((FAILED, RuntimeError(f"{type(error).__name__}: {error}")))
        return
    if isinstance(result, np.ndarray):
        _send_array(parent, result)
    else:
        parent.send((RESULT, result))


def _send_array(parent: Connection, array: npt.NDArray[Any]) -> None:
    """Through shared memory without a name: a killed process leaves none behind."""
    descriptor = _shared_memory(array.nbytes)
    try:
        with mmap.mmap(descriptor, array.nbytes) as memory:
            target: npt.NDArray[Any] = np.ndarray(array.shape, array.dtype, buffer=memory)
            target[...] = array
            del target  # it keeps the map open
        parent.send((ARRAY, (array.shape, array.dtype.str)))
        send_handle(parent, descriptor, os.getppid())
    finally:
        os.close(descriptor)


def _shared_memory(size: int) -> int:
    if hasattr(os, "memfd_create"):  # not bound by the size of /dev/shm, 64 MB in containers
        descriptor = os.memfd_create("frames")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent dies, however that dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
