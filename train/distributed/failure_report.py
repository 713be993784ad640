"""Identifies failed ranks through the rendezvous store."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch.distributed as dist

# Those that wait in vain for the same process find out within moments of one another.
_GATHERING_S = 5.0
_FIRST_STAYS_S = 3.0  # longer: it may hold the store
_ANSWER_S = 12.0  # after which the store's process hangs itself
_POLL_S = 0.2
_WATCH_S = 2.0
# Between the end of a process and that of one that has not noticed it.
NOTICES_BY_ITSELF_S = 15.0
_ENDED = "ended"
WATCH = "watch the others"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is known of processes that lost one another."""

    store: Literal["answers", "is gone", "hangs"] = "answers"
    """Unless it answers, nothing else is known."""
    present: Sequence[int] = ()
    """Those that found out."""
    silent: Mapping[int, str] = field(default_factory=dict)
    """Those that did not, and where each was: "pid 12 on host"."""
    ended: tuple[int, str] | None = None
    """One that reported why it ends, and why."""


class RollCall:
    """A line to the other processes that needs none of them but the one with the store."""

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        store.set(_where(rank), f"pid {os.getpid()} on {socket.gethostname()}")

    def report_end(self, why: str) -> None:
        """Leave in the store why this process ends, unless another has ended before."""

        def report() -> None:
            self._store.compare_set(_ENDED, "", f"{self._rank} {why}")

        _in_time(report)

    @contextmanager
    def watched(self, end: Callable[[int, str], None]) -> Iterator[Callable[[], None]]:
        """A block in which `end` is called, in a thread, when another process has ended.

        It gets the rank and the reason, some seconds later, so that this process can notice by
        itself, and call what the block is given. With NCCL it would not: it waits in a collective
        until the time-out, or for ever.
        """
        over = threading.Event()

        def wait() -> None:
            while not over.wait(_WATCH_S):
                try:
                    ended = self._ended()
                except RuntimeError:  # the store is gone, and so is its process
                    ended = (0, "it was killed, or its machine is gone.")
                if ended and ended[0] != self._rank:
                    if not over.wait(NOTICES_BY_ITSELF_S):
                        end(*ended)
                    return

        thread = threading.Thread(target=wait, name=WATCH, daemon=True)
        thread.start()
        try:
            yield over.set
        finally:
            over.set()
        # Python ends a thread that comes back from the store at exit, and C++ aborts the process.
        thread.join(_ANSWER_S)

    def answer(self) -> Answer:
        """Report that this process noticed, and wait some seconds for the others to."""
        return _in_time(self._gathered)

    def _gathered(self) -> Answer:
        self._store.set(_found_out(self._rank), "")
        until = time.monotonic() + _GATHERING_S + (0 if self._rank else _FIRST_STAYS_S)
        while True:
            ended = self._ended()
            others = [rank for rank in range(self._world_size) if ended is None or rank != ended[0]]
            all_found_out = self._store.check([_found_out(rank) for rank in others])
            if all_found_out or (ended and self._rank) or time.monotonic() > until:
                break
            time.sleep(_POLL_S)
        present = [rank for rank in others if self._store.check([_found_out(rank)])]
        silent = {rank: self._store.get(_where(rank)).decode() for rank in {*others} - {*present}}
        return Answer(present=present, silent=silent, ended=ended)

    def _ended(self) -> tuple[int, str] | None:
        if not self._store.check([_ENDED]):
            return None
        rank, _, why = self._store.get(_ENDED).decode().partition(" ")
        return int(rank), why


def _found_out(rank: int) -> str:
    return f"found-out/{rank}"


def _where(rank: int) -> str:
    return f"where/{rank}"


def _in_time(ask: Callable[[], Answer | None]) -> Answer:
    """What `ask` gives. In a thread, since a store whose process hangs blocks for ever."""
    answers = [Answer(store="hangs")]

    def run() -> None:
        try:
            answers.append(ask() or Answer())
        except RuntimeError:  # all that the store raises
            answers.append(Answer(store="is gone"))

    thread = threading.Thread(target=run, name="roll call", daemon=True)
    thread.start()
    thread.join(_ANSWER_S)
    return answers[-1]
