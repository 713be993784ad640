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

    def __init__(self, message: str) -> None:
        self.signum: int | None = None
        """Number of the signal that came, None so far."""
        self._message = message.encode()
        self._deferring = 0

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            return  # the run is ending already; a second signal must not cut that short
        os.write(2, b"\n" + self._message + b"\n")
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


@contextmanager
def catch_signals(message: str) -> Iterator[Interruption]:
    """Handle SIGINT and SIGTERM inside the block (main thread only); restore the handlers after.

    `message` is written to stderr when the first signal comes.
    """
    interruption = Interruption(message)
    wanted = list(_SIGNALS)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # a closed terminal; not under nohup
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, interruption._handle) for number in wanted}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
