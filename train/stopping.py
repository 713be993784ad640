"""SIGTERM and Ctrl-C: give up the update in progress at once, keep every finished one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """Raised in the main thread by the first SIGTERM or SIGINT."""


class StopOnSignal:
    """Within this context a signal raises Stopped, but never inside `uninterrupted`.

    Abandoning an update is safe: weights, optimizer and counter change in `uninterrupted` alone,
    and randomness is counted, so the update is simply done again after a resume.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """Number of the signal that came, None so far."""
        self._busy = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        """Swallows Stopped: the code after the context saves what there is."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        return kind is Stopped

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first = self.signal is None
        self.signal = number
        if first and not self._busy:
            raise Stopped

    @contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Delay the stop until the block is done: it changes what must stay consistent."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self.signal is not None:
            raise Stopped


def ignore_stop_signals(worker: int) -> None:
    """For data workers: Ctrl-C reaches the whole process group, but stopping is the loop's job."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
