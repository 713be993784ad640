"""Packing, hashing, writing and fsyncing in a thread of its own, behind the encoders."""

import queue
import threading
import time
from collections.abc import Callable

from preprocess.cache.writer import ShardWriter
from shared.format.latent_rgb import ColourSums
from shared.format.schema import Sample

# Waiting samples hold memory; this many hide an fsync of a whole shard behind a few encodings.
_MOST_WAITING = 8

_Job = tuple[Sample, Callable[[], ColourSums] | None]


class BackgroundWriter:
    """A `ShardWriter` fed through a bounded queue, in order.

    A failed write comes back as the exception of the next `add` or of `close`; what was added
    after it is not written, and is encoded again by the next run.
    """

    def __init__(self, writer: ShardWriter) -> None:
        self.waited = 0.0
        """Seconds that `add` and `close` have waited for the disk."""
        self._writer = writer
        self._queue: queue.Queue[_Job | None] = queue.Queue(_MOST_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._thread.start()

    def add(self, sample: Sample, colours: Callable[[], ColourSums] | None = None) -> None:
        """Hand a sample over. Raises what an earlier one's write raised (OSError: a full disk).

        `colours`, if given, is called in the thread, for `ShardWriter.add`.
        """
        began = time.perf_counter()
        self._queue.put((sample, colours))
        self.waited += time.perf_counter() - began
        self._raise()

    def close(self) -> None:
        """Write what is waiting and commit every open shard. Raises as `add` does."""
        began = time.perf_counter()
        self._finish()
        self._raise()
        self._writer.close()
        self.waited += time.perf_counter() - began

    def rescue(self) -> None:
        """After a failure: commit what still can be."""
        self._finish()
        self._writer.rescue()

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
                sample, colours = job
                try:
                    self._writer.add(sample, None if colours is None else colours())
                except BaseException as error:
                    self._error = error
