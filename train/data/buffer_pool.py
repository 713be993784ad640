"""Memory of batches, used again.

The first touch of fresh memory costs as much as what is read into it: the kernel clears every page.
A tensor's memory comes back by itself when nothing needs it any more.
"""

import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch


class Buffers:
    """Uninitialised tensors on memory that earlier ones have left. For any number of threads.

    It never holds more than its tensors took at the same time.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)
        self._lock = threading.RLock()  # the garbage collector may call `_back` inside `empty`

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of this shape, of any content."""
        size = math.prod(shape) * dtype.itemsize
        room = 1 << (size - 1).bit_length()  # so buckets share it; pages never touched cost nothing
        with self._lock:
            free = self._free[room]
            memory = free.pop() if free else None  # the last used: it may be in the CPU's cache
        if memory is None:
            memory = np.empty(room, np.uint8)
        lent = memory[:size]  # torch holds on to this view until no tensor needs it
        weakref.finalize(lent, self._back, memory).atexit = False
        return torch.from_numpy(lent).view(dtype).view(tuple(shape))

    def _back(self, memory: npt.NDArray[np.uint8]) -> None:
        with self._lock:
            self._free[memory.nbytes].append(memory)
