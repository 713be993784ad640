"""Ctrl-C and SIGTERM as one exception that never falls into the middle of a write."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# A process that a signal n ended exits with this plus n.
SIGNAL_EXIT = 128


class Interrupted(BaseException):
    """The user or the system asked the run to end."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruption:
    """Raises `Interrupted` where the first signal arrives, or after its `deferred` block."""

    def __init__(self, message: str | None) -> None:
        self.signum: int | None = None
        """Number of the signal that came, None so far."""
        self._message = f"\n{message}\n".encode() if message else b""
        self._deferring = 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            return  # the run is ending already; a second signal must not cut that short
        os.write(2, self._message)
        self.signum = signum
        if not self._deferring:
            raise Interrupted(signum)

    @contextmanager
    def deferred(self, *, raise_after: bool = True) -> Iterator[None]:
        """A block that a signal cannot cut in two."""
        self._deferring += 1
        try:
            yield
        finally:
            self._deferring -= 1
        if raise_after and not self._deferring and self.signum is not None:
            raise Interrupted(self.signum)


def ending_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask this process to end."""
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # under nohup
        return _SIGNALS
    return (*_SIGNALS, signal.SIGHUP)  # a closed terminal, too


@contextmanager
def catch_signals(message: str | None) -> Iterator[Interruption]:
    """Handle SIGINT and SIGTERM inside the block (main thread only); restore the handlers after.

    `message`, if any, is written to stderr when the first signal comes.
    """
    interruption = Interruption(message)
    before = {n: signal.signal(n, interruption._handle) for n in ending_signals()}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
