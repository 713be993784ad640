"""Packing, hashing, writing and fsyncing in a thread of its own, behind the encoders."""

import queue
import threading
import time

import numpy as np
import numpy.typing as npt

from shared.cache.writer import ShardWriter
from shared.format.schema import Sample

# Waiting samples hold memory; this many hide an fsync of a whole shard behind a few encodings.
_MOST_WAITING = 8

_Job = tuple[Sample, npt.NDArray[np.uint8] | None]


class BackgroundWriter:
    """A `ShardWriter` fed through a bounded queue, in order.

    A failed write comes back as the exception of the next `add` or of `close`; what was added
    after it is not written, and is encoded again by the next run.
    """

    def __init__(self, shards: ShardWriter) -> None:
        self.shards = shards
        """For what need not wait its turn: prompts before the first sample, tombstones at the end.
        """
        self.waited = 0.0
        """Seconds that `add` and `close` have waited for the disk."""
        self._queue: queue.Queue[_Job | None] = queue.Queue(_MOST_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def add(self, sample: Sample, frames: npt.NDArray[np.uint8] | None = None) -> None:
        """`ShardWriter.add`, later. Raises what an earlier one raised (OSError: a full disk)."""
        began = time.perf_counter()
        self._queue.put((sample, frames))
        self.waited += time.perf_counter() - began
        self._raise()

    def close(self) -> None:
        """Write what is waiting and commit every open shard. Raises as `add` does."""
        began = time.perf_counter()
        self._finish()
        self._raise()
        self.shards.close()
        self.waited += time.perf_counter() - began

    def rescue(self) -> None:
        """After a failure: commit what still can be."""
        self._finish()
        self.shards.rescue()

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write(self) -> None:
        while (job := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self.shards.add(*job)
                except BaseException as error:
                    self._error = error
